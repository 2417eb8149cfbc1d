# SPDX-License-Identifier: Apache-2.0
"""Prompts for reinforcement learning: rows of a file to batches of columns, in a seeded order."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .conversation import Conversation, read_prompt
from .pipeline import BatchDataset, Plan
from .processor import Example, Processor, num_images
from .road import How, Measure, OfRows, Road, RowError, keep_rows
from .sources import Rows, follow_rows

# What a reward function may ask for besides columns.
CONTEXT = ("completion_ids", "trainer_state", "log_extra", "log_metric")
# Names that the host or a reward function's signature has for something else.
_RESERVED = ("prompts", "completions", "rewards", "advantages", "mode", "trajectory_ids", *CONTEXT)


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt on its way to the sampler."""

    given: Any  # as the data set has it; reward functions get this
    text: str  # for logs
    example: Example  # its tokens and packed images
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # beside it in its row


class PromptRoad(Road):
    """Prompts, as a learner of reinforcement learning takes them; see `PromptRows`."""

    columns_are = "columns for rewards"
    dropped_text = "{name}: {dropped} of {rows} prompts are left out, longer than {limits}"
    too_few_text = (
        "{name}: each of its {rows} prompts is longer than {limits}; the shortest has {shortest} "
        "tokens"
    )

    def __init__(
        self,
        processor: Processor,
        max_prompt_length: int,
        column: str | None = None,
        system: str | None = None,
        names: Collection[str] = (),
    ):
        super().__init__()
        self._processor = processor
        self._read_as: dict[str, Any] = {"column": column, "system": system, "names": tuple(names)}
        self.limits = {"data.max_prompt_length": max_prompt_length}

    def read(self, row: Any) -> list[Prompt]:
        asked = self._read(row)
        example = self._processor.encode(asked, add_generation_prompt=True)
        text = self._processor.decode(example.tokens, skip_special_tokens=False)
        return [Prompt(asked.given, text, example, asked.columns | {"images": asked.images})]

    def images(self, row: Any) -> Sequence[Any]:
        return self._read(row).images

    def _read(self, row: Any) -> Conversation:
        asked = read_prompt(row, **self._read_as)
        taken = [name for name in asked.columns if name in _RESERVED]
        if taken:
            raise ValueError(f"the column {taken[0]!r} has a name that rewards need; rename it")
        self.note(asked, *(["images"] if asked.images else []))
        return asked

    @property
    def columns(self) -> tuple[str, ...]:
        """What a batch has besides `prompts`, once every row was looked at."""
        return tuple(sorted(self.notes["columns"]))

    def measure(self, example: Prompt) -> Measure:
        return Measure((len(example.example.tokens),), num_images(example.example), 0)

    def collate(
        self, examples: list[Prompt], shape: tuple[int, int], size: int, denominator: float
    ) -> dict[str, list[Any]]:
        rows = [self.row(prompt) | {"prompts": prompt} for prompt in examples]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def row(self, prompt: Prompt) -> dict[str, Any]:
        """`prompts` and every column, None where the row has no such value."""
        columns = {name: prompt.columns.get(name) for name in self.columns}
        return {"prompts": prompt.given} | columns


