# SPDX-License-Identifier: Apache-2.0
"""What a processor reads from a checkpoint directory. Nothing of the directory is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.json_files import read_json

# For every `from_pretrained` of transformers; left out, some of them ask on the terminal.
NO_CODE = {"trust_remote_code": False}
_SMALL = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.json",
)


def load_tokenizer(directory: Path) -> Any:
    """The directory's own tokenizer, with its chat template.

    Raises:
        ValueError: naming the file that is missing, damaged, or asks for code of its own.
    """
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(
            f"{directory}: there is no tokenizer.json; copy the tokenizer files of the "
            "checkpoint here"
        )
    # transformers goes on without some of these, or without naming them.
    described = {
        name: read_json(directory / name) for name in _SMALL if (directory / name).is_file()
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **NO_CODE)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers' panics are no Exceptions.
        if (directory / "tokenizer.json").is_file():
            read_json(directory / "tokenizer.json")
        if isinstance(error, UnicodeDecodeError):  # All JSON was text.
            raise ValueError(f"{directory}: chat_template.jinja is not UTF-8 ({error})") from error
        if "auto_map" in described.get("tokenizer_config.json", {}):
            raise ValueError(
                f"{directory / 'tokenizer_config.json'}: auto_map asks for code of its own, which "
                "is never run here; use the tokenizer files of the released checkpoint"
            ) from error
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise ValueError(
            f"{directory}: the tokenizer cannot be loaded ({reason}); copy the tokenizer files of "
            "the released checkpoint here"
        ) from error
    _require_ends(tokenizer, directory / "tokenizer_config.json")
    if not tokenizer.chat_template:
        raise ValueError(
            f"{directory}: it has no chat template, as the pre-trained checkpoints have none; "
            "use the instruction-tuned directory (its name ends in -it), or copy its "
            "chat_template.jinja here"
        )
    return tokenizer


def _require_ends(tokenizer: Any, file: Path) -> None:
    """Raises ValueError for a tokenizer that does not know what begins and what ends a text."""
    names = ("bos_token", "eos_token")
    missing = [name for name in names if getattr(tokenizer, f"{name}_id") is None]
    if missing:
        found = (
            f"found no {' and no '.join(missing)}" if file.is_file() else "there is no such file"
        )
        raise ValueError(
            f"{file}: expected {' and '.join(names)}, {found}; copy that of the released "
            "checkpoint here"
        )


def stop_ids_of(directory: Path, rows: int) -> list[int] | None:
    """The ids of generation_config.json that end an answer; None where it has none.

    Args:
        directory: of the checkpoint.
        rows: of its embedding.

    Raises:
        ValueError: naming the file, for what are no ids or have no row.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return None
    found = read_json(path).get("eos_token_id")
    if found is None:
        return None
    ids = found if isinstance(found, list) else [found]
    if not ids or not all(type(one) is int and one >= 0 for one in ids):
        raise ValueError(f"{path}: eos_token_id is {found!r:.80}, expected an id or a list of ids")
    if max(ids) >= rows:
        raise ValueError(
            f"{path}: eos_token_id is {found!r:.80}, and {max(ids)} is beyond the vocabulary: the "
            f"embedding has {rows} rows"
        )
    return ids
