"""The answers to many prompts: of all seeds of a problem, or of rows that belong to different tasks.

Axis letters: B rows of a batch, R rows that are left of it, T most tokens of an answer.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, Key

from ..adapters.updates import precomputed
from ..loading.model import evaluation_compile_cost
from ..models.architecture import Model
from ..models.generate import GREEDY, Generation, Sampling, advance, begin, of_rows
from ..models.layers import Adapters
from ..models.weights import read_at_random
from ..support.platform import quick_jit
from ..tasks import Batch, Encoded, eval_batches
from ..training.mesh import AXIS, axis_size, on_mesh, to_host
from ..training.method import Params
from ..training.problem import Problem

_FEWEST = 4  # rows of a program: fewer take about as long
# Tokens of an answer from which on programs of fewer rows are worth compiling.
_LONG = 32
# The room for answers is a multiple, if that costs little, so that tasks share programs.
_COMMON = 32

Keys = Callable[[Int[np.ndarray, " B"]], Key[Array, " B"] | None]
Stops = Callable[[list[Int[np.ndarray, " _"]]], Sequence[bool]]


class SeedModels(NamedTuple):
    """The models of some seeds of a problem.

    Attributes:
      params: their parameters, leaves with a leading axis of seeds.
      problem: problem with the index of these seeds.
      seeds: their positions among all seeds, [seeds].
    """

    params: Params
    problem: Problem
    seeds: Any

    def each(
        self, fn: Callable[..., Any], seed_arrays: tuple[Any, ...], shared: Any = ()
    ) -> Any:
        """Return `fn(model, adapters, *arrays of the seed, *shared)` for every seed."""

        def of_seed(problem: Problem, params: Params, *arrays: Any) -> Any:
            model, adapters, _ = problem.adapted_model(params)
            return fn(model, adapters, *arrays)

        return self.problem.over_seeds(
            of_seed, (self.params, *seed_arrays), shared, self.seeds
        )


def draw_keys(
    sampling: Sampling, sampling_seed: int, indices: Int[np.ndarray, " B"]
) -> Key[Array, " B"] | None:
    """Return a key for each row, by its number; None if nothing is drawn."""
    if not sampling.temperature:
        return None
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(sampling_seed)))(indices)


def generate_rows(
    params: Params,
    read: Callable[[int], Problem],
    encoded: Encoded,
    *,
    batch_size: int,
    max_new_tokens: int,
    pad_id: int,
    row_params: Callable[[Int[np.ndarray, " B"]], Params] | None = None,
    limits: Int[np.ndarray, " rows"] | None = None,
    sampling: Sampling = GREEDY,
    keys: Keys = lambda indices: None,
    stops: Stops | None = None,
    between_stops: int = 8,
    compile_cost: float | None = None,
    update: Callable[[int], Any] = lambda ended: None,
) -> Int32[np.ndarray, "_seeds _rows _T"]:
    """Return the answers of every seed to every prompt, and padding behind their ends.

    The tokens are those of `models.generate.generate`. Batches hold prompts of similar lengths. Once half of the rows
    of a long batch have ended, a program of half as many rows continues with the others, except on chips with read
    noise, where the noise of a token depends on the rows next to it.

    Args:
      params: trained parameters, leaves with a leading axis of seeds.
      read: function from the number of a batch to the problem of all seeds, with the batch's noise.
      encoded: prompts.
      batch_size: most rows that are computed at once.
      max_new_tokens: most tokens of an answer.
      pad_id: token that fills up rows.
      row_params: function from the indices of a batch's rows (-1 for none) to further parameters.
      limits: most tokens of each row's answer, at most `max_new_tokens`, which is the default.
      sampling: choice of tokens.
      keys: function from row indices to keys of the rows' draws.
      stops: function from the tokens of answers so far to whether the answers end, though not with an end token.
      between_stops: tokens that are generated before `stops` is called again.
      compile_cost: tokens that one more program must save; by default so many as its compilation costs.
      update: function that is called with numbers of answers that have ended.
    """

    def per_layer(number: int) -> Problem:
        problem = read(number)
        # A seed's own base replaces the frozen one.
        return problem if "base" in params else problem.per_layer()

    problem = per_layer(0)
    compile_cost = (
        evaluation_compile_cost(problem.config)
        if compile_cost is None
        else compile_cost
    )
    batches = list(
        eval_batches(encoded, batch_size, pad_id=pad_id, compile_cost=compile_cost)
    )
    seeds = problem.index.shape[0]
    noisy = read_at_random(problem.frozen)
    # Seeds are computed in turn: in each turn one of every device, or, batched, all of them.
    turns = 1 if problem.seed_mode == "batched" else seeds // axis_size("seed")
    tokens = np.full((seeds, len(encoded), max_new_tokens), pad_id, np.int32)
    room = -(-max_new_tokens // _COMMON) * _COMMON
    if (room - max_new_tokens) * batch_size >= compile_cost:
        room = max_new_tokens
    shrinks = (
        row_params is None
        and not noisy
        and max_new_tokens >= _LONG
        and max_new_tokens * batch_size > compile_cost
    )
    if limits is None:
        limits = np.full(len(encoded), max_new_tokens)
    for number, (rows, batch) in enumerate(batches):
        if noisy and number > 0:
            problem = per_layer(number)
        batch_params = params | (row_params(rows) if row_params else {})
        row_limits = np.where(rows < 0, 1, limits[rows]).astype(np.int32)
        for turn in range(turns):
            seed_numbers = np.arange(seeds)[turn::turns]
            turn_params = batch_params
            index = problem.index
            if turns > 1:
                turn_params, index = _of_turn(
                    (batch_params, problem.index), turn, turns=turns
                )
            models = SeedModels(
                turn_params,
                problem.replace(index=index),
                on_mesh(seed_numbers, of_seeds=True),
            )
            prompts = (batch.input_ids, batch.input_mask, batch.row_mask)
            ended = _ended_rows(
                models,
                np.tile(rows, (len(seed_numbers), 1)),
                on_mesh((*prompts, row_limits, keys(rows))),
                room=room,
                sampling=sampling,
                shrinks=shrinks,
                stops=stops,
                most_steps=between_stops if stops else max_new_tokens,
            )
            for seed, row, answer in ended:
                tokens[seed_numbers[seed], row] = answer[:max_new_tokens]
                update(1)
    return tokens


def stream_row(
    params: Params,
    problem: Problem,
    batch: Batch,
    key: Key[Array, " 1"] | None,
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[int]:
    """Yield the tokens of one seed's answer to the only row of a batch; leaves have a leading axis of seeds."""
    models = SeedModels(params, problem, np.arange(1))
    limit = np.full(1, max_new_tokens, np.int32)
    state, adapters = begin_rows(
        models,
        batch.input_ids,
        batch.input_mask,
        batch.row_mask,
        limit,
        key,
        room=max_new_tokens,
        sampling=sampling,
    )
    one_row = np.ones(1, np.int32)
    for step in range(max_new_tokens):
        if state.step[0] == step:  # else the first token is there already
            state = advance_rows(
                models, state, adapters, one_row, np.int32(1), sampling=sampling
            )
        yield int(state.token[0, 0])
        if state.done[0, 0]:
            return


