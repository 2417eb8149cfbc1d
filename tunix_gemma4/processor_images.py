# SPDX-License-Identifier: Apache-2.0
"""Images as users have them, made RGB, resized to a budget of soft tokens and cut into patches."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps

from .config_parts import VisionConfig

SOFT_TOKEN_BUDGETS = (70, 140, 280, 560, 1120)

# Modes whose conversion to RGB cuts values off instead of scaling them.
_WIDE_MODES = ("I", "F")
_CHANNELS = (1, 3, 4)


def to_rgb(value: Any) -> Image.Image:
    """An RGB image from a PIL image, path, encoded bytes, `{"bytes", "path"}` or array.

    Arrays are [height, width] (grey) or [height, width, channels], uint8 or floats in [0, 1].
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str | Path | bytes | bytearray | memoryview | Image.Image):
        image = _decode(value)
    else:
        image = _from_array(value)
    if image.mode.split(";")[0] in _WIDE_MODES:
        raise ValueError(
            f"its mode {image.mode!r} has more than 8 bits a channel, which RGB would cut off; "
            "scale it to 8 bits first"
        )
    return image.convert("RGB")


def _decode(value: Any) -> Image.Image:
    """Reads, decodes and turns upright."""
    name = "a PIL image" if isinstance(value, Image.Image) else "the given bytes"
    if isinstance(value, str | Path):
        name = str(value).removeprefix("file://")
        if "://" in name or name.startswith("data:"):
            raise ValueError(
                f"{name[:80]!r} is an address; only files are read: download it and give its path"
            )
        if not Path(name).is_file():
            raise ValueError(f"there is no file {name!r} (current folder: {Path.cwd()})")
        value = name
    elif not isinstance(value, Image.Image):
        value = io.BytesIO(value)
    try:
        image = value if isinstance(value, Image.Image) else Image.open(value)
        if 0 in image.size:
            raise ValueError(f"it has no pixels: width {image.width}, height {image.height}")
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be decoded as an image ({error})") from error


def _from_array(value: Any) -> Image.Image:
    array = np.asarray(value)
    if array.dtype == object or array.ndim == 0:
        raise ValueError(
            f"expected a PIL image, a path, encoded bytes or an array, found {type(value).__name__}"
        )
    if 0 in array.shape:
        raise ValueError(f"it has no pixels: shape {array.shape}")
    if array.ndim == 3 and array.shape[0] in _CHANNELS and array.shape[2] not in _CHANNELS:
        raise ValueError(
            f"shape {array.shape} has its channels first; expected [height, width, channels]: "
            "use array.transpose(1, 2, 0)"
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in _CHANNELS):
        raise ValueError(
            f"expected an array of shape [height, width] or [height, width, 1, 3 or 4], "
            f"found {array.shape}"
        )
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        # Written so that NaN fails too.
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(
                f"expected floats in [0, 1], found {low:g} to {high:g}; scale them, or give uint8"
            )
        array = np.rint(array * 255.0).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"expected uint8 or floats in [0, 1], found {array.dtype}; convert it")
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


class ImagePacker:
    """Resizes one image and cuts it into the patches that the vision tower takes.

    The pixels are those of transformers' torch-free `Gemma4ImageProcessorPil`.
    Checked: tests/parity/test_processor.py, bit for bit.
    """

    def __init__(self, vision: VisionConfig, max_soft_tokens: int):
        if max_soft_tokens not in SOFT_TOKEN_BUDGETS:
            raise ValueError(
                f"max_soft_tokens: expected one of {SOFT_TOKEN_BUDGETS}, found {max_soft_tokens}"
            )
        # transformers offers the name at its top level only where torchvision is missing.
        from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

        self.vision, self.max_soft_tokens = vision, max_soft_tokens
        self.num_patches = vision.pooling_kernel_size**2 * max_soft_tokens
        self._processor = Gemma4ImageProcessorPil(
            patch_size=vision.patch_size,
            pooling_kernel_size=vision.pooling_kernel_size,
            max_soft_tokens=max_soft_tokens,
        )

    def empty(self, *leading: int) -> Float[np.ndarray, "*leading M C"]:
        """Padding: pixels 0, positions (-1, -1)."""
        result = np.zeros((*leading, self.num_patches, self.vision.patch_dim + 2), np.float32)
        result[..., -2:] = -1.0
        return result

    def pack(self, value: Any) -> tuple[Float[np.ndarray, "M C"], int]:
        """Patches with their (x, y) behind them, and how many soft tokens they become.

        C is `3 * patch_size ** 2 + 2`; pixel values lie in [0, 1].
        """
        image = to_rgb(value)
        short, long = sorted(image.size)
        if long // short > self.max_soft_tokens:
            raise ValueError(
                f"it is {image.width} pixels wide and {image.height} high: one side is more than "
                f"{self.max_soft_tokens} times the other, so max_soft_tokens="
                f"{self.max_soft_tokens} cannot hold its shape; crop it or raise max_soft_tokens"
            )
        output = self._processor(images=[image], return_tensors="np")
        positions = output["image_position_ids"][0]
        if positions.max() >= self.vision.position_embedding_size:
            raise ValueError(
                f"it is cut into {positions.max() + 1} patches along one side, and the model has "
                f"position_embedding_size={self.vision.position_embedding_size}; crop it or "
                "lower max_soft_tokens"
            )
        packed = np.concatenate([output["pixel_values"][0], positions], axis=-1, dtype=np.float32)
        return packed, int(output["num_soft_tokens_per_image"][0])
