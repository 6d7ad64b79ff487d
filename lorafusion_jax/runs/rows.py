"""Answers to many prompts in few rows: a row whose answer has ended gets the next prompt.

Axis letters: B rows of the state, R rows that are refilled at once, S source, T most tokens of an answer.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, Key

from ..adapters.updates import settled
from ..loading.model import evaluation_worth
from ..models.architecture import Architecture, Model
from ..models.generate import (
    GREEDY,
    Generation,
    Sampling,
    advance,
    begin,
    of_rows,
    refill,
    widened,
)
from ..models.layers import Adapters
from ..models.weights import read_at_random
from ..support.platform import for_cpu
from ..tasks import Batch, Encoded, eval_batches, pad
from ..training.mesh import axis_size, on_mesh, to_host
from ..training.method import Params
from ..training.problem import Problem
from ..training.seeds import AXIS

_FEWEST = 4  # rows of a state: fewer take about as long
_LONG = (
    32  # tokens of an answer from which on programs of fewer rows are worth compiling
)
_COMMON = 32  # tokens: the room for answers is a multiple, if that costs little, so that tasks share programs

Keys = Callable[[Int[np.ndarray, " B"]], Key[Array, " B"] | None]
Stops = Callable[[list[Int[np.ndarray, " _"]]], Sequence[bool]]


class Generated(NamedTuple):
    """Tokens of all answers, behind their ends padding, and the sum of rows over all steps that were computed."""

    tokens: Int32[np.ndarray, "seeds rows T"]
    computed: int


def draw_keys(
    sampling: Sampling, sampling_seed: int, numbers: Int[np.ndarray, " B"]
) -> Key[Array, " B"] | None:
    """Return a key for each row, by its number; None if nothing is drawn."""
    if not sampling.temperature:
        return None
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(sampling_seed)))(numbers)


def generate_rows(
    params: Params,
    read: Callable[[int], Problem],
    encoded: Encoded,
    *,
    batch_size: int,
    max_new_tokens: int,
    pad_id: int,
    sampling: Sampling = GREEDY,
    keys: Keys = lambda numbers: None,
    stops: Stops | None = None,
    between_stops: int = 8,
    worth: float | None = None,
    update: Callable[[int], Any] = lambda ended: None,
) -> Generated:
    """Generate for every row with the adapters of every seed.

    The tokens are those of `models.generate.generate`. Chips with read noise answer batch after batch, because the
    noise of a token depends on the rows next to it.

    Args:
      params: trained parameters, leaves with a leading axis of seeds.
      read: function from the number of a batch to the problem of all seeds, with the batch's noise.
      encoded: prompts.
      batch_size: most rows that are computed at once.
      max_new_tokens: most tokens of an answer.
      pad_id: token that fills up rows.
      sampling: choice of tokens.
      keys: function from row numbers to keys of the rows' draws.
      stops: function from the tokens of answers so far to whether the answers end, though not with an end token.
      between_stops: tokens that are generated before `stops` is called again.
      worth: tokens that one more program must save; by default so many as its compilation costs.
      update: function that is called with numbers of answers that have ended.
    """
    problem = read(0)
    worth = evaluation_worth(problem.config) if worth is None else worth
    batches = list(eval_batches(encoded, batch_size, pad_id=pad_id, worth=worth))
    seeds = problem.index.shape[0]
    noisy = read_at_random(problem.frozen)
    # Seeds are computed in turn: in each turn one of every device, or, batched, all of them.
    turns = 1 if problem.seed_mode == "batched" else seeds // axis_size("seed")
    tokens = np.full((seeds, len(encoded), max_new_tokens), pad_id, np.int32)
    computed = 0
    limits = np.full(len(encoded), max_new_tokens)
    how: Any = {
        "sampling": sampling,
        "room": room_for(max_new_tokens, batch_size, worth),
    }
    for number, turn_prompts in enumerate(
        [[batch] for batch in batches] if noisy else [batches]
    ):
        problem = problem if number == 0 else read(number)
        if "base" not in params:  # otherwise those of a seed replace the frozen ones
            problem = problem.unstacked()
        for turn in range(turns):
            seed_numbers = np.arange(seeds)[turn::turns]
            seed_values = (params, problem.index)
            ours, index = (
                seed_values if turns == 1 else _of_turn(seed_values, turn, turns=turns)
            )
            models = SeedModels(
                ours, problem.replace(index=index), on_mesh(seed_numbers, of_seeds=True)
            )
            rows = Rows(
                lambda numbers, models=models: models,
                len(seed_numbers),
                problem.config,
                turn_prompts,
                limits,
                keys,
                **how,
            )
            shrinks = (
                not noisy
                and max_new_tokens >= _LONG
                and max_new_tokens * batch_size > worth
            )
            for place, row, answer in rows.ended(
                shrinks, stops, between_stops if stops else max_new_tokens
            ):
                tokens[seed_numbers[place], row] = answer[:max_new_tokens]
                update(1)
            computed += rows.computed
            del rows  # else its cache would lie next to that of the next turn
    return Generated(tokens, computed)


def room_for(most: int, batch_size: int, worth: float) -> int:
    """Return the room of a state for answers of at most so many tokens; `worth` as in `eval_batches`."""
    room = -(-most // _COMMON) * _COMMON
    return room if (room - most) * batch_size < worth else most


@runtime_checkable  # so that beartype can check it
class Models(Protocol):
    """The models that the rows of a state are answered by, a pytree: one of each seed."""

    @property
    def axis(self) -> str | None:
        """Name of the mapped axis of seeds."""
        ...

    @property
    def keeps_adapters(self) -> bool:
        """Return whether the adapters of the first rows are those of all."""
        ...

    def each(
        self,
        fn: Callable[..., Any],
        adapters: Adapters | None,
        seed_arrays: tuple[Any, ...],
        shared: Any = (),
    ) -> Any:
        """Return `fn(model, adapters, *arrays of the seed, *shared)` for every seed; None has the adapters computed."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SeedModels:
    """The models of some seeds of a problem; `seeds` are their positions in it."""

    params: Params
    problem: Problem
    seeds: Any  # integers [seeds]
    keeps_adapters: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def axis(self) -> str | None:
        return AXIS if self.problem.seed_mode == "batched" else None

    def each(
        self,
        fn: Callable[..., Any],
        adapters: Adapters | None,
        seed_arrays: tuple[Any, ...],
        shared: Any = (),
    ) -> Any:
        def one_seed(
            seed_problem: Problem,
            params: Params,
            adapters: Adapters | None,
            *arrays: Any,
        ) -> Any:
            model, computed, _ = seed_problem.adapted_model(
                params
            )  # what is not used is not computed
            return fn(model, computed if adapters is None else adapters, *arrays)

        return self.problem.over_seeds(
            one_seed, (self.params, adapters, *seed_arrays), shared, self.seeds
        )


