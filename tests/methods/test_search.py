"""CMA-ES against random draws and zeros; the losses of single modules against models with merged kernels."""

import importlib.util
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_search
from flax import nnx

from lorafusion_jax.methods import cma, find, lorahub, mean
from lorafusion_jax.methods.fusion import Fusion
from lorafusion_jax.methods.lorahub import LORAHUB, LoraHubRecipe
from lorafusion_jax.methods.mean import single_losses
from lorafusion_jax.methods.method import SearchJob
from lorafusion_jax.tasks import IGNORED, Batch
from lorafusion_jax.training.frozen import SEARCH
from lorafusion_jax.training.problem import Problem

_MODULES, _GENERATIONS, _POPULATION = 3, 8, 6

needs_evosax = pytest.mark.skipif(
    importlib.util.find_spec("evosax") is None, reason="needs evosax: pip install -e '.[cma]'"
)


def _given(seeds):
    return {name: value for name, value in small_search.small(seeds, _MODULES).items() if name != "seeds"}


def _search(seeds, given, **changes):
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    size = {"generations": _GENERATIONS, "population": _POPULATION} | changes
    return cma.search(given["batches"], given["problem"], keys, **size)


@pytest.fixture(scope="module")
def searched():
    seen = []
    weights = _search((1, 2), _given((1, 2)), after_generation=lambda number, best: seen.append((number, best.copy())))
    return weights, seen


@needs_evosax
def test_a_search_beats_zeros_and_as_many_random_draws(searched):
    weights, seen = searched
    rng = np.random.default_rng(0)
    draws = rng.uniform(-lorahub.BOUND, lorahub.BOUND, (_GENERATIONS, 2 * _POPULATION, _MODULES))
    draws[0, 0] = 0
    draws[0, 1:3] = weights
    given = _given((0,) * 2 * _POPULATION)
    scores = np.stack([lorahub.score(of_generation, **given) for of_generation in draws])
    zero, found = scores[0, 0], scores[0, 1:3].copy()
    scores[0, :3] = np.inf
    assert (found < zero - 0.01).all()
    assert (found < scores.min()).all()  # of twice as many draws as each seed had
    # What it reports is the best so far, and the best of all is what it returns.
    assert [number for number, _ in seen] == list(range(1, _GENERATIONS + 1))
    reported = np.stack([best for _, best in seen])
    assert (np.diff(reported, axis=0) <= 0).all() and (reported[-1] < reported[0]).all()
    np.testing.assert_allclose(reported[-1], found, atol=1e-6)


@needs_evosax
def test_a_seeds_weights_depend_on_nothing_but_the_seed(searched):
    np.random.seed(5)  # noqa: NPY002, the global state that it might read
    alone = _search((2,), _given((2,)))
    np.testing.assert_array_equal(alone[0], searched[0][1])
    assert (searched[0][0] != searched[0][1]).all()


@needs_evosax
def test_weights_stay_within_lorahubs_bounds(monkeypatch):
    """The further out the better: the population runs into the bounds and is cut there."""
    tried, told, keys = [], [], []

    def score(weights, *_, **__):
        tried.append(weights)
        return -np.abs(weights).sum(axis=1)

    class Recorded(cma.load_evosax().CMA_ES):
        def tell(self, key, population, *rest):
            told.append(population)
            keys.append(tuple(jax.random.key_data(key).tolist()))
            return super().tell(key, population, *rest)

    monkeypatch.setattr(cma, "score", score)
    monkeypatch.setattr(cma, "load_evosax", lambda: SimpleNamespace(CMA_ES=Recorded))
    found = _search((1, 2), _given((1, 2)), generations=30)
    assert np.abs(tried).max() == np.abs(told).max() == lorahub.BOUND
    assert len(set(keys)) == 2 * 30  # of every seed and generation
    np.testing.assert_array_equal(np.abs(found), lorahub.BOUND)


@needs_evosax
def test_the_walk_of_many_weights_does_not_depend_on_the_seeds_beside_it(monkeypatch):
    monkeypatch.setattr(cma, "score", lambda weights, *_, **__: np.sum((weights - 0.5) ** 2, axis=1))
    found = {}
    for seeds in ((1, 2, 3), (3,)):
        index = jnp.tile(jnp.arange(20), (len(seeds), 1))
        given = _given(seeds)
        given["problem"] = given["problem"].replace(index=index)
        found[seeds] = _search(seeds, given, generations=40, population=16)
    np.testing.assert_array_equal(found[3,][0], found[1, 2, 3][2])
    assert (np.sum((found[3,] - 0.5) ** 2) < 0.2 * 20 * 0.5**2).all()


