# SPDX-License-Identifier: Apache-2.0
"""The former name of `tunix_gemma4.settings.common`."""

from tunix_gemma4._renamed import warn
from tunix_gemma4.lora import LoraConfig as LoraSettings  # noqa: F401
from tunix_gemma4.settings.common import *  # noqa: F403

warn(__name__, "tunix_gemma4.settings.common", "LoraSettings: tunix_gemma4.LoraConfig")
