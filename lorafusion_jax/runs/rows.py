"""Answers to many prompts in few rows: a row whose answer has ended gets the next prompt.

Axis letters: B rows of the state, R rows that are refilled at once, S source, T most tokens of an answer.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, Key

from ..models.generate import GREEDY, Generation, Sampling, advance, begin, of_rows, refill, widened
from ..models.layers import Adapters
from ..models.weights import read_at_random
from ..platform import for_cpu
from ..tasks import Batch, Encoded, eval_batches, pad
from ..training.mesh import on_mesh, to_host
from ..training.method import Params
from ..training.problem import Problem
from ..training.seeds import AXIS
from .prepare import evaluation_worth

_FEWEST = 4  # rows of a state: fewer take about as long
_LONG = 32  # tokens of an answer from which on programs of fewer rows are worth compiling
_COMMON = 32  # tokens: the room for answers is a multiple, if that costs little, so that tasks share programs

Keys = Callable[[Int[np.ndarray, " B"]], Key[Array, " B"] | None]
Stops = Callable[[list[Int[np.ndarray, " _"]]], Sequence[bool]]


class Generated(NamedTuple):
    """Tokens of all answers, behind their ends padding, and the sum of rows over all steps that were computed."""

    tokens: Int32[np.ndarray, "seeds rows T"]
    computed: int


def draw_keys(sampling: Sampling, sampling_seed: int, numbers: Int[np.ndarray, " B"]) -> Key[Array, " B"] | None:
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
      params: trained numbers, leaves with a leading axis of seeds.
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
    seeds, noisy = problem.index.shape[0], read_at_random(problem.frozen)
    # Seeds are computed in turn: in each turn one of every device, or, batched, all of them.
    turns = 1 if problem.seed_mode == "batched" else seeds // jax.sharding.get_mesh().shape.get("seed", 1)
    tokens, computed = np.full((seeds, len(encoded), max_new_tokens), pad_id, np.int32), 0
    limits = np.full(len(encoded), max_new_tokens)
    how: Any = {"sampling": sampling, "room": room_for(max_new_tokens, batch_size, worth)}
    for number, of_turn in enumerate([[batch] for batch in batches] if noisy else [batches]):
        problem = problem if number == 0 else read(number)
        if "base" not in params:  # otherwise those of a seed replace the frozen ones
            problem = problem.replace(frozen=problem.frozen.unstacked())
        for turn in range(turns):
            of_seeds = slice(turn, None, turns)
            ours = jax.tree.map(lambda p, part=of_seeds: p[part], params)
            part = problem.replace(index=problem.index[of_seeds])
            programs = _OfSeeds(ours, part, np.arange(seeds)[of_seeds], **how)
            rows = Rows(programs, of_turn, limits, keys, pad_id=pad_id)
            shrinks = not noisy and max_new_tokens >= _LONG and max_new_tokens * batch_size > worth
            for place, row, said in rows.ended(shrinks, stops, between_stops if stops else max_new_tokens):
                tokens[programs.seeds[place], row] = said[:max_new_tokens]
                update(1)
            computed += rows.computed
            del programs, rows  # else their cache would lie next to that of the next turn
    return Generated(tokens, computed)


def room_for(most: int, batch_size: int, worth: float) -> int:
    """Return the room of a state for answers of at most so many tokens; `worth` as in `eval_batches`."""
    room = -(-most // _COMMON) * _COMMON
    return room if (room - most) * batch_size < worth else most


class NewRows(NamedTuple):
    """Prompts that get a place; leaves have a leading axis of seeds, except where all seeds begin alike.

    Attributes:
      numbers: number of each prompt; -1 for none.
      input_ids: source tokens.
      input_mask: True where a source token is real.
      limits: most tokens of each answer.
      keys: keys of the draws.
    """

    numbers: Int[np.ndarray, "*seeds R"]
    input_ids: Int32[np.ndarray, "*seeds R S"]
    input_mask: Bool[np.ndarray, "*seeds R S"]
    limits: Int32[np.ndarray, "*seeds R"]
    keys: Key[Array, "*seeds R"] | None


@runtime_checkable  # so that beartype can check it
class Programs(Protocol):
    """Computations of a state of rows, whose leaves have a leading axis of seeds."""

    count: int  # of seeds
    causal: bool

    def begin(self, rows: NewRows) -> Generation:
        """Return a new state of all places, for each seed."""
        ...

    def advance(self, state: Generation, ended: int, most_steps: int) -> tuple[Generation, Int[Array, " seeds"]]:
        """Return the state as `models.generate.advance` does, and the number of steps."""
        ...

    def refill(self, state: Generation, places: Int[np.ndarray, "seeds R"], rows: NewRows) -> Generation:
        """Return the state with new rows in these places; places from the number of rows on are none."""
        ...

    def widened(self, state: Generation, width: int) -> Generation:
        """Return the state with room for sources of this width."""
        ...

    def of_rows(self, state: Generation, kept: Int[np.ndarray, "seeds R"]) -> Generation:
        """Return the state of these rows alone."""
        ...


class _Prompt(NamedTuple):
    """A prompt's number, its tokens, and the width that it is padded to."""

    row: int
    ids: Int32[np.ndarray, " _"]
    width: int


