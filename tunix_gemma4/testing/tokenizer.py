# SPDX-License-Identifier: Apache-2.0
"""The tokenizer and chat template of a tiny Gemma 4 directory.

Byte-level BPE over a few words, so that every string survives `decode(encode(x))`, with Gemma 4's
special tokens. It is declared `PreTrainedTokenizerFast`: transformers' Gemma class would replace
the pre-tokenizer with its own.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

VOCAB_SIZE = 384

# As in Gemma 4, pad to mask come first and the media tokens last.
_LEADING = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|think|>", "<|channel>", "<channel|>"),
    *("<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"),
    *("<|tool_response>", "<tool_response|>", '<|"|>'),
)
_MEDIA = ("<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>")
SPECIAL_TOKENS = _LEADING + _MEDIA

# Each of these is one token. The order matters, since a merge learned early can break up a later
# word; a test looks at every one.
WORDS = (
    *("\n\n", " digit", " is", " this", " image", " answer", " number", " minus", " of", " and"),
    *(" a", "user", "model", "system", "thought", "What", "?"),
)

# Names under which transformers' processor asks the tokenizer for its media tokens.
_NAMED = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each of the 256 bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids and merges: special tokens, bytes, then every prefix of every word."""
    alphabet = _byte_alphabet()
    tokens = [*_LEADING, *alphabet]
    merges = []
    for word in WORDS:
        letters = [alphabet[byte] for byte in word.encode("utf-8")]
        for end in range(1, len(letters)):
            pair = ("".join(letters[:end]), letters[end])
            if "".join(pair) not in tokens:
                tokens.append("".join(pair))
                merges.append(pair)
    unused = VOCAB_SIZE - len(tokens) - len(_MEDIA)
    tokens += [f"<unused{index}>" for index in range(unused)]
    tokens += _MEDIA
    return {token: index for index, token in enumerate(tokens)}, merges


def token_ids() -> dict[str, int]:
    """Ids of the special tokens."""
    vocabulary, _ = _vocabulary()
    return {token: vocabulary[token] for token in SPECIAL_TOKENS}


def write_tokenizer(directory: Path, *, empty_thought: bool) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja.

    With `empty_thought` the generation prompt ends in one, as those of 12B, 26B-A4B and 31B do.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary, merges = _vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True))
    # No regular expression cuts the text first: Gemma's own tokenizer has none either.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <bos> $B",
        special_tokens=[("<bos>", vocabulary["<bos>"])],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "Gemma4Processor",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        **{f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk", "mask")},
        **_NAMED,
        "extra_special_tokens": [
            token for token in SPECIAL_TOKENS[5:] if token not in _NAMED.values()
        ],
        "model_specific_special_tokens": _NAMED,
    }
    write_json(directory / "tokenizer_config.json", settings)
    template = resources.files("tunix_gemma4").joinpath("presets/tiny_chat_template.jinja")
    switch = f"{{%- set empty_thought = {str(empty_thought).lower()} -%}}\n"
    text = switch + template.read_text("utf-8")
    (directory / "chat_template.jinja").write_text(text, "utf-8")


def write_json(path: Path, content: dict) -> None:
    """A file as Hugging Face's own look."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
