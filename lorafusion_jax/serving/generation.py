"""Generation in rows of many tasks: a row whose answer has ended gets the next prompt, with the adapters of its task.

Axis letters: B rows of the state, R rows that are refilled at once, S source.
"""

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from ..models.generate import Generation, Sampling, advance, begin, of_rows, refill, widened
from ..models.layers import Adapters
from ..runs.rows import NewRows
from .bank import TaskBank


class OfTasks:
    """The programs of a bank (see `runs.rows.Programs`), whose state has an axis of one seed.

    Args:
      bank: tasks of the rows.
      tasks: number of each prompt's task.
      room: most tokens of an answer.
      sampling: choice of tokens.
    """

    count = 1

    def __init__(self, bank: TaskBank, tasks: Int[np.ndarray, " prompts"], *, room: int, sampling: Sampling):
        self.bank, self.tasks, self.room, self.sampling = bank, tasks, room, sampling
        self.causal = nnx.merge(bank.graph, bank.frozen.base).config.causal
        self.of_places = np.zeros(0, np.int32)

    def begin(self, rows: NewRows) -> Generation:
        numbers, *new = rows
        self.of_places = self._tasks(numbers)
        how = {"max_new_tokens": self.room, "sampling": self.sampling}
        return _begin(self.bank, self.of_places, numbers >= 0, *new, **how)

    def advance(self, state: Generation, ended: int, most_steps: int) -> tuple[Generation, Int[Array, " seeds"]]:
        limits = (np.int32(ended), np.int32(most_steps))
        return _advance(self.bank, self.of_places, state, *limits, sampling=self.sampling)

    def refill(self, state: Generation, places: Int[np.ndarray, "seeds R"], rows: NewRows) -> Generation:
        numbers, *new = (None if leaf is None else leaf[0] for leaf in rows)
        tasks, there = self._tasks(numbers), places[0] < len(self.of_places)
        self.of_places = self.of_places.copy()
        self.of_places[places[0][there]] = tasks[there]
        return _refill(self.bank, tasks, state, places[0], *new, sampling=self.sampling)

    def widened(self, state: Generation, width: int) -> Generation:
        return _widened(self.bank, state, width=width)

    def of_rows(self, state: Generation, kept: Int[np.ndarray, "seeds R"]) -> Generation:
        self.of_places = self.of_places[kept[0]]
        return _of_rows(state, kept[0])

    def _tasks(self, numbers: Any) -> Int[np.ndarray, " R"]:
        return np.where(numbers < 0, -1, self.tasks[numbers]).astype(np.int32)


@partial(jax.jit, static_argnames=("max_new_tokens", "sampling"))
def _begin(
    bank: TaskBank, tasks: Array, there: Array, ids: Array, mask: Array, limits: Array, keys: Array | None, **how: Any
) -> Generation:
    model, adapters = _adapted(bank, tasks)
    return _one(begin(model, ids, mask, adapters, row_mask=there, row_limits=limits, row_keys=keys, **how))


@partial(jax.jit, static_argnames="sampling", donate_argnames="state")
def _advance(
    bank: TaskBank, tasks: Array, state: Generation, ended: Array, most_steps: Array, **how: Any
) -> tuple[Generation, Array]:
    model, adapters = _adapted(bank, tasks)
    new = _one(advance(model, _first(state), adapters, ended=ended, most_steps=most_steps, **how))
    return new, new.column - state.column


@partial(jax.jit, static_argnames="sampling", donate_argnames="state")
def _refill(
    bank: TaskBank,
    tasks: Array,
    state: Generation,
    places: Array,
    ids: Array,
    mask: Array,
    limits: Array,
    keys: Array | None,
    **how: Any,
) -> Generation:
    model, adapters = _adapted(bank, tasks)
    new = refill(model, _first(state), places, ids, mask, adapters, row_limits=limits, row_keys=keys, **how)
    return _one(new)


@partial(jax.jit, static_argnames="width")
def _widened(bank: TaskBank, state: Generation, *, width: int) -> Generation:
    return _one(widened(nnx.merge(bank.graph, bank.frozen.base), _first(state), width))


@jax.jit
def _of_rows(state: Generation, kept: Array) -> Generation:
    return _one(of_rows(_first(state), kept))


def _adapted(bank: TaskBank, tasks: Array) -> tuple[Any, Adapters]:
    return nnx.merge(bank.graph, bank.frozen.base), bank.adapters(tasks)


def _one(state: Generation) -> Generation:
    return jax.tree.map(lambda leaf: leaf[None], state)


def _first(state: Generation) -> Generation:
    return jax.tree.map(lambda leaf: leaf[0], state)