class Rows:
    """The rows of a state, and the prompts that are still to come.

    Args:
      programs: computations of the state.
      batches: prompts in the batches of `eval_batches`. There are as many places as the first batch has rows.
      limits: most tokens of each prompt's answer, by its number.
      keys: function from row numbers to keys of the rows' draws.
      pad_id: token that fills up prompts.
    """

    def __init__(
        self,
        programs: Programs,
        batches: Sequence[tuple[Int32[np.ndarray, " B"], Batch]],
        limits: Int[np.ndarray, " rows"],
        keys: Keys,
        *,
        pad_id: int,
    ):
        self.programs, self.limits, self.keys, self.pad_id = programs, limits.astype(np.int32), keys, pad_id
        self.computed, seeds = 0, programs.count
        self.waiting = [
            _Prompt(int(row), batch.input_ids[place][batch.input_mask[place]], batch.input_ids.shape[1])
            for rows, batch in batches
            for place, row in enumerate(rows)
            if row >= 0
        ]
        self.taken = np.zeros(seeds, int)  # of those that wait, by each seed
        places = len(batches[0][0])
        self.row = np.full((seeds, places), -1)  # number of the prompt that has each place; -1 for none
        # A prompt costs a CPU the same in any company, and an accelerator less in a larger one.
        self.refilled = -(-places // (16 if for_cpu() else 4))
        self.state: Any = None

    def ended(
        self, shrinks: bool, stops: Stops | None, most_steps: int
    ) -> Iterator[tuple[int, int, Int32[np.ndarray, " T"]]]:
        """Yield the seed's place, the number and the tokens of every answer, and padding behind, as answers end."""
        while True:
            free, left = np.sum(self.row < 0, axis=1), len(self.waiting) - self.taken
            wanted = np.minimum(self.refilled, left)  # so many free places are worth a refill
            places, fewer = self.row.shape[1], -(-self.row.shape[1] // 2)
            if np.all(free == places) and not np.any(left):
                return
            if np.all(free == places) and np.all(left == left[0]):
                self._start()
                continue
            if np.any((left > 0) & (free >= wanted)):
                self._refill()
                continue
            if np.any(left > 0):
                enough = np.sum(free) + np.sum(np.where(left > 0, wanted - free, 0))
            elif shrinks and fewer >= _FEWEST:
                if np.all(places - free <= fewer):
                    self._shrink(fewer)
                    continue
                enough = np.sum(np.maximum(free, places - fewer))
            else:
                enough = self.row.size
            self.state, steps = self.programs.advance(self.state, int(enough), most_steps)
            seen = (self.state.done, self.state.position, self.state.tokens, steps)
            done, position, tokens, steps = map(np.array, to_host(seen))
            self.computed += int(np.sum(steps)) * places
            there = self.row >= 0
            going = there & ~done
            if stops is not None and np.any(going):
                done[going] = stops([row[:end] for row, end in zip(tokens[going], position[going], strict=True)])
                self.state = self.state._replace(done=on_mesh(jnp.asarray(done), of_seeds=True))
            for seed, place in np.argwhere(done & there):
                yield int(seed), int(self.row[seed, place]), tokens[seed, place]
            self.row[done] = -1

    def _start(self) -> None:
        """Begin answers in all places: no row waits for another."""
        self.state = None
        prompts = self.waiting[self.taken[0] : self.taken[0] + self.row.shape[1]]
        self.row[:, : len(prompts)] = [prompt.row for prompt in prompts]
        self.taken += len(prompts)
        self.width = max(prompt.width for prompt in prompts)
        source, mask = self._padded(prompts, self.row.shape[1])
        numbers = self.row[0]
        self.state = self.programs.begin(NewRows(numbers, source, mask, self._limits(numbers), self.keys(numbers)))
        self.computed += self.programs.causal * self.row.size

    def _refill(self) -> None:
        """Begin answers in the free places of every seed, in as many as are refilled at once."""
        places = np.full((len(self.row), self.refilled), self.row.shape[1])  # behind the last: for none
        numbers, new = np.full_like(places, -1), []
        for seed, taken in enumerate(self.taken):
            free = np.flatnonzero(self.row[seed] < 0)[: self.refilled]
            prompts = self.waiting[taken : taken + len(free)]
            free = free[: len(prompts)]
            places[seed, : len(free)] = free
            numbers[seed, : len(free)] = self.row[seed, free] = [prompt.row for prompt in prompts]
            self.taken[seed] += len(free)
            new.append(prompts)
        width = max(prompt.width for prompts in new for prompt in prompts)
        if width > self.width:
            self.state, self.width = self.programs.widened(self.state, width), width
        source, mask = (np.stack(parts) for parts in zip(*(self._padded(p, self.refilled) for p in new), strict=True))
        keys = self.keys(numbers.ravel())
        keys = None if keys is None else keys.reshape(numbers.shape)
        rows = NewRows(numbers, source, mask, self._limits(numbers), keys)
        self.state = self.programs.refill(self.state, places, rows)
        self.computed += self.programs.causal * places.size

    def _limits(self, numbers: Int[np.ndarray, "*seeds R"]) -> Int32[np.ndarray, "*seeds R"]:
        return np.where(numbers < 0, 1, self.limits[numbers])

    def _padded(
        self, prompts: Sequence[_Prompt], rows: int
    ) -> tuple[Int32[np.ndarray, "{rows} S"], Bool[np.ndarray, "{rows} S"]]:
        ids = [prompt.ids for prompt in prompts] + [np.zeros(0, np.int32)] * (rows - len(prompts))
        return pad(ids, self.pad_id, self.width), np.arange(self.width) < np.array([len(row) for row in ids])[:, None]

    def _shrink(self, fewer: int) -> None:
        kept = np.argsort(self.row < 0, axis=1, stable=True)[:, :fewer]
        self.row = np.take_along_axis(self.row, kept, axis=1)
        self.state = self.programs.of_rows(self.state, kept)


class _OfSeeds:
    """The programs of some of the seeds of a problem."""

    def __init__(
        self, params: Params, problem: Problem, seeds: Int[np.ndarray, " seeds"], *, room: int, sampling: Sampling
    ):
        self.seeds, self.count, self.causal = seeds, len(seeds), problem.config.causal
        self.room, self.sampling = room, sampling
        self.model = (params, problem, on_mesh(seeds, of_seeds=True))
        self.adapters: Any = None

    def begin(self, rows: NewRows) -> Generation:
        self.adapters = None  # frees those of an earlier state
        numbers, ids, mask, limits, keys = rows
        of_rows = on_mesh((ids, mask, numbers >= 0, limits))
        how = {"max_new_tokens": self.room, "sampling": self.sampling}
        state, self.adapters = begin_rows(*self.model, *of_rows, keys, **how)
        return state

    def advance(self, state: Generation, ended: int, most_steps: int) -> tuple[Generation, Int[Array, " seeds"]]:
        limits = (np.int32(ended), np.int32(most_steps))
        return advance_rows(*self.model, state, self.adapters, limits, sampling=self.sampling)

    def refill(self, state: Generation, places: Int[np.ndarray, "seeds R"], rows: NewRows) -> Generation:
        _, *of_rows = rows
        new = on_mesh((places, *of_rows), of_seeds=True)
        return refill_rows(*self.model, state, self.adapters, new, sampling=self.sampling)

    def widened(self, state: Generation, width: int) -> Generation:
        return _widened(*self.model, state, width=width)

    def of_rows(self, state: Generation, kept: Int[np.ndarray, "seeds R"]) -> Generation:
        return _of_rows(*self.model, state, on_mesh(kept, of_seeds=True))


@partial(jax.jit, static_argnames=("max_new_tokens", "sampling"))
def begin_rows(
    params: Params, problem: Problem, seeds: Array, *rows: Array | None, **how: Any
) -> tuple[Generation, Adapters]:
    """Return a new state of every seed, and its adapters.

    `rows` are the source tokens, their mask, the mask of rows, and the rows' limits and keys; `how` is room for new
    tokens, `max_new_tokens`, and the sampling.
    """

    def one_seed(one: Problem, params: Params, ids: Array, mask: Array, there: Array, *of_rows: Array | None) -> Any:
        (model, adapters, _), (limits, keys) = one.adapted_model(params), of_rows
        return begin(model, ids, mask, adapters, row_mask=there, row_limits=limits, row_keys=keys, **how), adapters

    return problem.over_seeds(one_seed, (params,), rows, seeds)


@partial(jax.jit, static_argnames="sampling", donate_argnames="state")
def advance_rows(
    params: Params,
    problem: Problem,
    seeds: Array,
    state: Generation,
    adapters: Adapters,
    limits: tuple[Array, Array],
    **how: Any,
) -> tuple[Generation, Int[Array, " seeds"]]:
    """Return the state of every seed once so many rows have ended, or after most steps (`limits`), and its steps."""
    axis = AXIS if problem.seed_mode == "batched" else None

    def one_seed(one: Problem, params: Params, state: Generation, adapters: Adapters, *limits: Array) -> Any:
        ended, most_steps = limits
        model, _, _ = one.adapted_model(params)  # its adapters, computed once, are an argument
        new = advance(model, state, adapters, ended=ended, most_steps=most_steps, axis=axis, **how)
        return new, new.column - state.column

    return problem.over_seeds(one_seed, (params, state, adapters), limits, seeds)


@partial(jax.jit, static_argnames="sampling", donate_argnames="state")
def refill_rows(
    params: Params,
    problem: Problem,
    seeds: Array,
    state: Generation,
    adapters: Adapters,
    new: tuple[Array | None, ...],
    **how: Any,
) -> Generation:
    """Return the state with `new` in places of every seed: places, source tokens, mask, limits and keys."""

    def one_seed(one: Problem, params: Params, state: Generation, adapters: Adapters, *new: Any) -> Generation:
        places, ids, mask, limits, keys = new
        model, _, _ = one.adapted_model(params)
        return refill(model, state, places, ids, mask, adapters, row_limits=limits, row_keys=keys, **how)

    return problem.over_seeds(one_seed, (params, state, adapters, *new), (), seeds)


@partial(jax.jit, static_argnames="width")
def _widened(params: Params, problem: Problem, seeds: Array, state: Generation, *, width: int) -> Generation:
    def one_seed(one: Problem, params: Params, state: Generation) -> Generation:
        return widened(one.adapted_model(params)[0], state, width)

    return problem.over_seeds(one_seed, (params, state), (), seeds)


@jax.jit
def _of_rows(params: Params, problem: Problem, seeds: Array, state: Generation, kept: Array) -> Generation:
    return problem.over_seeds(lambda one, params, *rows: of_rows(*rows), (params, state, kept), (), seeds)
