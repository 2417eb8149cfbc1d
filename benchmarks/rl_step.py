# SPDX-License-Identifier: Apache-2.0
"""The training half of a GRPO step, with completions that share their prompt's row and without.

    python benchmarks/rl_step.py                  # prompts of 512 tokens, completions of 128
    python benchmarks/rl_step.py --prompt 32 --completion 32

One optimizer step of this package's own learner on a CPU: the reference's log-probabilities, and
the loss with its gradient (LoRA of rank 16, no remat). The model is E2B's structure with a third of
its width and a vocabulary of 4,096, random, float32. Medians in turns, in seconds; operations of
products and temporaries are of the compiled programs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cpu_models import TEXT
from flax import nnx

import tunix_gemma4 as g4
from tunix_gemma4.model.gemma4 import num_parameters, stack_layers
from tunix_gemma4.planning.measure import count_flops
from tunix_gemma4.plugin.rl.cluster import example_shapes, make_trainer
from tunix_gemma4.plugin.rl.logps import chunked_logps
from tunix_gemma4.plugin.train_step import TrainStep
from tunix_gemma4.settings.grpo import GrpoRunConfig, PromptConfig
from tunix_gemma4.testing.tiny import tiny_hf_config

WORDS, EOS = 4096, 1


def make_policy() -> nnx.Module:
    source = tiny_hf_config("e2b")
    source["text_config"] |= TEXT | {"vocab_size": WORDS, "vocab_size_per_layer_input": WORDS}
    config = g4.ModelConfig.from_hf(source, text_only=True)
    model = g4.Gemma4ForConditionalGeneration(config, rngs=nnx.Rngs(0))
    return stack_layers(g4.apply_lora(model, g4.LoraConfig(rank=16, alpha=16)))


def draw_example(settings: GrpoRunConfig) -> Any:
    """Random rows of random lengths, those of a group with one prompt."""
    rng = np.random.default_rng(0)

    def draw(*shape: int, dtype: Any = jnp.int32) -> jax.Array:
        if dtype == jnp.int32:
            return jnp.asarray(rng.integers(300, WORDS, shape), dtype)
        return jnp.asarray(rng.normal(size=shape), dtype)

    example = example_shapes(draw, settings, None, (0,))
    prompts = example.prompt_ids.reshape(settings.micro, settings.num_generations, -1)
    prompts = jnp.broadcast_to(prompts[:, :1], prompts.shape).reshape(example.prompt_ids.shape)
    lengths = rng.integers(1, settings.max_completion_length + 1, len(prompts))
    mask = jnp.arange(settings.max_completion_length) < lengths[:, None]
    ids = jnp.where(mask, example.completion_ids, 0)
    return example.replace(
        prompt_ids=prompts, completion_ids=ids, completion_mask=mask.astype(jnp.int32)
    )


class Form:
    """The two programs with so many completions in a row."""

    def __init__(self, arguments: argparse.Namespace, count: int):
        settings = GrpoRunConfig(
            data=PromptConfig(max_prompt_length=arguments.prompt),
            max_completion_length=arguments.completion,
            num_generations=arguments.generations,
            batch_size=arguments.prompts,
            beta=0.04,
            completions_per_row=count,
        )
        self.example, self.count = draw_example(settings), count
        trainer = make_trainer(make_policy(), optax.adamw(1e-6), settings, pad_id=0, eos_id=EOS)
        self.step = TrainStep(trainer.create_train_step_fn(), trainer.model, trainer.optimizer)
        self.model = trainer.model

    def inputs(self) -> tuple[tuple, dict[str, Any]]:
        example = self.example
        arguments = (*nnx.split(self.model), example.prompt_ids, example.completion_ids)
        return (*arguments, None, None, None, jnp.float32(1)), {
            "pad_id": 0, "eos_id": EOS, "suppressed": (0,), "image_repeats": 1,
            "completions_per_row": self.count,
        }  # fmt: skip

    def run(self, program: str) -> float:
        start = time.perf_counter()
        if program == "log-probs":
            arguments, options = self.inputs()
            result = chunked_logps(*arguments, **options)
        else:
            result = self.step(self.example)
        jax.block_until_ready(result)
        return time.perf_counter() - start

    def traced(self, program: str) -> jax.stages.Traced:
        if program == "log-probs":
            arguments, options = self.inputs()
            return chunked_logps.trace(*arguments, **options)
        return self.step.jitted_fn.trace(*self.step.arguments(), self.example)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--completion", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    g4.register()
    forms = [Form(arguments, count) for count in (1, arguments.generations)]
    print(f"{num_parameters(forms[0].model) / 1e6:.1f} M parameters, {arguments}")
    print(f"{'':<12}{'separate':>12}{'shared':>12}{'ratio':>8}")
    for program in ("log-probs", "gradient"):
        times = [[form.run(program) for form in forms] for _ in range(arguments.repeats + 1)][1:]
        rows = {"s": [statistics.median(column) for column in zip(*times, strict=True)]}
        traces = [form.traced(program) for form in forms]
        rows["GFLOP"] = [count_flops(trace.jaxpr) / 1e9 for trace in traces]
        memory: list[Any] = [trace.lower().compile().memory_analysis() for trace in traces]
        rows["temp MB"] = [one.temp_size_in_bytes / 1e6 for one in memory]
        for unit, (separate, shared) in rows.items():
            ratio = shared / separate
            print(f"{program:<10} {unit:<8}{separate:>9.2f}{shared:>12.2f}{ratio:>8.3f}")


if __name__ == "__main__":
    main()
