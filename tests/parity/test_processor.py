# SPDX-License-Identifier: Apache-2.0
"""Prompts, pixels and tiny directories against transformers' own classes."""

import sys

import numpy as np
import pytest
import torch
import transformers.models.gemma4.image_processing_pil_gemma4 as pil_backend
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoTokenizer, Gemma4Config
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor

from tunix_gemma4.data.processor import Processor
from tunix_gemma4.testing.tiny import PRESETS, build_tiny_checkpoint

pytestmark = pytest.mark.parity

AUDIO = [("e2b", True), ("e4b", True)]
SIZES = [(64, 64), (30, 50), (200, 77), (9, 300), (1, 1)]


@pytest.fixture(scope="module")
def hf_class():
    """transformers' processor class, with its PIL images and without its videos.

    The class is imported through a module that needs torchvision, and insists on a video
    processor, which needs it too.
    """
    patch = pytest.MonkeyPatch()
    name = "transformers.models.gemma4.image_processing_gemma4"
    if name not in sys.modules:
        patch.setitem(sys.modules, name, pil_backend)
    from transformers import Gemma4Processor

    patch.setattr(Gemma4Processor, "check_argument_for_proper_class", lambda *arguments: None)
    yield Gemma4Processor
    patch.undo()


@pytest.fixture(scope="module", params=["e2b", "31b", "demo"])
def pair(request, tiny_checkpoint, hf_class):
    """Our processor of a directory and transformers' own."""
    directory = tiny_checkpoint(request.param)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    images = pil_backend.Gemma4ImageProcessorPil.from_pretrained(directory)
    theirs = hf_class(
        Gemma4AudioFeatureExtractor(),
        images,
        tokenizer,
        None,
        chat_template=tokenizer.chat_template,
    )
    return Processor.from_pretrained(directory, 70), theirs


def picture(size, seed):
    array = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(array)


def conversation(*sizes):
    images = [{"type": "image", "image": picture(size, seed)} for seed, size in enumerate(sizes, 1)]
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*images[:1], {"type": "text", "text": " What is this? "}]},
        {"role": "assistant", "content": "A cat.\n\nA small one: 🐈"},
        {"role": "user", "content": [{"type": "text", "text": "And\n\nthese?"}, *images[1:]]},
    ]


def theirs_of(processor, messages):
    return processor.apply_chat_template(
        messages,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="np",
    )


@pytest.mark.parametrize("sizes", [SIZES[:1], SIZES[:2], SIZES], ids=["one", "two", "five"])
def test_prompt_and_pixels_are_those_of_transformers(pair, sizes):
    ours, theirs = pair
    messages = conversation(*sizes)
    expected = theirs_of(theirs, messages)
    batch = ours([messages], add_generation_prompt=True, token_type_ids=True)
    np.testing.assert_array_equal(batch.tokens, expected["input_ids"])
    np.testing.assert_array_equal(batch.token_type_ids, expected["mm_token_type_ids"])
    images = batch.images[0, : len(sizes)]
    np.testing.assert_array_equal(images[..., :-2], expected["pixel_values"])
    np.testing.assert_array_equal(images[..., -2:], expected["image_position_ids"])


def test_left_padded_batch_is_that_of_transformers(pair):
    ours, theirs = pair
    rows = [conversation(*SIZES[:2]), conversation(*SIZES[2:4])]
    expected = theirs.apply_chat_template(
        rows,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="np",
        processor_kwargs={"padding": True},
    )
    batch = ours(rows, add_generation_prompt=True)
    np.testing.assert_array_equal(batch.tokens, expected["input_ids"])
    np.testing.assert_array_equal(batch.padding_mask, expected["attention_mask"])
    pixels = batch.images[..., :-2].reshape(4, *batch.images.shape[2:-1], -1)
    np.testing.assert_array_equal(pixels, expected["pixel_values"])


