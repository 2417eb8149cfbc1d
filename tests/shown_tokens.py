# SPDX-License-Identifier: Apache-2.0
"""Examples of a processor as text."""

from itertools import groupby


def prefix(processor):
    return "".join(segment.text for segment in processor.chat.prefix)


def runs(processor, example):
    """The example as (text, supervised) runs."""
    result = []
    pairs = zip(example.tokens, example.loss_mask, strict=True)
    for mask, run in groupby(pairs, key=lambda pair: pair[1]):
        ids = [token for token, _ in run]
        result.append((processor.decode(ids, skip_special_tokens=False), int(mask)))
    return result