class PromptRows(OfRows):
    """The prompts of a file that are short enough, by random access.

    Args:
        path: of the file.
        processor: of the checkpoint.
        max_prompt_length: tokens; longer prompts are left out and counted.
        prompt_column, system_prompt, names: see `read_prompt`.
        check, log, cache, key: how the rows are read at once; see `BatchDataset.check`.
        skip_bad_rows: leave out rows that cannot be read, and count them, in place of an error.
        before: the fingerprints of the rows as a run that goes on has known them.

    Attributes:
        plan: of the pipeline that reads them.
        checked: what is known of the rows.
    """

    def __init__(
        self,
        path: str | Path,
        processor: Processor,
        *,
        max_prompt_length: int = 512,
        prompt_column: str | None = None,
        system_prompt: str | None = None,
        check: How = None,
        skip_bad_rows: bool = False,
        log: Callable[[str], None] | None = None,
        cache: Path | None = None,
        key: str = "",
        names: Collection[str] = (),
        before: str | None = None,
    ):
        self._cache, self._before = cache, before
        self._road = PromptRoad(processor, max_prompt_length, prompt_column, system_prompt, names)
        rows = Rows(path)
        rows, self._changed = follow_rows(rows, before) or (rows, [])
        _require_column(rows, prompt_column)
        self.plan = Plan(rows, self._road, 1, skip_bad_rows=skip_bad_rows)
        self._data = BatchDataset(self.plan)
        self.checked = self._data.check(check, log=log, cache=cache, key=key, before=before)
        if not self.checked.examined:
            # A batch has the columns of all rows. What is wrong with one is said in its turn.
            for index in range(len(self.plan.rows)):
                with contextlib.suppress(RowError):
                    self.plan.encoder.look(index)
        elif self.checked.is_whole and not self.checked.kept:
            self._data.refuse_all()

    def __len__(self) -> int:
        """How many there are; where not all were checked, about how many."""
        return self.checked.examples if self.checked.examined else len(self.plan.rows)

    @property
    def looked_at(self) -> int:
        """How many of them were checked."""
        return self.checked.examined or self.num_rows

    @property
    def are_known(self) -> bool:
        """Whether a run that goes on tells a row that has changed."""
        return self._before is not None and self.plan.fingerprints is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """What a batch has besides `prompts`."""
        return self._road.columns

    @functools.cached_property
    def kept(self) -> list[int]:
        """Indices in the file; reads the rows that were not checked."""
        return [n for n in range(len(self.plan.rows)) if self.plan.encoder.kept(n)]

    def refuse_changed(self, batches: PromptBatches, what: str) -> None:
        """Raises ValueError, which begins with `what`, if rows of a run are gone or others since.

        `batches` are the run's, from where it stands: only what it has trained on counts.
        """
        if self._changed:
            plan = batches.plan()
            plan.refuse_changed(self._changed, plan.position_after(batches.start), what)
            if self._cache is not None:
                keep_rows(self._cache, plan.fingerprints)

    def first(self) -> Prompt:
        """The first prompt that is not left out."""
        return self._data.first()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row: `prompts` and every column, None where the row has no such value."""
        (prompt,) = self.plan.encoder.hold(self.kept[index])
        return self._road.row(prompt)


def _require_column(rows: Rows, name: str | None) -> None:
    """Raises ValueError if no row has the column that `data.prompt_column` names."""
    found: dict[str, None] = {}
    for index in range(len(rows) if name is not None else 0):
        row = rows.raw(index) if not rows.is_gone(index) else None
        if isinstance(row, Mapping):
            if name in row:
                return
            found |= dict.fromkeys(row)
    if found:
        raise ValueError(
            f"data.prompt_column: no row of {rows.name} has the column {name!r}; there are: "
            f"{', '.join(map(str, found))}"
        )


class PromptBatches:
    """Whole batches of prompts, by default without end, as the host's learners take them.

    Every row comes once per epoch; the order depends on `seed` alone. A learner that resumes skips
    what it has trained on by taking it again; those batches are empty prompts here, which cost
    nothing. Each other prompt carries its tokens and images, so that the learner reads nothing.

    Args:
        rows: the prompts.
        batch_size: rows of a batch.
        seed: of the order; None: that of the file.
        skipped: rows that the learner will take and throw away.
        start: row of the endless stream that comes after these.
        limit: end after so many rows; None: never.
    """

    def __init__(
        self,
        rows: PromptRows,
        batch_size: int,
        *,
        seed: int | None,
        skipped: int = 0,
        start: int = 0,
        limit: int | None = None,
    ):
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._skipped, self.start, self._limit = skipped, start, limit

    def __iter__(self) -> Iterator[dict[str, list[Any]]]:
        size = self._batch_size
        if self._skipped % size:
            raise ValueError(f"skipped: expected a multiple of {size}, found {self._skipped}")
        nothing = {name: [None] * size for name in self._rows.columns}
        for _ in range(self._skipped // size):
            yield {"prompts": [""] * size} | nothing
        plan = self.plan()
        iterator = iter(BatchDataset(plan))
        try:
            if self.start:
                seen = plan.position_after(self.start)
                iterator.set_state(iterator.get_state() | {"seen": seen, "kept": self.start})
            end = None if self._limit is None else max(self._limit - self.start, 0) // size
            yield from itertools.islice(iterator, end)
        finally:
            iterator.close()

    def plan(self) -> Plan:
        """Of the pipeline."""
        epochs = None  # A stream that ends reads nothing ahead in vain.
        if self._limit is not None and self._rows.checked.is_whole:
            epochs = -(-self._limit // len(self._rows))
        return self._rows.plan.sharing(
            batch_size=self._batch_size,
            seed=self._seed or 0,
            shuffle=self._seed is not None,
            num_epochs=epochs,
        )
