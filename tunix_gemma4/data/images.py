# SPDX-License-Identifier: Apache-2.0
"""Images as users have them, made RGB, resized to a budget of soft tokens and cut into patches."""

from __future__ import annotations

import base64
import binascii
import io
import re
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps

from ..config.parts import VisionConfig
from ..config.source import read_json
from .keys import image_in

SOFT_TOKEN_BUDGETS = (70, 140, 280, 560, 1120)
_DEFAULT_BUDGET = 280
# Shorter strings without a dot are taken as names of files.
_LEAST_BASE64 = 64
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*")

# Modes whose conversion to RGB cuts values off instead of scaling them.
_WIDE_MODES = ("I", "F")
_CHANNELS = (1, 3, 4)


def soft_tokens_of(directory: str | Path, given: int | None = None) -> int:
    """The budget of an image: the one given, or a checkpoint directory's own, or 280.

    Raises:
        ValueError: if it is none that the models were trained with.
    """
    if given is not None:
        return _budget(given)
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = Path(directory) / name
        if not path.is_file():
            continue
        config = read_json(path)
        config = config.get("image_processor", config)
        config = {} if config is None else config
        if not isinstance(config, dict):
            raise ValueError(
                f"{path}: image_processor: expected a JSON object, found {type(config).__name__}"
            )
        found = config.get("max_soft_tokens")
        if found is None:
            continue
        if found not in SOFT_TOKEN_BUDGETS:
            raise ValueError(
                f"{path}: max_soft_tokens is {found!r:.80}, expected one of {SOFT_TOKEN_BUDGETS}; "
                "set max_soft_tokens to one of them"
            )
        return found
    return _DEFAULT_BUDGET


def _budget(given: int) -> int:
    if given not in SOFT_TOKEN_BUDGETS:
        raise ValueError(
            f"max_soft_tokens: expected one of {SOFT_TOKEN_BUDGETS}, found {given!r:.80}"
        )
    return given


def is_path(value: str) -> bool:
    """Whether a string names a file: it is no address and no encoded image."""
    return "://" not in value and not _is_data_url(value) and _from_base64(value) is None


def _is_data_url(value: str) -> bool:
    return value[:5].lower() == "data:"


def _from_base64(value: str) -> bytes | None:
    """The bytes that a string encodes; None: it is no base64 of an image."""
    if len(value) < _LEAST_BASE64 or not _BASE64.fullmatch(value):
        return None
    try:
        content = _decoded(value)
        Image.open(io.BytesIO(content))
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return content


def _decoded(text: str) -> bytes:
    """Of base64, also in lines, without padding or in the alphabet of addresses."""
    text = re.sub(r"\s", "", text).translate(str.maketrans("-_", "+/")).rstrip("=")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _from_data_url(value: str) -> bytes:
    """The bytes of `data:image/png;base64,...`."""
    head, comma, body = value.partition(",")
    try:
        if comma and head.lower().endswith(";base64"):
            return _decoded(urllib.parse.unquote(body))
        if comma:
            return urllib.parse.unquote_to_bytes(body)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{value[:40]!r}... is no base64 ({error})") from error
    raise ValueError(f"{value[:40]!r}: expected data:TYPE;base64,CONTENT")


def to_rgb(value: Any, *, transformers_alpha: bool = False) -> Image.Image:
    """An RGB image from a PIL image, path, encoded bytes, array or an object that holds one.

    Arrays are [height, width] (grey) or [height, width, channels], uint8 or floats in [0, 1].
    Strings may also be `data:` URLs or base64.

    Args:
        value: the image.
        transformers_alpha: drop transparency; otherwise what is transparent becomes white, as
            where models are served.
    """
    value = image_in(value)
    if isinstance(value, str | Path | bytes | bytearray | memoryview | Image.Image):
        image = _decode(value)
    else:
        image = _from_array(value)
    if image.mode.split(";")[0] in _WIDE_MODES:
        raise ValueError(
            f"its mode {image.mode!r} has more than 8 bits a channel, which RGB would cut off; "
            "scale it to 8 bits first"
        )
    if image.has_transparency_data and not transformers_alpha:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _decode(value: Any) -> Image.Image:
    """Reads, decodes and turns upright."""
    name = "a PIL image" if isinstance(value, Image.Image) else "the given bytes"
    if isinstance(value, str | Path):
        name, value = _opened(str(value))
    elif not isinstance(value, Image.Image):
        value = io.BytesIO(value)
    try:
        image = value if isinstance(value, Image.Image) else Image.open(value)
        if 0 in image.size:
            raise ValueError(f"it has no pixels: width {image.width}, height {image.height}")
        # A photograph in MPO has a preview, or its other eye, behind it.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames > 1:
            raise ValueError(f"{name}: {frames} frames; give the one that is meant as an image")
        return ImageOps.exif_transpose(image)
    except (EOFError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be decoded as an image ({error})") from error


def _opened(value: str) -> tuple[str, Any]:
    """What errors call an image that is given as a string, and where its bytes are."""
    if _is_data_url(value):
        return f"{value[:40]!r}...", io.BytesIO(_from_data_url(value))
    name = value.removeprefix("file://")
    if "://" in name:
        raise ValueError(
            f"{name[:80]!r} is an address; only files are read: download it and give its path"
        )
    try:
        if Path(name).is_file():
            return name, name
    except (OSError, ValueError):
        pass  # Too long for a name, or not one at all.
    content = _from_base64(value)
    if content is None:
        shown = name if len(name) <= 255 else f"{name[:80]}... ({len(name)} characters)"
        raise ValueError(f"there is no file {shown!r} (current folder: {Path.cwd()})")
    return f"{value[:40]!r}...", io.BytesIO(content)


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

    def __init__(
        self, vision: VisionConfig, max_soft_tokens: int, *, transformers_alpha: bool = False
    ):
        # transformers offers the name at its top level only where torchvision is missing.
        from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

        self.vision, self.max_soft_tokens = vision, _budget(max_soft_tokens)
        self._transformers_alpha = transformers_alpha
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
        image = to_rgb(value, transformers_alpha=self._transformers_alpha)
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
