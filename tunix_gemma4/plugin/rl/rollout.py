# SPDX-License-Identifier: Apache-2.0
"""The host's vanilla rollout, for Gemma 4 with images and the whole stop list.

The host's sampler ends on one stop token and drops it from the completion, so that a policy never
learns to stop; it draws the same random numbers in every step; and it sees no images. Other models
keep it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from tunix.rl.rollout import base_rollout, vanilla_rollout

from ...data.processor import Batch, Example, Processor, image_slots, num_images
from ...data.prompts import Prompt
from ...model.gemma4 import Gemma4ForConditionalGeneration
from ...model.shared_prompt import completions_per_row
from ...sampling import generate, media_ids
from ...sharding import batch_shards
from ..hooks import extends, overrides
from .context import current
from .lengths import same_in_groups


@extends(
    __init__=("model", "tokenizer", "cache_config_or_size"),
    model=(),
    pad_id=(),
    eos_id=(),
    update_params=("params", "filter_types"),
)
class Rollout(vanilla_rollout.VanillaRollout):
    """Generates with `tunix_gemma4.generate`; weights and their exchange are the host's."""

    def __init__(self, model: Any, tokenizer: Any, cache_config_or_size: Any):
        super().__init__(model, tokenizer, cache_config_or_size)
        self.is_gemma4 = isinstance(model, Gemma4ForConditionalGeneration)
        self._config: Any = model.config if self.is_gemma4 else None
        self._processor: Processor | None = None
        self._image_slots = 0  # images per row of a batch
        # The most completions that are computed in one row with their prompt; None: all of them.
        self.completions_per_row: int | None = None
        self._draws = (0, 0)  # outside a learner, as `RolloutContext.draws`
        self.seconds = 0.0  # spent generating, in all

    @property
    def processor(self) -> Processor:
        """Reads prompts with images; that of the checkpoint unless one was set.

        Raises:
            ValueError: none was set, and the model was not loaded from a directory.
        """
        if self._processor is None:
            directory = self._config.source_directory
            if directory is None:
                raise ValueError(
                    "images and conversations need a processor, and the model does not come from "
                    "a directory; give one with tunix_gemma4.set_processor(rl_cluster, processor)"
                )
            self._processor = Processor.from_pretrained(directory)
        return self._processor

    @processor.setter
    def processor(self, processor: Processor) -> None:
        self._processor = processor

    @property
    def suppressed(self) -> tuple[int, ...]:
        """Ids that are never drawn: media, and the pad token, which the host takes for absence."""
        return (*media_ids(self._config), self.pad_id())

    def stop_ids(self, rollout_config: base_rollout.RolloutConfig) -> tuple[int, ...]:
        """The run's own list, or else the whole list of the checkpoint."""
        if rollout_config.eos_tokens:
            return tuple(rollout_config.eos_tokens)
        if self._processor is not None or self._config.source_directory is not None:
            return self.processor.stop_ids
        eos = self._config.eos_token_id
        return tuple(dict.fromkeys([*np.ravel(eos).tolist(), self.eos_id()]))

    def group_of(self, generations: int) -> int:
        """`RolloutContext.group` of prompts with so many completions each."""
        most = self.completions_per_row or generations
        return most if generations % most == 0 else 1

    def begin(self, step: int) -> None:
        """Starts the random numbers of a step outside a learner."""
        self._draws = (step, 0)

    def images(self, examples: Sequence[Example]) -> np.ndarray | None:
        """Their images [B, I, M, C]; I never falls, so that few programs are compiled."""
        slots = (image_slots(num_images(example)) for example in examples)
        self._image_slots = max([self._image_slots, *slots])
        if not self._image_slots:
            return None
        return self.processor.collate(examples, images=self._image_slots).images

    @overrides("prompts", "rollout_config", "kwargs")
    def generate(
        self,
        prompts: Sequence[str | Prompt],
        rollout_config: base_rollout.RolloutConfig,
        **kwargs: Any,
    ) -> base_rollout.RolloutOutput:
        """Completions of `prompts`, their stop tokens included, with their log-probabilities.

        Raises:
            ValueError: a prompt longer than `max_prompt_length`.
        """
        if not self.is_gemma4:
            return super().generate(list(map(str, prompts)), rollout_config, **kwargs)
        start = time.perf_counter()
        limit, context = rollout_config.max_prompt_length, current()
        columns = limit if context is None else context.columns[0] or limit
        batch = self._batch(prompts, limit, columns)
        stops = self.stop_ids(rollout_config)
        top_k, top_p = rollout_config.top_k, rollout_config.top_p
        sampling = rollout_config.temperature > 0
        model: Any = self.model()
        said = generate(
            model,
            batch,
            max_new_tokens=rollout_config.max_tokens_to_generate,
            temperature=rollout_config.temperature,
            top_k=top_k if sampling and top_k is not None and top_k > 0 else None,
            top_p=top_p if sampling and top_p is not None and top_p < 1 else None,
            stop_ids=stops,
            pad_id=self.pad_id(),
            suppress_ids=(self.pad_id(),),
            image_repeats=1 if batch.images is None else len(prompts) // len(batch.images),
            prompt_repeats=self._prompt_repeats(batch),
            **self._random_numbers(rollout_config.seed, len(prompts)),
        )
        output = self._output(batch, said, stops, limit)
        self.seconds += time.perf_counter() - start
        return output

    def _batch(self, prompts: Sequence[str | Prompt], limit: int, length: int) -> Batch:
        """Left-padded to `length`, with the images in work."""
        examples = []
        for index, prompt in enumerate(prompts):
            example = prompt.example if isinstance(prompt, Prompt) else self._text(prompt)
            if len(example.tokens) > limit:
                raise ValueError(
                    f"prompt {index}: it has {len(example.tokens)} tokens and max_prompt_length "
                    f"is {limit}; raise it or leave the prompt out"
                )
            examples.append(example)
        length = max(length, *(len(example.tokens) for example in examples))
        tokens = np.full((len(examples), length), self.pad_id(), np.int32)
        mask = np.zeros_like(tokens)
        for row, example in enumerate(examples):
            start = length - len(example.tokens)
            tokens[row, start:], mask[row, start:] = example.tokens, 1
        context = current()
        images = None if context is None else context.next_images(len(examples))
        return Batch(tokens, np.zeros_like(mask), mask, images)

    def _prompt_repeats(self, batch: Batch) -> int:
        """How many rows next to each other have one prefill."""
        context = current()
        group = 1 if context is None else context.group
        known = group if same_in_groups(batch.tokens, group) else 1
        return completions_per_row(len(batch.tokens), known, batch_shards())

    def _text(self, prompt: str) -> Example:
        ids = np.asarray(self.tokenize(prompt), np.int32)
        return Example(ids, np.zeros_like(ids), None)

    def tokenize(self, prompt: str) -> Sequence[int]:
        """The ids of a prompt that already follows the chat template."""
        return list(self._sampler.tokenize(prompt))

    def _random_numbers(self, seed: int | jax.Array | None, count: int) -> dict[str, Any]:
        """Of each completion by the run's seed, its rollout step and its place in that, alone.

        So they are others for each, the same after a restart, and do not depend on how a step is
        cut into calls.
        """
        seed = 0 if seed is None else int(np.ravel(jax.device_get(seed))[-1])
        context = current()
        if context is None:
            step, place = self._draws
            self._draws = (step, place + count)
        else:
            step, first = context.draws
            place = first + len(context.record.completion_ids)  # behind those of earlier calls
        mixed = np.random.SeedSequence([seed, step]).generate_state(1)[0]
        return {"seed": int(mixed >> 1), "places": range(place, place + count)}

    def _output(
        self, batch: Batch, said: Any, stops: Sequence[int], limit: int
    ) -> base_rollout.RolloutOutput:
        tokens, lengths, logps = jax.device_get((said.tokens, said.lengths, said.logps))
        rows = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        scores = [row[:length] for row, length in zip(logps, lengths, strict=True)]
        context = current()
        if context is not None:
            context.record.completion_ids += rows
            context.record.rollout_logps += scores
            context.record.truncated += [row[-1] not in stops for row in rows]
        padding = ((0, 0), (limit - batch.tokens.shape[1], 0))
        spoken = [row[:-1] if row[-1] in stops else row for row in rows]
        return base_rollout.RolloutOutput(
            text=[self._sampler.tokenizer.decode(row.tolist()) for row in spoken],
            logits=None,  # pyright: ignore[reportArgumentType]
            tokens=rows,
            left_padded_prompt_tokens=np.pad(batch.tokens, padding, constant_values=self.pad_id()),
            logprobs=[row.tolist() for row in scores],
        )


def gemma4_rollout(rl_cluster: Any) -> Rollout | None:
    """The cluster's rollout, if it is this one and samples from a Gemma 4."""
    rollout = rl_cluster.rollout
    return rollout if isinstance(rollout, Rollout) and rollout.is_gemma4 else None


def wrap_vanilla_rollout(original: type) -> type:
    """Rollouts see images, stop on the whole stop list and draw anew in each step."""
    if not issubclass(Rollout, original):
        raise RuntimeError(f"{original.__name__} is not the host's own; was it replaced before?")
    return Rollout
