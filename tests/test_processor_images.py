# SPDX-License-Identifier: Apache-2.0
"""Images of every form become RGB, and RGB images become patches."""

import base64
import io
import json
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from tunix_gemma4.config.parts import VisionConfig
from tunix_gemma4.data.images import ImagePacker, soft_tokens_of, to_rgb

VISION = VisionConfig(patch_size=4, pooling_kernel_size=2, position_embedding_size=160)


@pytest.fixture(scope="module")
def packer():
    return ImagePacker(VISION, 70)


def picture(height=12, width=20, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def moving(*arrays):
    buffer = io.BytesIO()
    first, *others = map(Image.fromarray, arrays)
    first.save(buffer, "gif", save_all=True, append_images=others)
    return buffer.getvalue()


def base64_of(array):
    return base64.b64encode(png(array)).decode()


FORMS = {
    "pil": lambda array, path: Image.fromarray(array),
    "array": lambda array, path: array,
    "floats": lambda array, path: array.astype(np.float32) / 255,
    "bytes": lambda array, path: png(array),
    "path": lambda array, path: path,
    "string": lambda array, path: str(path),
    "file_url": lambda array, path: f"file://{path}",
    "datasets_bytes": lambda array, path: {"bytes": png(array), "path": None},
    "data_url": lambda array, path: f"data:image/png;base64,{base64_of(array)}",
    "data_url_in_lines": lambda array, path: (
        "data:image/png;base64," + base64.encodebytes(png(array)).decode()
    ),
    "data_url_in_capitals": lambda array, path: f"DATA:image/png;BASE64,{base64_of(array)}",
    "data_url_in_percents": lambda array, path: "data:image/png," + quote(png(array)),
    "base64": lambda array, path: base64_of(array),
    "base64_in_lines": lambda array, path: base64.encodebytes(png(array)).decode(),
    "datasets_path": lambda array, path: {"bytes": None, "path": str(path)},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_an_image_gives_the_same_pixels(tmp_path, form):
    array, path = picture(), tmp_path / "picture.png"
    path.write_bytes(png(array))
    image = to_rgb(form(array, path))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), array)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1)], ids=["two_axes", "one_channel"])
def test_grey_arrays_become_three_equal_channels(shape):
    grey = picture(6, 5)[..., 0].reshape(shape)
    image = np.asarray(to_rgb(grey))
    np.testing.assert_array_equal(image, np.repeat(grey.reshape(6, 5, 1), 3, axis=2))


def transparent(mode):
    """Black ink on a transparent ground, in a mode that can say so."""
    grey = Image.new("L", (8, 8))
    ground = Image.fromarray(np.uint8(np.arange(64).reshape(8, 8) % 3 != 0) * 255)
    if mode == "P":
        image = ground.convert("P")
        image.putpalette([0, 0, 0] * 255 + [0, 0, 0])
        image.info["transparency"] = 0
        return image
    image = Image.merge("LA", (grey, ground))
    return image if mode == "LA" else image.convert("RGBA")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode):
    ink = np.arange(64).reshape(8, 8) % 3 != 0
    image = transparent(mode)
    expected = np.repeat(np.where(ink, 0, 255)[..., None], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), expected)
    assert not np.asarray(to_rgb(image, transformers_alpha=True)).any()
    half = np.full((2, 2, 4), [0, 0, 0, 128], np.uint8)
    assert (np.asarray(to_rgb(half)) == 127).all()


def test_photograph_is_turned_upright_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # Turned by a quarter.
    Image.fromarray(picture(12, 20)).save(tmp_path / "turned.png", exif=exif)
    assert to_rgb(tmp_path / "turned.png").size == (12, 20)


REFUSED = {
    "channel_first": (picture().transpose(2, 0, 1), r"channels first.*transpose\(1, 2, 0\)"),
    "two_channels": (np.zeros((5, 6, 2), np.uint8), r"expected an array of shape .*\(5, 6, 2\)"),
    "batch": (np.zeros((1, 4, 4, 3), np.uint8), r"expected an array of shape .*\(1, 4, 4, 3\)"),
    "floats_to_255": (picture().astype(np.float32), r"floats in \[0, 1\], found \d+ to 25\d"),
    "negative": (-np.ones((4, 4)), r"floats in \[0, 1\], found -1 to -1"),
    "nan": (np.full((4, 4), np.nan), r"floats in \[0, 1\], found nan"),
    "int64": (picture().astype(np.int64), "found int64"),
    "bool": (np.ones((4, 4), bool), "found bool"),
    "no_rows": (np.zeros((0, 4, 3), np.uint8), r"no pixels: shape \(0, 4, 3\)"),
    "sixteen_bits": (Image.new("I;16", (4, 4)), "'I;16' has more than 8 bits"),
    "object": (object(), "found object"),
    "nothing": (None, "found NoneType"),
    "address": ("https://example.org/cat.png", "is an address; only files are read"),
    "data_without_image": ("data:image/png;base64,AAAA", "'data:image/png;base64,AAAA'... cannot"),
    "data_broken": ("data:image/png;base64,A", "is no base64"),
    "data_empty": ("data:image/png", "expected data:TYPE;base64,CONTENT"),
    "no_file": ("no/such/file.png", "there is no file 'no/such/file.png'"),
    "no_image": (b"plain text", "the given bytes cannot be decoded as an image"),
    "moving": (moving(picture(), picture(seed=1)), "the given bytes: 2 frames"),
    "truncated": (png(picture(64, 64))[:500], "cannot be decoded as an image"),
}


