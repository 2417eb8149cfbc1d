# SPDX-License-Identifier: Apache-2.0
"""The former name of `tunix_gemma4.settings.sft`."""

from tunix_gemma4._renamed import warn
from tunix_gemma4.lora import LoraConfig as LoraSettings  # noqa: F401
from tunix_gemma4.settings.common import MeshConfig  # noqa: F401
from tunix_gemma4.settings.load_config import to_yaml  # noqa: F401
from tunix_gemma4.settings.sft import *  # noqa: F403

warn(
    *(__name__, "tunix_gemma4.settings.sft", "LoraSettings: tunix_gemma4.LoraConfig"),
    "MeshConfig: tunix_gemma4.settings.common; to_yaml: tunix_gemma4.settings.load_config",
)
