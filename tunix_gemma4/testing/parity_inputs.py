# SPDX-License-Identifier: Apache-2.0
"""What the parity command feeds both libraries: text past the window, and pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ..config import ModelConfig
from ..data.processor import Batch, Processor

# The smallest budget: enough for every operation of the tower.
_SOFT_TOKENS = 70
_SENTENCE = "The quick brown fox jumps over 13 lazy dogs, and nobody asks why. "
_PICTURES = ((40, 64), (96, 31))


def make_inputs(
    directory: Path, config: ModelConfig, *, length: int | None, seed: int
) -> tuple[dict[str, Batch], str]:
    """Batches by case, "text" and where `config` has vision "image", left-padded.

    Each holds a long row and a short one. The long row of text exceeds the sliding window.

    Args:
        directory: whose tokenizer and chat template make the tokens; without them they are random.
        config: of the model.
        length: tokens of the long row of text, about; None: past the window.
        seed: of random tokens and pixels.

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
        kernel = config.vision_config.pooling_kernel_size
        grids = [(2 * kernel, 3 * kernel), (5 * kernel, kernel)]
        row = draw(3)
        for height, width in grids:
            soft = [config.image_token_id] * (height * width // kernel**2)
            row += [config.boi_token_id, *soft, config.eoi_token_id, *draw(4)[1:]]
        images = np.zeros((2, 2, 6 * kernel**2, config.vision_config.patch_dim + 2), np.float32)
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