@pytest.mark.parametrize(("value", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(value, message):
    with pytest.raises(ValueError, match=message):
        to_rgb(value)


def test_a_long_string_that_is_no_image_is_not_repeated():
    for value in ("A" * 5000, "x/" * 5000, "data:" + "y" * 5000):
        with pytest.raises(ValueError) as error:
            to_rgb(value)
        assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("files", "given", "budget"),
    [
        ({}, None, 280),
        ({}, 70, 70),
        ({"processor_config.json": {"image_processor": {"max_soft_tokens": 560}}}, None, 560),
        ({"preprocessor_config.json": {"max_soft_tokens": 1120}}, None, 1120),
        ({"processor_config.json": {}, "preprocessor_config.json": {}}, None, 280),
        ({"processor_config.json": {"image_processor": {"max_soft_tokens": 560}}}, 140, 140),
    ],
)
def test_budget_is_the_given_one_or_the_directorys(tmp_path, files, given, budget):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert soft_tokens_of(tmp_path, given) == budget


def test_a_directorys_budget_that_no_model_has_is_named(tmp_path):
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"max_soft_tokens": 99}}')
    with pytest.raises(ValueError, match=r"processor_config.json: max_soft_tokens is 99, expected"):
        soft_tokens_of(tmp_path)


def test_patches_are_rows_of_pixels_with_their_place_behind(packer):
    # 64 x 64 is what the budget gives a square, so that nothing is resized.
    array = picture(64, 64)
    packed, count = packer.pack(array)
    assert packed.shape == (280, 50)
    assert packed.dtype == np.float32
    assert count == 64
    for x, y in ((0, 0), (5, 0), (3, 11)):
        expected = array[4 * y : 4 * y + 4, 4 * x : 4 * x + 4].reshape(-1) / np.float32(255)
        np.testing.assert_array_equal(packed[16 * y + x, :-2], expected.astype(np.float32))
        np.testing.assert_array_equal(packed[16 * y + x, -2:], [x, y])


def test_padding_is_zero_pixels_at_minus_one(packer):
    packed, count = packer.pack(picture(64, 64))
    np.testing.assert_array_equal(packed[4 * count :], packer.empty()[4 * count :])
    np.testing.assert_array_equal(packer.empty(2)[1, 0], [0.0] * 48 + [-1.0, -1.0])


@pytest.mark.parametrize(
    ("height", "width", "budget", "count"),
    [
        (1024, 1024, 70, 64),
        (480, 640, 70, 63),
        (1080, 1920, 70, 66),
        (480, 640, 280, 266),
        (1080, 1920, 1120, 1100),
    ],
)
def test_soft_tokens_are_those_of_the_released_models(height, width, budget, count):
    packed, found = ImagePacker(VisionConfig(), budget).pack(np.zeros((height, width), np.uint8))
    assert found == count
    assert (packed[:, -1] >= 0).sum() == 9 * count


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (70, 1), (3, 4)])
def test_smallest_images_fit(packer, size):
    _, count = packer.pack(np.zeros(size, np.uint8))
    assert 1 <= count <= 70


@pytest.mark.parametrize("size", [(1, 71), (142, 2)])
def test_image_too_long_for_the_budget_is_refused(packer, size):
    with pytest.raises(ValueError, match="one side is more than 70 times the other"):
        packer.pack(np.zeros(size, np.uint8))


def test_image_longer_than_the_position_table_is_refused():
    vision = VisionConfig(patch_size=4, pooling_kernel_size=2, position_embedding_size=100)
    with pytest.raises(ValueError, match="140 patches along one side.*position_embedding_size=100"):
        ImagePacker(vision, 70).pack(np.zeros((1, 70), np.uint8))


def test_budget_that_transformers_lacks_is_refused():
    with pytest.raises(ValueError, match=r"expected one of \(70, .*, found 64"):
        ImagePacker(VISION, 64)
