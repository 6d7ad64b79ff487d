"""The fusion step: what happens to gradients, and what early stopping and pruning do. Oracles in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal
from refusals import refused

import lorafusion_jax as lf
from lorafusion_jax.adapters.coefficients import present
from lorafusion_jax.methods import FullFineTuning, Magnitudes
from lorafusion_jax.training import cross_entropy, step as step_lib
from lorafusion_jax.training.step import end_epoch, prune

_MODEL = tiny.t5()
_INDEX = jnp.array([2, 0])
_KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def frozen():
    return tiny.frozen(_MODEL)


@pytest.fixture(scope="module")
def problem(frozen):
    return tiny.problem(lf.Fusion(), frozen, _INDEX)


@pytest.fixture(scope="module")
def start(problem):
    return lf.init_state(problem, _KEY)


def _rates(coefficients=0.02, magnitudes=0.005):
    return {
        "coefficients": jnp.float32(coefficients),
        "magnitudes": jnp.float32(magnitudes),
    }


@pytest.fixture
def take(monkeypatch, problem):
    """Take one step whose gradients are given, instead of those of the model."""

    def take(state, gradients, rates, optimisation=None):
        def linear(params, *args, **kwargs):
            products = jax.tree.map(lambda p, g: jnp.sum(p * g), params, gradients)
            # No metric of a model is of interest here.
            return sum(jax.tree.leaves(products)), {}

        monkeypatch.setattr(step_lib, "objective", linear)
        return lf.fusion_step(
            state,
            tiny.batch(),
            problem,
            rates,
            optimisation=optimisation or lf.Optimisation(steps=100),
        )

    return take


def test_a_state_starts_from_given_numbers(problem, start):
    """All of them or a group; `best` too, and no array is one that was given or occurs twice."""
    given = jax.tree.map(lambda p: np.asarray(p) + 1, start.params)
    for some in (given, {"coefficients": given["coefficients"]}, {}):
        state = lf.init_state(problem, _KEY, some)
        _equal(state.params, start.params | some)
        _equal(state.best, state.params)
        _equal(
            state._replace(params=None, best=None),
            start._replace(params=None, best=None),
        )
    keep = jax.tree.map(jnp.asarray, given)
    donated = jax.jit(lambda state: jax.tree.map(lambda a: a, state), donate_argnums=0)
    for state in (
        lf.init_state(problem, _KEY, keep),
        jax.jit(lambda p: lf.init_state(problem, _KEY, p))(keep),
        lf.init_state(problem, _KEY),
    ):
        donated(state)
    _equal(keep, given)


@pytest.mark.parametrize("method", [Magnitudes(), FullFineTuning()])
def test_a_state_shares_no_memory_with_the_frozen_weights(method, frozen):
    frozen = method.precompute(frozen, lf.kernels(_MODEL))
    state = lf.init_state(tiny.problem(method, frozen), _KEY)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(places)) == len(places)
    assert not {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(frozen)} & set(
        places
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p: lf.init_state(p, _KEY, {"lora": jnp.ones(2)}),
            "no group 'lora' to start from: expected some of coefficients, magnitudes",
        ),
        (
            lambda p: lf.init_state(p, _KEY, {"coefficients": jnp.ones((1, 5))}),
            r"expected coefficients of the shapes \(2, 5\), got \(1, 5\)",
        ),
        (
            lambda p: lf.init_state(p, _KEY, {"magnitudes": {}}),
            "expected magnitudes of the shapes .*, got {}",
        ),
        (
            lambda p: lf.fusion_step(
                lf.init_state(p, _KEY),
                tiny.batch(),
                p,
                {"coefficients": jnp.float32(0.1)},
                optimisation=lf.Optimisation(steps=2),
            ),
            "no learning rate for magnitudes: add it",
        ),
        (lambda p: lf.Optimisation(steps=6, clip=-1.0), "clip is -1.0: give a norm"),
        (lambda p: lf.Optimisation(steps=6, clip=np.nan), "clip is nan"),
        (lambda p: lf.Optimisation(steps=6, warmup=-1), "warmup is -1: "),
        (lambda p: p.replace(index=jnp.array((0, 3))), "index from 0 to 2, for a pool"),
        (lambda p: p.replace(index=jnp.array((1, 1))), "each module once, got .*1, 1"),
    ],
)
def test_numbers_rates_and_settings_without_a_meaning_are_refused(
    problem, call, message
):
    with refused(message):
        call(problem)


def _random_like(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params
    )


def _norm(tree):
    return np.sqrt(
        sum(
            np.sum(np.square(np.asarray(leaf, np.float64)))
            for leaf in jax.tree.leaves(tree)
        )
    )


def _close(got, wanted, tolerance=1e-6):
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        got,
        wanted,
    )


def _equal(got, wanted):
    jax.tree.map(assert_array_equal, got, wanted)


def test_a_step_reads_the_weights_of_its_number(start, take, monkeypatch):
    read = []
    monkeypatch.setattr(
        lf.Frozen,
        "of_step",
        lambda frozen, step, graph: read.append(int(step)) or frozen,
    )
    state = start
    for _ in range(3):
        state, _ = take(state, start.params, _rates())
    assert read == [0, 1, 2]


def test_gradients_that_are_not_finite_are_zeroed_and_counted(start, take):
    gradients = _random_like(start.params, 0)
    site = "decoder.cross.v"
    places = ((1, 2), (0, 0))

    def with_values(first, second, third):
        m = (
            gradients["magnitudes"][site]
            .at[places[0]]
            .set(second)
            .at[places[1]]
            .set(third)
        )
        c = gradients["coefficients"].at[0, 1].set(first)
        return {"coefficients": c, "magnitudes": gradients["magnitudes"] | {site: m}}

    broken = with_values(jnp.nan, jnp.inf, -jnp.inf)
    corrected = with_values(0.0, 0.0, 0.0)
    # The sum of products that stands in for the loss is not finite either, which must not matter.
    got, metrics = take(start, broken, _rates())
    wanted, _ = take(start, corrected, _rates())
    _equal(got, wanted)
    assert metrics["nonfinite_gradients"] == 3
    norm = _norm(corrected)
    assert_allclose(metrics["gradient_norm"], norm, rtol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_clipping_by_the_norm_of_all_groups(start, take, clip):
    gradients = _random_like(start.params, 0)
    norm = _norm(gradients)
    assert norm > 0.5
    state, metrics = take(
        start, gradients, _rates(), lf.Optimisation(steps=9, clip=clip)
    )
    factor = 0.5 / norm if clip == 0.5 else 1.0
    # After one step Adam's first moment is a tenth of what it was given.
    wanted = jax.tree.map(lambda g: 0.1 * factor * np.asarray(g), gradients)
    _close(state.adam.mu, wanted)
    assert_allclose(metrics["gradient_norm"], norm, rtol=1e-6)


@pytest.mark.parametrize(
    ("optimisation", "factor"),
    [
        (lf.Optimisation(steps=6), lambda t: 1.0),
        (
            lf.Optimisation(steps=6, schedule="cosine"),
            lambda t: 0.5 * (1 + np.cos(np.pi * t / 6)),
        ),
        (lf.Optimisation(steps=6, warmup=3), lambda t: min((t + 1) / 3, 1.0)),
        (
            lf.Optimisation(steps=6, warmup=2, schedule="cosine"),
            lambda t: (t + 1) / 2 if t < 2 else 0.5 * (1 + np.cos(np.pi * (t - 2) / 4)),
        ),
    ],
    ids=["constant", "cosine", "warmup", "warmup and cosine"],
)
def test_schedules(start, take, optimisation, factor):
    # Under a gradient that never changes Adam moves by its learning rate, whatever the gradient's size.
    gradients = jax.tree.map(lambda p: jnp.full(p.shape, 3.0), start.params)
    state = start
    for number in range(6):
        before = state.params
        state, _ = take(state, gradients, _rates(), optimisation)
        moved = jax.tree.map(
            lambda a, b: np.asarray(a) - np.asarray(b), before, state.params
        )
        assert_allclose(moved["coefficients"], 0.02 * factor(number), atol=1e-6)
        for change in moved["magnitudes"].values():
            assert_allclose(change, 0.005 * factor(number), atol=1e-6)


def test_a_recipe_stops_after_a_third_of_its_epochs_counted_from_a_fifth():
    recipe = lf.FusionRecipe(
        epochs=16, schedule="cosine", warmup=4, clip=0.5, stop_early=True, prune=0.25
    )
    assert recipe.optimisation(60) == lf.Optimisation(
        steps=60,
        schedule="cosine",
        warmup=4,
        clip=0.5,
        prune=0.25,
        patience=5,
        patience_from=3,
    )
    assert lf.Recipe(epochs=2, stop_early=True).optimisation(9).patience == 1
    assert lf.Recipe(epochs=2).optimisation(9).patience is None


def _losses(state, losses, optimisation):
    """Run `end_epoch` with given losses; the parameters count the epochs, so that one sees whose are kept."""
    for epoch, loss in enumerate(losses, start=1):
        params = jax.tree.map(
            lambda p, e=epoch: jnp.full(p.shape, float(e)), state.params
        )
        moved = state._replace(
            params=jax.tree.map(
                lambda a, b, s=state: jnp.where(s.stopped, a, b), state.params, params
            )
        )
        state = end_epoch(moved, jnp.float32(loss), jnp.int32(epoch), optimisation)
    return state


@pytest.mark.parametrize(
    ("losses", "patience", "patience_from", "last", "best"),
    [
        ([3, 2, 1, 2, 3, 4], None, 0, 6, 3),  # never stops, remembers
        ([3, 2, 4, 4, 4, 1], 2, 0, 4, 2),  # stops before the better one
        ([3, 2, 4, 1, 4, 4], 2, 0, 6, 4),  # a better one starts the count again
        ([3, 4, 4, 4, 4, 1], 2, 4, 5, 1),  # epochs before the fourth are not counted
        ([3, 3, 3, 9, 9, 9], 2, 0, 3, 1),  # as good is not better
        ([3, np.nan, np.nan, 1, 1, 1], 2, 0, 3, 1),  # nor is NaN
    ],
)
def test_stopping_keeps_the_best_of_all_groups(
    start, losses, patience, patience_from, last, best
):
    state = _losses(
        start,
        losses,
        lf.Optimisation(steps=9, patience=patience, patience_from=patience_from),
    )
    assert bool(state.stopped) == (
        last < 6 or patience is not None and state.waited >= patience
    )
    for params, epoch in ((state.params, last), (state.best, best)):
        # Magnitudes are those of the same epoch as coefficients: the paper's code kept the last ones.
        assert {
            float(p) for leaf in jax.tree.leaves(params) for p in np.unique(leaf)
        } == {float(epoch)}
    assert float(state.best_loss) == losses[best - 1]


def test_a_stopped_seed_stays_bit_for_bit_while_another_goes_on(start, take):
    seeds = jax.tree.map(
        lambda a, b: jnp.stack([a, b]), start, start._replace(stopped=jnp.bool_(True))
    )
    gradients = _random_like(start.params, 0)
    optimisation = lf.Optimisation(steps=9, patience=1, prune=0.2)

    def of_seed(state):
        state, _ = take(state, gradients, _rates(), optimisation)
        return prune(
            end_epoch(state, jnp.float32(1.0), jnp.int32(3), optimisation), 0.2
        )

    after = jax.vmap(of_seed)(seeds)
    going = jax.tree.map(lambda a: a[0], after)
    stopped = jax.tree.map(lambda a: a[1], after)
    _equal(stopped, start._replace(stopped=jnp.bool_(True)))
    assert going.step == 1 and not going.stopped
    assert all(
        np.any(a != b)
        for a, b in zip(
            *map(jax.tree.leaves, (going.params, start.params)), strict=True
        )
    )


# Pruning.


def test_pruning_takes_the_smallest_of_all_entries_and_keeps_them_at_zero(start, take):
    share = 0.14  # 23.5 of 168
    # The smallest entries are spread unevenly: sites differ in scale, so no site or module is pruned as a whole.
    rng = np.random.default_rng(0)
    magnitudes = {
        site: jnp.asarray((0.5 + k) * rng.normal(size=m.shape), jnp.float32)
        for k, (site, m) in enumerate(start.params["magnitudes"].items())
    }
    state, _ = take(
        start._replace(params=start.params | {"magnitudes": magnitudes}),
        _random_like(start.params, 1),
        _rates(),
    )
    state = end_epoch(state, jnp.float32(1.0), jnp.int32(1), lf.Optimisation(steps=9))
    pruned = prune(state, share)
    flat = np.concatenate(
        [np.asarray(m).ravel() for m in jax.tree.leaves(state.params["magnitudes"])]
    )
    flat_pruned = np.concatenate(
        [np.asarray(m).ravel() for m in jax.tree.leaves(pruned.params["magnitudes"])]
    )
    count = int(share * flat.size)
    smallest = np.argsort(np.abs(flat))[:count]
    assert_array_equal(np.flatnonzero(flat_pruned == 0), np.sort(smallest))
    others = flat_pruned != 0
    assert_array_equal(flat_pruned[others], flat[others])
    shares = {
        site: float(np.mean(np.asarray(m) == 0))
        for site, m in pruned.params["magnitudes"].items()
    }
    assert len(set(shares.values())) > 1 and any(
        0 < part < 1 for part in shares.values()
    )
    # What was best before is forgotten: it was not pruned.
    _equal(pruned.best, pruned.params)
    assert np.isinf(pruned.best_loss)

    for number in range(2):
        gradients = _random_like(start.params, 10 + number)
        pruned, _ = take(
            pruned, gradients, _rates(), lf.Optimisation(steps=9, prune=share)
        )
        for tree in (pruned.params, pruned.adam.mu, pruned.adam.nu):
            _equal(
                jax.tree.map(lambda m: m == 0, tree["magnitudes"]),
                jax.tree.map(lambda k: ~k, pruned.kept),
            )
    assert sum(int(np.sum(~k)) for k in jax.tree.leaves(pruned.kept)) == count


# The objective and the whole step, on the model.


def test_the_objective(frozen, problem, start):
    acting = np.asarray(present(frozen.pool, _INDEX, "block"))
    assert 0 < np.sum(~acting) < acting.size
    c = tiny.coefficients(acting.shape)
    batch = tiny.batch()
    filled = jax.tree.map(lambda a: jnp.concatenate([a, jnp.zeros_like(a[:1])]), batch)
    filled = filled._replace(labels=filled.labels.at[-1].set(-100))

    method = dataclasses.replace(problem.method, l1=0.5, l2=0.25)
    penalised = problem.replace(method=method)

    @jax.jit
    def value(c, batch):
        params = start.params | {"coefficients": c}
        return lf.objective(params, batch, penalised)

    total, metrics = value(c, filled)
    # L1 is a mean over the coefficients that meet a module.
    penalty = 0.5 * np.mean(np.abs(np.asarray(c))[acting])
    penalty += 0.125 * np.sum(np.square(np.asarray(c)))
    assert_allclose(metrics["penalty"], penalty, rtol=1e-6)
    # The loss divides by the rows that are really there: 3 of 4.
    assert_allclose(metrics["loss"], metrics["cross_entropy"] / 3, rtol=1e-6)
    assert_allclose(total, metrics["loss"] + metrics["penalty"], rtol=1e-6)
    # Nothing is random: evaluation has no dropout.
    again, _ = value(c, filled)
    assert again == total
    assert "random" not in str(jax.make_jaxpr(value)(c, filled))

    def penalty(c):
        return value(c, filled)[1]["penalty"]

    wanted = 0.5 * np.sign(c) * acting / np.sum(acting) + 0.25 * c
    assert_allclose(jax.grad(penalty)(c), wanted, rtol=1e-6)


def test_the_loss_is_that_of_all_log_probabilities_without_their_memory():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(50 * rng.standard_normal((2, 8, 512)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 512, (2, 8)), jnp.int32).at[1, 3:].set(-100)

    def expected(logits):
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], axis=-1
        )[..., 0]
        return -jnp.sum(jnp.where(labels < 0, 0.0, picked)) / 11

    loss = (
        jax.jit(jax.value_and_grad(lambda logits: cross_entropy(logits, labels)))
        .lower(logits)
        .compile()
    )
    for ours, theirs in zip(
        loss(logits), jax.jit(jax.value_and_grad(expected))(logits), strict=True
    ):
        assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_problem_of_a_model_and_a_pool_fuses_all_modules(frozen):
    all_modules = lf.problem(_MODEL, frozen.pool, lf.Fusion())
    expected = tiny.problem(lf.Fusion(), frozen, np.arange(len(frozen.pool)))
    for ours, theirs in zip(
        *map(jax.tree.leaves, (all_modules, expected)), strict=True
    ):
        assert_array_equal(ours, theirs)
    none = lf.problem(_MODEL, None, FullFineTuning())
    assert none.frozen.pool is None and none.index.shape == (0,)