def test_trained_conversation_is_that_of_transformers_but_for_the_empty_thoughts(pair):
    ours, theirs = pair
    messages = [*conversation(*SIZES[:2]), {"role": "assistant", "content": " Two cats. "}]
    expected = theirs.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="np"
    )
    tokens = ours([messages]).tokens[0].tolist()
    thought = ours.tokenizer.encode("<|channel>thought\n<channel|>", add_special_tokens=False)
    starts = [i for i in range(len(tokens)) if tokens[i : i + len(thought)] == thought]
    assert len(starts) == (2 if ours.chat.prefix else 0)
    for start in reversed(starts):
        del tokens[start : start + len(thought)]
    assert tokens == expected["input_ids"][0].tolist()


def test_tools_and_their_calls_are_those_of_transformers(pair):
    ours, theirs = pair
    function = {"name": "lookup", "description": "", "parameters": {"type": "object"}}
    call = {"type": "function", "function": {"name": "lookup", "arguments": {"x": [1, "a"]}}}
    messages = [
        {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "lookup", "content": "a cat"},
    ]
    tools = [{"type": "function", "function": function}]
    expected = theirs.tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, return_dict=True
    )
    batch = ours([{"messages": messages, "tools": tools}], add_generation_prompt=True)
    assert batch.tokens[0].tolist() == expected["input_ids"]


def test_transparency_can_be_dropped_as_transformers_does(tiny_dir):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 4), dtype=np.uint8)
    images = pil_backend.Gemma4ImageProcessorPil.from_pretrained(tiny_dir)
    drawn = Image.fromarray(pixels, "RGBA")
    theirs, expected = (
        images([image], return_tensors="np")["pixel_values"]
        for image in (drawn, drawn.convert("RGB"))
    )
    row = [{"role": "user", "content": [{"type": "image", "image": pixels}]}]
    ours = Processor.from_pretrained(tiny_dir, transformers_alpha=True)
    found = ours([row], add_generation_prompt=True).images[0, ..., :-2]
    np.testing.assert_array_equal(found, expected)
    batch = Processor.from_pretrained(tiny_dir)([row], add_generation_prompt=True)
    white = batch.images[0, ..., :-2]
    assert not np.array_equal(white, expected)
    # 5.12 drops it; 5.24 lays the image on white, too.
    assert np.array_equal(theirs, expected) or np.array_equal(theirs, white)


@pytest.mark.parametrize("budget", [70, 280, 1120])
@pytest.mark.parametrize("size", [(480, 640), (1080, 1920), (17, 1000), (7, 5)])
def test_released_patches_are_those_of_transformers(budget, size):
    from tunix_gemma4.config.parts import VisionConfig
    from tunix_gemma4.data.images import ImagePacker

    image = picture(size, 0)
    expected = pil_backend.Gemma4ImageProcessorPil(max_soft_tokens=budget)(
        [image], return_tensors="np"
    )
    packed, count = ImagePacker(VisionConfig(), budget).pack(image)
    np.testing.assert_array_equal(packed[:, :-2], expected["pixel_values"][0])
    np.testing.assert_array_equal(packed[:, -2:], expected["image_position_ids"][0])
    assert count == expected["num_soft_tokens_per_image"][0]


@pytest.mark.parametrize(("preset", "audio"), [*((name, False) for name in PRESETS), *AUDIO])
def test_transformers_loads_every_tensor_of_a_tiny_directory(tmp_path, preset, audio):
    directory = build_tiny_checkpoint(tmp_path, preset=preset, audio=audio)
    model, report = AutoModelForMultimodalLM.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    assert model.generation_config.eos_token_id == [1, 9, 14]
    tokens = torch.arange(2, 40)[None]
    assert torch.isfinite(model(input_ids=tokens).logits).all()


def test_tiny_config_survives_transformers_unchanged(tiny_dir):
    config = Gemma4Config.from_pretrained(tiny_dir)
    again = Gemma4Config(**config.to_dict())
    assert config.to_dict() == again.to_dict()
    assert config.image_token_id == AutoTokenizer.from_pretrained(tiny_dir).image_token_id
