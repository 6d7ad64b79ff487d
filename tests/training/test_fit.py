"""Steps of an epoch in one call, as on accelerators, against a call for each, as on a CPU."""

import importlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.testing import assert_array_equal

from lorafusion_jax import PRESETS, Fusion, Problem
from lorafusion_jax.tasks import Encoded, Split, TrainingRows
from lorafusion_jax.training import fit, recipe_rates, start
from lorafusion_jax.training.method import VALIDATION

# The package's name of this module is that of its function.
fit_lib = importlib.import_module("lorafusion_jax.training.fit")

_CONFIG = replace(tiny.CONFIG, num_layers=1, num_decoder_layers=1, unroll=True)
_SEEDS = (1, 2)
_RECIPE = replace(PRESETS["default"], epochs=3, batch_size=2)
_STEPS = 3  # of an epoch
_LENGTHS = (
    3,
    3,
    3,
    3,
    7,
    4,
)  # so epochs have steps of both widths, 4 and 8, in different orders


@pytest.fixture(scope="module")
def problem():
    frozen = tiny.frozen(tiny.t5(_CONFIG), tiny.pool(3, names="q", config=_CONFIG))
    return tiny.problem(
        Fusion(), frozen, [[0, 1], [2, 1]], _CONFIG, seed_mode="sequential"
    )


def _rows():
    rng = np.random.default_rng(0)
    inputs = tuple(
        rng.integers(2, _CONFIG.vocab_size, length, np.int32) for length in _LENGTHS
    )
    labels = tuple(rng.integers(2, _CONFIG.vocab_size, 3, np.int32) for _ in _LENGTHS)
    train = np.tile(np.arange(len(_LENGTHS), dtype=np.int32), (2, 1))
    return TrainingRows(Encoded(inputs, labels), Split(train, train[:, :2]), pad_id=0)


def _trained(problem, patch, *, whole, state=None, **how):
    """Return the last state and the epochs; `calls` has what each call of the program took, `read` what was read."""
    calls = []
    read = []
    epochs = []
    program = fit_lib.train_seeds
    to_host = fit_lib.to_host

    def counted(state, batches, *args, shapes, **kwargs):
        calls.append((batches.row_mask.shape[1], shapes))
        return program(state, batches, *args, shapes=shapes, **kwargs)

    patch.setattr(fit_lib, "for_cpu", lambda: not whole)
    patch.setattr(fit_lib, "train_seeds", counted)
    patch.setattr(fit_lib, "to_host", lambda tree: read.append(tree) or to_host(tree))
    before = program.cache_size()
    state = start(problem, _SEEDS) if state is None else jax.tree.map(jnp.copy, state)
    last = fit(
        problem, _rows(), state, _RECIPE, _SEEDS, after_epoch=epochs.append, **how
    )
    return last, epochs, calls, len(read), program.cache_size() - before


@pytest.fixture(scope="module")
def by_step(problem):
    kept = {}

    def keep(number, state, metrics):
        kept[(number - 1) * _STEPS + len(metrics)] = jax.tree.map(jnp.copy, state)

    with pytest.MonkeyPatch.context() as patch:
        return *_trained(problem, patch, whole=False, after_interval=keep), kept


def _assert_same(ours, theirs):
    jax.tree.map(assert_array_equal, *map(jax.tree.leaves, (ours, theirs)))


def _found(epochs):
    return [
        (
            epoch.metrics,
            epoch.validation_loss,
            epoch.stopped,
            epoch.first_step,
        )
        for epoch in epochs
    ]


def test_an_epoch_in_one_call_has_the_bits_of_its_steps(problem, by_step, monkeypatch):
    state, epochs, calls, _, compiled, kept = by_step
    assert (
        len(calls) == 3 * _STEPS
        and compiled == 2
        and sorted(kept) == [1, 2, 4, 5, 7, 8]
    )
    with monkeypatch.context() as patch:
        together, of_whole, calls, read, compiled = _trained(problem, patch, whole=True)
    assert calls == 3 * [(_STEPS, ((4, 4), (8, 4)))]
    assert read == 3 and compiled == 1  # each epoch
    _assert_same(together, state)
    _assert_same(_found(of_whole), _found(epochs))
    # And from a step within an epoch.
    resumed, rest, calls, _, _ = _trained(
        problem,
        monkeypatch,
        whole=True,
        state=kept[4],
        first_step=4,
        after_interval=pytest.fail,
    )
    assert [steps for steps, _ in calls] == [2, 3]
    _assert_same(resumed, state)
    _assert_same(
        rest[0].metrics,
        {name: values[1:] for name, values in epochs[1].metrics.items()},
    )
    _assert_same(_found(rest[1:]), _found(epochs[2:]))


@pytest.mark.parametrize(
    ("epochs", "stops", "last", "pruned"),
    [(4, (9, 9), 4, 2), (5, (2, 4), 4, 3), (1, (1, 1), 1, 1)],
)
def test_the_loop_prunes_at_half_time_and_ends_when_every_seed_has_stopped(
    problem, monkeypatch, epochs, stops, last, pruned
):
    ended = []
    found = []

    def end(state, loss, number, *, optimisation, pruning):
        ended.append((int(number), pruning))
        return state._replace(stopped=np.array([number >= stop for stop in stops]))

    _without_programs(monkeypatch)
    monkeypatch.setattr(fit_lib, "_after_epoch", end)
    recipe = replace(_RECIPE, epochs=epochs, prune=0.5)
    fit(
        problem,
        _rows(),
        start(problem, _SEEDS),
        recipe,
        _SEEDS,
        after_epoch=found.append,
    )
    assert ended == [(number, number == pruned) for number in range(1, last + 1)]


