# SPDX-License-Identifier: Apache-2.0
"""What Tunix calls `params_safetensors` of a model, under the name that scripts import."""

from tunix_gemma4.plugin.params import *  # noqa: F403
