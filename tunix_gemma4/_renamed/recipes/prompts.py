# SPDX-License-Identifier: Apache-2.0
"""The former name of `tunix_gemma4.data.prompts`, whose classes took a `PromptConfig` then."""

from tunix_gemma4._renamed import warn
from tunix_gemma4.data.prompts import PromptBatches as Batches, PromptRows as _PromptRows

__all__ = ["Batches", "PromptRows"]

_OF_ROWS = ("max_prompt_length", "prompt_column", "system_prompt", "check", "skip_bad_rows")


class PromptRows(_PromptRows):
    def __init__(self, path, processor, config, **settings):
        settings |= {name: getattr(config, name) for name in _OF_ROWS}
        super().__init__(path, processor, **settings)


warn(__name__, "tunix_gemma4.data.prompts", "Batches: PromptBatches")