@pytest.mark.parametrize("protocol", ["default", "reference"])
def test_rows_are_shuffled_by_seed_and_epoch_but_not_in_the_papers_protocol(
    problem, monkeypatch, protocol
):
    trained, validated, read = _without_programs(monkeypatch)
    recipe = replace(_RECIPE, protocol=protocol)
    fit(problem, _rows(), start(problem, _SEEDS), recipe, _SEEDS)
    orders = (
        np.array(trained).reshape(3, _STEPS, 2, 2).swapaxes(1, 2).reshape(6, 6)
    )  # of epochs and seeds
    assert len(np.unique(orders, axis=0)) == (1 if protocol == "reference" else 6)
    assert (np.sort(orders, axis=1) == np.sort(orders[0])).all()
    held_out = [int(row[0]) for row in _rows().tokens.inputs[:2]]
    assert (
        np.array(validated).tolist() == [[held_out] * 2] * 3
    )  # every epoch, for both seeds
    assert read == [(VALIDATION, epoch) for epoch in (1, 2, 3)]


def _without_programs(patch):
    """Take no step and evaluate nothing.

    Return the first tokens of the rows that train and that validate, and the numbers of the reads that validate.
    """
    trained = []
    validated = []
    read = []

    def train(state, batches, *_, **__):
        trained.append(np.asarray(batches.input_ids)[:, 0, :, 0])
        return state, {"loss": np.zeros((1, 2))}

    def validate(params, batch, problem):
        validated.append(np.asarray(batch.input_ids)[:, :, 0])
        return jnp.zeros(2)

    patch.setattr(fit_lib, "train_seeds", train)
    patch.setattr(fit_lib, "seed_entropies", validate)
    patch.setattr(
        Problem, "read", lambda problem, *number: read.append(number) or problem
    )
    return trained, validated, read


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)]
)
def test_gradients_with_layers_in_separate_arrays(dtype):
    config = replace(tiny.CONFIG, dtype=dtype)
    frozen = tiny.frozen(tiny.t5(config), tiny.pool(3, config=config))
    frozen = replace(frozen, base=jax.tree.map(lambda a: a.astype(dtype), frozen.base))
    stacked = tiny.problem(Fusion(), frozen, config=config)
    params = stacked.init(jax.random.key(0))
    found = [
        jax.jit(jax.value_and_grad(tiny.loss))(params, of)
        for of in (stacked, stacked.per_layer())
    ]
    assert set(found[0][1]) == {"coefficients", "magnitudes"}
    for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.any(ours != 0)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed_mode", ["sequential", "batched"])
def test_tasks_in_one_program_are_trained_as_alone(problem, monkeypatch, seed_mode):
    monkeypatch.setattr(fit_lib, "for_cpu", lambda: True)
    whole = _rows()
    counts = (6, 2)  # so the second task has one step of an epoch, the first has three
    rates = recipe_rates(Fusion(), _RECIPE, 1)
    rates = [{group: rate * (1 + k) for group, rate in rates.items()} for k in (0, 1)]
    tasks = []
    for number, count in enumerate(counts):
        short = whole.tokens.inputs[number : number + 1] * count  # all of one width
        tokens = Encoded(short, whole.tokens.labels[:count])
        rows = np.arange(count, dtype=np.int32)[None]
        tasks.append(TrainingRows(tokens, Split(rows, rows[:, : 2 - number]), pad_id=0))

    def trained(rows, lanes, seeds, rates, state=None, **calls):
        of_lanes = problem.replace(index=problem.index[lanes], seed_mode=seed_mode)
        state = start(of_lanes, seeds) if state is None else state
        epochs = []
        last = fit(
            of_lanes,
            rows,
            state,
            replace(_RECIPE, stop_early=True),
            seeds,
            rates=rates,
            after_epoch=epochs.append,
            **calls,
        )
        return last, [epoch.validation_loss for epoch in epochs]

    kept = []

    def keep(number, state, metrics):
        kept.append(jax.tree.map(jnp.copy, state))

    both = jax.tree.map(lambda *rate: jnp.concatenate(rate), *rates)
    rows = tasks[0].followed_by(tasks[1:])
    together, losses = trained(rows, slice(0, 2), _SEEDS, both, after_interval=keep)
    for lane, seed in enumerate(_SEEDS):
        alone, own_losses = trained(
            tasks[lane], slice(lane, lane + 1), (seed,), rates[lane]
        )
        assert alone.step == counts[lane] // 2 * _RECIPE.epochs
        for ours, theirs in zip(
            *map(jax.tree.leaves, ((together, losses), (alone, own_losses))),
            strict=True,
        ):
            if seed_mode == "sequential":
                assert_array_equal(ours[lane], theirs[0])
            else:
                np.testing.assert_allclose(ours[lane], theirs[0], atol=1e-5)
    # From a step of the second epoch, in which the second task has had no rows yet.
    resumed, _ = trained(rows, slice(0, 2), _SEEDS, both, kept[2], first_step=4)
    _assert_same(resumed, together)