@needs_evosax
def test_scores_that_are_not_finite_are_never_the_best(monkeypatch):
    scores = []

    def score(weights, *_, **__):
        scores.append(np.where(weights[:, 0] > 0, np.nan, np.sum(weights**2, axis=1)))
        return scores[-1]

    monkeypatch.setattr(cma, "score", score)
    found = _search((1, 2), _given((1, 2)), generations=10)
    assert np.isnan(scores).any() and (found[:, 0] <= 0).all()
    best = np.nanmin(np.reshape(scores, (10, 2, _POPULATION)), axis=(0, 2))
    np.testing.assert_array_equal(np.sum(found**2, axis=1), best)


@pytest.mark.parametrize(("generations", "population"), [(0, 16), (5, 3)])
def test_generations_that_cannot_be_had(generations, population):
    message = f"{generations} generations of {population}: wanted at least 1 generation, and at least 4 members"
    with pytest.raises(ValueError, match=message):
        _search((1,), _given((1,)), generations=generations, population=population)


def test_missing_evosax_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "evosax", None)
    with pytest.raises(ValueError, match=r"needs evosax, .* pip install -e '\.\[cma\]'"):
        _search((1,), _given((1,)))


def _ragged(seeds):
    """Batches of several target tokens, of which the second has fewer, other ones for every seed."""
    rng = np.random.default_rng(7)
    batches = []
    for lengths in ((3, 2, 3, 1), (1, 1, 2, 0)):
        real = np.array(lengths) > 0
        mask = np.broadcast_to(real[:, None], (seeds, 4, 5))
        ids, labels = (rng.integers(2, 16, (seeds, 4, width)) for width in (5, 3))
        labels = np.where(np.arange(3) < np.array(lengths)[:, None], labels, IGNORED)
        batches.append(
            Batch(ids.astype(np.int32), mask, labels.astype(np.int32), np.broadcast_to(real, (seeds, 4)).copy())
        )
    return batches


def test_every_batch_is_read_with_noise_of_its_own(monkeypatch):
    read = []
    monkeypatch.setattr(Problem, "read", lambda problem, *number: read.append(number) or problem)
    monkeypatch.setattr(mean, "seed_entropies", lambda *_: jnp.zeros(1))
    single_losses(_ragged(1), _given((1,))["problem"])
    assert read == [(SEARCH, 0), (SEARCH, 1)]


@needs_evosax
def test_every_generation_is_read_with_noise_of_its_own(monkeypatch):
    read = []
    monkeypatch.setattr(Problem, "read", lambda problem, *number: read.append(number) or problem)
    monkeypatch.setattr(cma, "score", lambda weights, *_: np.sum(weights**2, axis=1))
    _search((1,), _given((1,)), generations=3)
    assert read == [(SEARCH, 1), (SEARCH, 2), (SEARCH, 3)]


def test_a_module_without_a_finite_loss_is_never_the_best(monkeypatch):
    losses = np.array([[np.nan, 2.0, 1.0], [np.inf, np.nan, 3.0]])
    monkeypatch.setattr(mean, "single_losses", lambda *_: losses)
    rows = SimpleNamespace(once=lambda size: iter(()))
    job = SearchJob(None, rows, LoraHubRecipe(), (1, 2), (("a", "b", "c"),) * 2, record=lambda rows: None)
    params, _ = find("single").search(job)
    np.testing.assert_array_equal(params["coefficients"], [[0, 0, 1], [0, 0, 1]])


@pytest.mark.parametrize("seed_mode", ["sequential", "batched"])
def test_losses_of_single_modules_are_those_of_merged_kernels(seed_mode):
    batches, problem = _ragged(2), _given((1, 2))["problem"].replace(seed_mode=seed_mode)
    problem = problem.replace(index=jnp.array([[2, 0], [1, 2]]))  # some of the pool's modules, in an order of its own
    got = single_losses(batches, problem.replace(method=Fusion(granularity="global", magnitudes=False)))
    assert np.ptp(got) > 0.1
    model, pool = nnx.merge(problem.graph, problem.frozen.base), problem.frozen.pool
    for seed, modules in enumerate(np.asarray(problem.index)):
        for n, module in enumerate(modules):
            mixed = small_search.mixed(model, pool, np.eye(_MODULES)[module])
            picked = []
            for batch in batches:
                labels = batch.labels[seed]
                start = np.concatenate([np.zeros((4, 1), int), np.maximum(labels[:, :-1], 0)], axis=1)
                logits = mixed(batch.input_ids[seed], batch.input_mask[seed], start.astype(np.int32))
                log_probs = np.asarray(jax.nn.log_softmax(logits))
                picked += [log_probs[row, t, labels[row, t]] for row, t in np.argwhere(labels != IGNORED)]
            # Every token counts alike, whatever the batch that it is in.
            assert len(picked) == 9 + 4
            assert got[seed, n] == pytest.approx(-np.mean(picked), abs=1e-5)
    # Alone, a module is the same in either composition.
    np.testing.assert_allclose(single_losses(batches, problem.replace(method=LORAHUB)), got, atol=1e-5)
