# SPDX-License-Identifier: Apache-2.0
"""`tunix-gemma4 parity DIRECTORY`: a checkpoint in transformers and here, layer by layer.

Transformers runs first, and once more with every weight moved by about one unit in its last
place: how far that moves a row is the row's noise floor. Then its model is freed and ours is
loaded, so that there is one model in memory at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from ..checkpoint import load_checkpoint
from ..config import ModelConfig
from ..data.chat_template import NO_CODE
from ..data.processor import Batch, Processor
from ..extras import require_extra
from ..model.gemma4 import Gemma4ForConditionalGeneration
from ..model.masks import attention_masks

RELATIVE = 1e-4  # Of a row's largest value.
_LAST = 64  # Logits are compared at the last tokens: over the whole text they fill the memory.
_CHUNK = 1 << 24
# The smallest budget: enough for every operation of the tower.
_SOFT_TOKENS = 70
_SENTENCE = "The quick brown fox jumps over 13 lazy dogs, and nobody asks why. "
_PICTURES = ((40, 64), (96, 31))

# Values at real tokens by a row's name, float32 [tokens, features], in the order of the table.
Values = dict[str, np.ndarray]


@dataclasses.dataclass
class Row:
    """One compared activation. `noise` is that of transformers."""

    case: str
    name: str
    difference: float
    largest: float
    noise: float

    @property
    def tolerance(self) -> float:
        """Largest difference that passes: 1e-4 of the largest value, or three times the noise."""
        return max(RELATIVE * self.largest, 3 * self.noise)

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return bool(self.difference <= self.tolerance)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table. Returns 0 if every row passes, else 1."""
    options = _parser().parse_args(arguments)
    require_extra("torch", "parity", "parity")  # Before anything slow.
    directory = Path(options.directory)
    reference = Path(options.against or directory)
    config = ModelConfig.from_hf(directory)
    vision = config.tower_config is not None and not options.text_only
    config = ModelConfig.from_hf(directory, text_only=not vision, dtype=options.dtype)
    batches, how = make_inputs(directory, config, length=options.length, seed=options.seed)
    print(f"Inputs: {how}.")
    for case, batch in batches.items():
        images = 0 if batch.images is None else int(_used(batch).sum())
        print(f"  {case}: {batch.tokens.shape[0]} rows of {batch.tokens.shape[1]}, {images} images")
    rows = compare(directory, config, batches, reference=reference)
    _print_table(rows)
    failed = [row for row in rows if not row.passed]
    if failed:
        print(f"{len(failed)} of {len(rows)} rows differ, first {failed[0].case}: {failed[0].name}")
        return 1
    print(f"All {len(rows)} rows agree in {options.dtype}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tunix-gemma4 parity",
        description="Compares a checkpoint with transformers, layer by layer (extra `parity`).",
    )
    parser.add_argument("directory", help="a checkpoint directory as Hugging Face writes it")
    parser.add_argument(
        "--against", help="the directory that transformers loads, if not the same one"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--text-only", action="store_true", help="leave the images out")
    parser.add_argument("--length", type=int, help="tokens of text; default: past the window")
    parser.add_argument("--seed", type=int, default=0, help="of random tokens and pixels")
    return parser


def compare(
    directory: Path, config: ModelConfig, batches: dict[str, Batch], *, reference: Path
) -> list[Row]:
    """Every row of every case.

    This package loads `directory`, whose `config` has the dtype of the comparison; transformers
    loads `reference`.
    """
    expected, noise = _run_transformers(reference, config, batches)
    model = load_checkpoint(directory, text_only=config.text_only, dtype=config.dtype)
    rows = []
    for case, batch in batches.items():
        for name, ours in _run_ours(model, batch).items():
            theirs = expected[case].pop(name, None)
            if theirs is None or ours.shape != theirs.shape:
                shape = "no such row" if theirs is None else theirs.shape
                raise ValueError(
                    f"{case}, {name}: expected {shape} as in transformers, found {ours.shape}; "
                    f"is {directory} another model than {reference}?"
                )
            largest = float(np.abs(theirs).max())
            difference = float(np.abs(ours - theirs).max())
            rows.append(Row(case, name, difference, largest, noise[case][name]))
    if any(expected.values()):
        lacking = [f"{case}: {name}" for case, left in expected.items() for name in left]
        missing = ", ".join(lacking)
        raise ValueError(
            f"{directory}: transformers' model of {reference} has what this one lacks: {missing}"
        )
    return rows


# ---- What both are fed: text past the window, and pictures.


def make_inputs(
    directory: Path, config: ModelConfig, *, length: int | None, seed: int
) -> tuple[dict[str, Batch], str]:
    """Batches by case, "text" and where `config` has vision "image", left-padded.

    Each holds a long row and a short one. The long row of text has about `length` tokens; None:
    past the sliding window. Tokenizer and chat template of `directory` make the tokens; without
    them they are random.

    Returns:
        The batches, and a sentence that says how they were made.
    """
    length = length or config.sliding_window + 32
    random = np.random.default_rng(seed)
    try:
        processor = Processor.from_pretrained(directory, _SOFT_TOKENS)
        batches = _from_processor(processor, config, length=length, random=random)
    except ValueError as error:
        return _random(config, length=length, random=random), f"random ids, because {error}"
    return batches, "the directory's own tokenizer and chat template"


def _user(*parts) -> list[dict]:
    kinds = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return [{"role": "user", "content": kinds}]


def _from_processor(
    processor: Processor, config: ModelConfig, *, length: int, random: np.random.Generator
) -> dict[str, Batch]:
    def tokens_of(repeats: int) -> int:
        example = processor.encode(_user(_SENTENCE * repeats), add_generation_prompt=True)
        return len(example.tokens)

    per_sentence = tokens_of(2) - tokens_of(1)
    repeats = max(1, -(-(length - tokens_of(1)) // per_sentence) + 1)
    prompts = [_user(_SENTENCE * repeats), _user("Why?")]
    batches = {"text": processor(prompts, add_generation_prompt=True)}
    if config.has_vision:
        pictures = [
            Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8))
            for shape in _PICTURES
        ]
        prompts = [_user(pictures[0], "Or", pictures[1], "Which?"), _user("Neither.")]
        batches["image"] = processor(prompts, add_generation_prompt=True)
    return batches


def _random(config: ModelConfig, *, length: int, random: np.random.Generator) -> dict[str, Batch]:
    media = (config.image_token_id, config.video_token_id, config.audio_token_id)
    bounds = (config.boi_token_id, config.eoi_token_id)
    special = {*media, *bounds, config.pad_token_id}
    words = np.array([word for word in range(config.vocab_size) if word not in special], np.int32)

    def draw(count):
        return [config.bos_token_id, *random.choice(words, count - 1)]

    batches = {"text": _left_padded(config, [draw(length), draw(8)], None)}
    if config.has_vision:
        kernel = config.tower.pooling_kernel_size
        grids = [(2 * kernel, 3 * kernel), (5 * kernel, kernel)]
        row = draw(3)
        for height, width in grids:
            soft = [config.image_token_id] * (height * width // kernel**2)
            row += [config.boi_token_id, *soft, config.eoi_token_id, *draw(4)[1:]]
        images = np.zeros((2, 2, 6 * kernel**2, config.tower.patch_dim + 2), np.float32)
        images[..., -2:] = -1
        for slot, (height, width) in enumerate(grids):
            count = height * width
            y, x = np.mgrid[:height, :width]
            images[0, slot, :count, :-2] = random.random((count, images.shape[-1] - 2))
            images[0, slot, :count, -2:] = np.stack([x.ravel(), y.ravel()], axis=-1)
        batches["image"] = _left_padded(config, [row, draw(5)], images)
    return batches


def _left_padded(config: ModelConfig, rows: list[list[int]], images: np.ndarray | None) -> Batch:
    length = max(map(len, rows))
    tokens = np.full((len(rows), length), config.pad_token_id, np.int32)
    mask = np.zeros_like(tokens)
    for index, row in enumerate(rows):
        tokens[index, -len(row) :] = row
        mask[index, -len(row) :] = 1
    return Batch(tokens=tokens, loss_mask=np.zeros_like(mask), padding_mask=mask, images=images)


# ---- Transformers.


def _run_transformers(
    directory: Path, config: ModelConfig, batches: dict[str, Batch]
) -> tuple[dict[str, Values], dict[str, dict[str, float]]]:
    """Values and noise floor by case and row."""
    import transformers

    torch = import_module("torch")  # Only the extra `parity` has it.
    unified = "Unified" if config.model_type == "gemma4_unified" else ""
    model_class = getattr(transformers, f"Gemma4{unified}ForConditionalGeneration")
    # "eager" takes the prepared masks as they are.
    model = model_class.from_pretrained(
        directory, dtype=getattr(torch, config.dtype.name), attn_implementation="eager", **NO_CODE
    ).eval()
    noise = {}
    with torch.no_grad():
        values = {c: _run_hooked(torch, model, config, batch) for c, batch in batches.items()}
        _perturb(torch, model)
        for case, batch in batches.items():
            moved = _run_hooked(torch, model, config, batch)
            noise[case] = {
                name: float(np.abs(moved[name] - value).max())
                for name, value in values[case].items()
            }
    del model
    gc.collect()
    return values, noise


def _run_hooked(torch: Any, model: Any, config: ModelConfig, batch: Batch) -> Values:
    """What passes the named modules of transformers' model when it runs on `batch`."""
    values = {}
    real = batch.padding_mask.astype(bool)
    core = model.model
    text = core.language_model
    modules = {"embeddings": text.embed_tokens} if batch.images is None else {}
    modules |= {f"layer {index}": layer for index, layer in enumerate(text.layers[:-1])}
    modules["final norm"] = text.norm
    if batch.images is not None:
        modules |= {"vision tower": core.vision_tower, "soft tokens": core.embed_vision}

    def hook(name: str) -> Callable:
        def record(module, arguments, output):
            if name == "vision tower":
                output = output.last_hidden_state
            array = output.float().numpy()
            values[name] = array[real] if array.ndim == 3 else array

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    # Told so by `logits_to_keep`, transformers from 5.13 on cuts the last layers of E2B short too.
    cut = model.lm_head.register_forward_pre_hook(lambda _, given: (given[0][:, -_LAST:],))
    handles.append(cut)
    logits = model(**_arguments(torch, config, batch)).logits
    values["logits"] = logits.float().numpy()[real[:, -_LAST:]]
    for handle in handles:
        handle.remove()
    return values


def _arguments(torch: Any, config: ModelConfig, batch: Batch) -> dict[str, Any]:
    """What transformers' model is called with."""
    arguments = {
        "input_ids": torch.from_numpy(batch.tokens).long(),
        "attention_mask": torch.from_numpy(batch.padding_mask),
        "position_ids": torch.from_numpy(_positions(batch)).long(),
        "use_cache": False,
    }
    if batch.images is not None:
        images = torch.from_numpy(batch.images[_used(batch)])
        arguments["pixel_values"] = images[..., :-2]
        arguments["image_position_ids"] = images[..., -2:].long()
        if config.image_blocks_attend_both_ways:
            # Transformers 5.12 lets full layers look both ways too, and does not clip by the
            # window; 5.24 clips the past alone. This package does as the authors' own code.
            arguments["attention_mask"] = _masks(torch, config, batch)
    return arguments


def _masks(torch: Any, config: ModelConfig, batch: Batch) -> dict[str, Any]:
    tokens = jnp.asarray(batch.tokens)
    slots = np.arange(tokens.shape[1])
    visible = (slots[:, None] >= slots[None, :])[None] & batch.padding_mask.astype(bool)[:, None, :]
    whole = (0, tokens.shape[1])
    masks = {
        kind: mask.block(whole, whole)
        for kind, mask in attention_masks(config, tokens, jnp.asarray(visible)).items()
    }
    dtype = getattr(torch, config.dtype.name)
    lowest = torch.finfo(dtype).min
    return {
        f"{kind}_attention": torch.where(torch.from_numpy(np.array(mask))[:, None], 0.0, lowest).to(
            dtype
        )
        for kind, mask in masks.items()
    }


def _perturb(torch: Any, model: Any) -> None:
    """Moves every weight by a random relative amount of about one unit in its last place."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = torch.finfo(parameter.dtype).eps
        for part in parameter.view(-1).split(_CHUNK):
            move = torch.randn(part.shape, generator=generator) * scale
            part.mul_((1 + move).to(part.dtype) if scale > 1e-6 else 1 + move)


# ---- Ours.


def _positions(batch: Batch) -> np.ndarray:
    return np.maximum(np.cumsum(batch.padding_mask, axis=1) - 1, 0)


def _used(batch: Batch) -> np.ndarray:
    """Which image slots of a batch with images hold one, bool [B, I]."""
    return np.any(np.asarray(batch.images)[..., -1] >= 0, axis=-1)


def _forward(
    model: Gemma4ForConditionalGeneration, tokens, positions, mask, images
) -> dict[str, jax.Array]:
    """Activations by row; logits of the last tokens."""
    rows = {}
    if images is None:
        rows["embeddings"] = model.language_model.embed(tokens)
    else:
        flat = images.reshape(-1, *images.shape[2:])
        soft, rows["valid"] = model.vision_tower(flat)
        rows |= {"vision tower": soft, "soft tokens": model.embed_vision(soft)}
    run: Any = nnx.capture(model, nnx.Intermediate)
    (hidden, _), states = run(
        tokens,
        positions,
        attention_mask=model.get_attention_mask(tokens, inputs_mask=mask),
        images=images,
        skip_lm_head=True,
        output_hidden_states=True,
    )
    layers = states["all_hidden_states"].get_value()
    rows |= {f"layer {index}": layer for index, layer in enumerate(layers[:-1])}
    return rows | {
        "final norm": hidden,
        "logits": model.compute_final_logits(hidden[:, -_LAST:]),
    }


def _run_ours(model: Gemma4ForConditionalGeneration, batch: Batch) -> Values:
    """The same of our model."""
    graph, state = nnx.split(model)
    real = batch.padding_mask.astype(bool)
    inputs = [batch.tokens, _positions(batch), batch.padding_mask, batch.images]
    # Accelerators multiply float32 matrices with fewer digits unless told otherwise.
    with jax.default_matmul_precision("highest"):
        rows = jax.jit(lambda state, *inputs: _forward(nnx.merge(graph, state), *inputs))(
            state, *(None if array is None else jnp.asarray(array) for array in inputs)
        )
    # Of each row, where its values are real. A compiled function sorts them by name.
    kept = dict.fromkeys(("vision tower", "soft tokens"), rows.get("valid"))
    kept |= dict.fromkeys(["embeddings", *(f"layer {n}" for n in range(len(rows)))], real)
    kept |= {"final norm": real, "logits": real[:, -_LAST:]}
    return {
        name: np.asarray(rows[name], np.float32)[np.asarray(where)]
        for name, where in kept.items()
        if name in rows
    }


def _print_table(rows: list[Row]) -> None:
    layout = "{:6} {:14} {:>11} {:>10} {:>10} {:>10}  {}"
    print(layout.format("case", "row", "difference", "relative", "noise", "tolerance", ""))
    for row in rows:
        figures = (row.difference, row.difference / (row.largest or 1.0), row.noise, row.tolerance)
        numbers = (f"{figure:.2e}" for figure in figures)
        print(layout.format(row.case, row.name, *numbers, "pass" if row.passed else "FAIL"))
