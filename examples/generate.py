# SPDX-License-Identifier: Apache-2.0
"""Asks a Gemma 4 checkpoint about images, or about nothing but the words.

    python examples/generate.py --model=/path/to/gemma-4-E2B-it --image=cat.jpg \\
        --prompt="What is this?"

Several questions are answered as one batch. The k-th --image belongs to the k-th --prompt; with
one prompt, all images do. Without --temperature the likeliest token is taken each time.
"""

from __future__ import annotations

from absl import app, flags

import tunix_gemma4 as g4

_MODEL = flags.DEFINE_string("model", None, "Checkpoint directory.", required=True)
_ADAPTER = flags.DEFINE_string("adapter", None, "PEFT directory of an adapter to put on it.")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "A question.", required=True)
_IMAGE = flags.DEFINE_multi_string("image", [], "An image file.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Most tokens of an answer.")
_MAX_SOFT_TOKENS = flags.DEFINE_integer(
    "max_soft_tokens", None, "Most tokens of an image; None: the checkpoint's own."
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", None, "Draw among so many tokens.")
_TOP_P = flags.DEFINE_float("top_p", None, "Draw among the tokens of this total probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
_DTYPE = flags.DEFINE_string("dtype", None, "Of weights and activations; the checkpoint's if None.")


def conversations(prompts: list[str], images: list[str]) -> list[list[dict]]:
    """One user turn per prompt, images first, as the model was trained."""
    if len(prompts) == 1:
        owned = [images]
    elif len(images) in (0, len(prompts)):
        owned = [[image] for image in images] or [[] for _ in prompts]
    else:
        raise app.UsageError(f"{len(prompts)} prompts with {len(images)} images: give each its own")
    return [
        [
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": path} for path in paths),
                    {"type": "text", "text": prompt},
                ],
            }
        ]
        for prompt, paths in zip(prompts, owned, strict=True)
    ]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    processor = g4.Processor.from_pretrained(_MODEL.value, _MAX_SOFT_TOKENS.value)
    model = g4.load_checkpoint(_MODEL.value, text_only=not _IMAGE.value, dtype=_DTYPE.value)
    if _ADAPTER.value:
        model = g4.load_adapter(model, _ADAPTER.value)
        print(g4.lora.describe(model))
    batch = processor(conversations(_PROMPT.value, _IMAGE.value), add_generation_prompt=True)
    answers = g4.generate(
        model,
        batch,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        stop_ids=processor.stop_ids,
        seed=_SEED.value,
    )
    for prompt, row in zip(_PROMPT.value, answers.rows(), strict=True):
        print(f"{prompt}\n    {processor.decode(row)}")


if __name__ == "__main__":
    app.run(main)