class _Prompt(NamedTuple):
    """A prompt's number, its tokens, and the width that it is padded to."""

    row: int
    ids: Int32[np.ndarray, " _"]
    width: int


class Rows:
    """The rows of a state, and the prompts that are still to come.

    Args:
      models: function from the numbers of the rows' prompts (-1 for none) to the models that answer them.
      seeds: number of seeds.
      config: structure of the models.
      batches: prompts in the batches of `eval_batches`. There are as many places as the first batch has rows.
      limits: most tokens of each prompt's answer, by its number.
      keys: function from row numbers to keys of the rows' draws.
      room: most tokens of an answer that a state has room for.
      sampling: choice of tokens.
    """

    def __init__(
        self,
        models: Callable[[Int[np.ndarray, "seeds R"]], Models],
        seeds: int,
        config: Architecture,
        batches: Sequence[tuple[Int32[np.ndarray, " B"], Batch]],
        limits: Int[np.ndarray, " rows"],
        keys: Keys,
        *,
        room: int,
        sampling: Sampling,
    ):
        self.models = models
        self.limits = limits.astype(np.int32)
        self.keys = keys
        self.pad_id = config.pad_id
        self.room = room
        self.sampling = sampling
        self.causal = config.causal
        self.computed = 0
        self.waiting = [
            _Prompt(
                int(row),
                batch.input_ids[place][batch.input_mask[place]],
                batch.input_ids.shape[1],
            )
            for rows, batch in batches
            for place, row in enumerate(rows)
            if row >= 0
        ]
        self.taken = np.zeros(seeds, int)  # of those that wait, by each seed
        places = len(batches[0][0])
        self.row = np.full(
            (seeds, places), -1
        )  # number of the prompt that has each place; -1 for none
        # A prompt costs a CPU the same in any company, and an accelerator less in a larger one.
        self.refilled = -(-places // (16 if for_cpu() else 4))
        self.state = self.adapters = None

    def ended(
        self, shrinks: bool, stops: Stops | None, most_steps: int
    ) -> Iterator[tuple[int, int, Int32[np.ndarray, " T"]]]:
        """Yield the seed's place, the number and the tokens of every answer, and padding behind, as answers end."""
        while True:
            free = np.sum(self.row < 0, axis=1)
            left = len(self.waiting) - self.taken
            refill_sizes = np.minimum(
                self.refilled, left
            )  # so many free places are worth a refill
            places = self.row.shape[1]
            fewer = -(-self.row.shape[1] // 2)
            if np.all(free == places) and not np.any(left):
                return
            if np.all(free == places) and np.all(left == left[0]):
                self._start()
                continue
            if np.any((left > 0) & (free >= refill_sizes)):
                self._refill()
                continue
            if np.any(left > 0):
                enough = np.sum(free) + np.sum(
                    np.where(left > 0, refill_sizes - free, 0)
                )
            elif shrinks and fewer >= _FEWEST:
                if np.all(places - free <= fewer):
                    busy_first = np.argsort(self.row < 0, axis=1, stable=True)[
                        :, :fewer
                    ]
                    self.state = _of_rows(
                        self._models(),
                        self.state,
                        self.adapters,
                        on_mesh(busy_first, of_seeds=True),
                    )
                    self.row = np.take_along_axis(self.row, busy_first, axis=1)
                    continue
                enough = np.sum(np.maximum(free, places - fewer))
            else:
                enough = self.row.size
            to_do = (np.int32(enough), np.int32(most_steps))
            self.state, steps = advance_rows(
                self._models(), self.state, self.adapters, to_do, sampling=self.sampling
            )
            seen = (self.state.done, self.state.position, self.state.tokens, steps)
            done, position, tokens, steps = map(np.array, to_host(seen))
            self.computed += int(np.sum(steps)) * places
            occupied = self.row >= 0
            going = occupied & ~done
            if stops is not None and np.any(going):
                done[going] = stops(
                    [
                        row[:end]
                        for row, end in zip(tokens[going], position[going], strict=True)
                    ]
                )
                self.state = self.state._replace(
                    done=on_mesh(jnp.asarray(done), of_seeds=True)
                )
            for seed, place in np.argwhere(done & occupied):
                yield int(seed), int(self.row[seed, place]), tokens[seed, place]
            self.row[done] = -1

    def _start(self) -> None:
        """Begin answers in all places: no row waits for another."""
        self.state = self.adapters = None  # frees those of earlier rows
        prompts = self.waiting[self.taken[0] : self.taken[0] + self.row.shape[1]]
        self.row[:, : len(prompts)] = [prompt.row for prompt in prompts]
        self.taken += len(prompts)
        self.width = max(prompt.width for prompt in prompts)
        numbers = self.row[0]
        rows = on_mesh(
            (
                *self._padded(prompts, self.row.shape[1]),
                numbers >= 0,
                self._limits(numbers),
            )
        )
        self.state, self.adapters = begin_rows(
            self._models(),
            *rows,
            self.keys(numbers),
            max_new_tokens=self.room,
            sampling=self.sampling,
        )
        self.computed += self.causal * self.row.size

    def _refill(self) -> None:
        """Begin answers in the free places of every seed, in as many as are refilled at once."""
        places = np.full(
            (len(self.row), self.refilled), self.row.shape[1]
        )  # behind the last: for none
        numbers = np.full_like(places, -1)
        new = []
        for seed, taken in enumerate(self.taken):
            free = np.flatnonzero(self.row[seed] < 0)[: self.refilled]
            prompts = self.waiting[taken : taken + len(free)]
            free = free[: len(prompts)]
            places[seed, : len(free)] = free
            numbers[seed, : len(free)] = self.row[seed, free] = [
                prompt.row for prompt in prompts
            ]
            self.taken[seed] += len(free)
            new.append(prompts)
        width = max(prompt.width for prompts in new for prompt in prompts)
        if width > self.width:
            self.state = _widened(
                self._models(), self.state, self.adapters, width=width
            )
            self.width = width
        padded = [self._padded(prompts, self.refilled) for prompts in new]
        source = np.stack([ids for ids, _ in padded])
        mask = np.stack([real for _, real in padded])
        keys = self.keys(numbers.ravel())
        keys = None if keys is None else keys.reshape(numbers.shape)
        rows = on_mesh(
            (places, source, mask, self._limits(numbers), keys), of_seeds=True
        )
        self.state = refill_rows(
            self.models(numbers),
            self.state,
            self.adapters,
            rows,
            sampling=self.sampling,
        )
        self.computed += self.causal * places.size

    def _models(self) -> Models:
        return self.models(self.row)

    def _limits(
        self, numbers: Int[np.ndarray, "*seeds R"]
    ) -> Int32[np.ndarray, "*seeds R"]:
        return np.where(numbers < 0, 1, self.limits[numbers])

    def _padded(
        self, prompts: Sequence[_Prompt], rows: int
    ) -> tuple[Int32[np.ndarray, "{rows} S"], Bool[np.ndarray, "{rows} S"]]:
        ids = [prompt.ids for prompt in prompts] + [np.zeros(0, np.int32)] * (
            rows - len(prompts)
        )
        return pad(ids, self.pad_id, self.width), np.arange(self.width) < np.array(
            [len(row) for row in ids]
        )[:, None]


@partial(jax.jit, static_argnames="turns")
def _of_turn(seed_values: Any, turn: Array, *, turns: int) -> Any:
    """Return leaves `leaf[turn::turns]`, with one program for all turns."""
    return jax.tree.map(
        lambda leaf: leaf.reshape(len(leaf) // turns, turns, *leaf.shape[1:])[:, turn],
        seed_values,
    )


@partial(jax.jit, static_argnames=("max_new_tokens", "sampling"))
def begin_rows(
    models: Models, *rows: Array | None, **how: Any
) -> tuple[Generation, Adapters | None]:
    """Return a new state of every seed, and its adapters if the models keep them.

    `rows` are the source tokens, their mask, the mask of rows, and the rows' limits and keys; `how` is room for new
    tokens, `max_new_tokens`, and the sampling.
    """

    def one(
        model: Model,
        adapters: Adapters,
        ids: Array,
        mask: Array,
        row_mask: Array,
        *limits_and_keys: Array | None,
    ) -> Any:
        limits, keys = limits_and_keys
        state = begin(
            model,
            ids,
            mask,
            adapters,
            row_mask=row_mask,
            row_limits=limits,
            row_keys=keys,
            **how,
        )
        return state, settled(adapters, model) if models.keeps_adapters else None

    return models.each(one, None, (), rows)


@partial(jax.jit, static_argnames="sampling", donate_argnames="state")
def advance_rows(
    models: Models,
    state: Generation,
    adapters: Adapters | None,
    limits: tuple[Int[Array, ""], Int[Array, ""]],
    **how: Any,
) -> tuple[Generation, Int[Array, " seeds"]]:
    """Return the state of every seed once so many rows have ended, or after most steps (`limits`), and its steps."""

    def one(
        model: Model,
        adapters: Adapters,
        state: Generation,
        ended: Array,
        most_steps: Array,
    ) -> Any:
        new = advance(
            model,
            state,
            adapters,
            ended=ended,
            most_steps=most_steps,
            axis=models.axis,
            **how,
        )
        return new, new.column - state.column

    return models.each(one, adapters, (state,), limits)


@partial(jax.jit, static_argnames="sampling", donate_argnames="state")
def refill_rows(
    models: Models,
    state: Generation,
    adapters: Adapters | None,
    new: tuple[Array | None, ...],
    **how: Any,
) -> Generation:
    """Return the state with `new` in places of every seed: places, tokens [seeds, R, S], mask, limits and keys.

    The models are those of the new rows.
    """

    def one(
        model: Model, adapters: Adapters, state: Generation, *new: Any
    ) -> Generation:
        places, ids, mask, limits, keys = new
        return refill(
            model,
            state,
            places,
            ids,
            mask,
            adapters,
            row_limits=limits,
            row_keys=keys,
            **how,
        )

    return models.each(one, adapters, (state, *new))


@partial(jax.jit, static_argnames="width")
def _widened(
    models: Models, state: Generation, adapters: Adapters | None, *, width: int
) -> Generation:
    return models.each(
        lambda model, adapters, state: widened(model, state, width), adapters, (state,)
    )


@jax.jit
def _of_rows(
    models: Models, state: Generation, adapters: Adapters | None, places: Array
) -> Generation:
    return models.each(
        lambda model, adapters, *rows: of_rows(*rows), adapters, (state, places)
    )
