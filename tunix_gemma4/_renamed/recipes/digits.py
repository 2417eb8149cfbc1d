# SPDX-License-Identifier: Apache-2.0
"""The former name of `tunix_gemma4.testing.digits`."""

from tunix_gemma4._renamed import warn
from tunix_gemma4.testing.digits import *  # noqa: F403

warn(__name__, "tunix_gemma4.testing.digits")