def _ended_rows(
    models: SeedModels,
    rows: Int32[np.ndarray, "_ _"],
    arguments: tuple[Any, ...],
    *,
    room: int,
    sampling: Sampling,
    shrinks: bool,
    stops: Stops | None,
    most_steps: int,
) -> Iterator[tuple[int, int, Int32[np.ndarray, " _"]]]:
    """Yield the seed's place, the row's number and the tokens of every answer to a batch, as answers end."""
    state, adapters = begin_rows(models, *arguments, room=room, sampling=sampling)
    while np.any(rows >= 0):
        size = rows.shape[1]
        fewer = -(-size // 2)
        ended = np.sum(rows < 0, axis=1)
        enough_ended = np.full(len(rows), size)
        if shrinks and fewer >= _FEWEST:
            if np.all(size - ended <= fewer):
                left = np.argsort(rows < 0, axis=1, stable=True)[:, :fewer]
                state = _of_rows(models, state, on_mesh(left, of_seeds=True))
                rows = np.take_along_axis(rows, left, axis=1)
                continue
            enough_ended = np.maximum(ended, size - fewer)
        state = advance_rows(
            models,
            state,
            adapters,
            on_mesh(enough_ended.astype(np.int32), of_seeds=True),
            np.int32(most_steps),
            sampling=sampling,
        )
        step, done, tokens = map(
            np.array, to_host((state.step, state.done, state.tokens))
        )
        going = (rows >= 0) & ~done
        if stops is not None and np.any(going):
            done[going] = stops([row[: step[0]] for row in tokens[going]])
            state = state._replace(done=on_mesh(jnp.asarray(done), of_seeds=True))
        for seed, place in np.argwhere(done & (rows >= 0)):
            yield int(seed), int(rows[seed, place]), tokens[seed, place]
        rows[done] = -1


@partial(jax.jit, static_argnames="turns")
def _of_turn(seed_values: Any, turn: Array, *, turns: int) -> Any:
    """Return leaves `leaf[turn::turns]`, with one program for all turns."""
    return jax.tree.map(
        lambda leaf: leaf.reshape(len(leaf) // turns, turns, *leaf.shape[1:])[:, turn],
        seed_values,
    )


@partial(quick_jit, static_argnames=("room", "sampling"))
def begin_rows(
    models: SeedModels,
    input_ids: Int[Array, "B S"],
    input_mask: Bool[Array, "B S"],
    row_mask: Bool[Array, " B"],
    limits: Int[Array, " B"],
    keys: Key[Array, " B"] | None,
    *,
    room: int,
    sampling: Sampling,
) -> tuple[Generation, Adapters]:
    """Return a new state of every seed with room for so many tokens, and the adapters that continue with it."""

    def of_seed(
        model: Model,
        adapters: Adapters,
        input_ids: Array,
        input_mask: Array,
        row_mask: Array,
        limits: Array,
        keys: Array | None,
    ) -> tuple[Generation, Adapters]:
        state = begin(
            model,
            input_ids,
            input_mask,
            adapters,
            max_new_tokens=room,
            row_mask=row_mask,
            row_limits=limits,
            sampling=sampling,
            row_keys=keys,
        )
        return state, precomputed(adapters, model)

    rows = (input_ids, input_mask, row_mask, limits, keys)
    return models.each(of_seed, (), rows)


@partial(quick_jit, static_argnames="sampling", donate_argnames="state")
def advance_rows(
    models: SeedModels,
    state: Generation,
    adapters: Adapters,
    ended: Int[Array, " seeds"],
    most_steps: Int[Array, ""],
    *,
    sampling: Sampling,
) -> Generation:
    """Return the state of every seed once so many of its rows have ended, or after most steps.

    Seeds that are computed together wait for the sum of their numbers.
    """
    axis = AXIS if models.problem.seed_mode == "batched" else None

    def of_seed(
        model: Model,
        _: Adapters,  # what is not used is not computed
        adapters: Adapters,
        state: Generation,
        ended: Array,
        most_steps: Array,
    ) -> Generation:
        return advance(
            model,
            state,
            adapters,
            ended=ended,
            most_steps=most_steps,
            sampling=sampling,
            axis=axis,
        )

    return models.each(of_seed, (adapters, state, ended), (most_steps,))


@jax.jit
def _of_rows(
    models: SeedModels, state: Generation, places: Int[Array, "seeds R"]
) -> Generation:
    return models.each(lambda model, adapters, *of: of_rows(*of), (state, places))
