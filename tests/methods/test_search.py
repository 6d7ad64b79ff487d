"""Searches without gradients: LoraHub's objective and optimiser, and the best single module."""

import functools
import importlib.util
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import lorafusion_jax as lf
from lorafusion_jax.methods import find, lorahub
from lorafusion_jax.methods.entry import SearchJob
from lorafusion_jax.methods.merge import single_losses
from lorafusion_jax.models import T5, T5Config
from lorafusion_jax.tasks import IGNORED

_SEEDS = (1, 2)
needs_nevergrad = pytest.mark.skipif(
    importlib.util.find_spec("nevergrad") is None,
    reason="needs nevergrad: pip install -e '.[lorahub]'",
)

# A model of one layer, a pool for one of its sites, and the job of a search over them.

_SITE = "decoder.self.v"
_CONFIG = T5Config(
    vocab_size=16,
    d_model=8,
    d_kv=4,
    d_ff=16,
    num_heads=2,
    num_layers=1,
    num_decoder_layers=1,
)


def _job_of(
    model,
    pool,
    batches,
    *,
    seeds=(1,),
    method=lorahub.LORAHUB,
    seed_mode="sequential",
    record=lambda rows: None,
    **recipe,
):
    """A search over all modules of a pool, on batches whose leaves have an axis of seeds."""
    index = jnp.tile(jnp.arange(len(pool)), (len(seeds), 1))
    frozen = tiny.frozen(model, pool)
    problem = lf.Problem(
        graph=nnx.graphdef(model),
        method=method,
        frozen=frozen,
        index=index,
        seed_mode=seed_mode,
    )
    rows = SimpleNamespace(once=lambda size: iter(batches))
    return SearchJob(
        problem,
        rows,
        SimpleNamespace(batch_size=4, **recipe),
        seeds,
        (pool.names,) * len(seeds),
        record,
    )


def _small(seeds=(1,), **more):
    """A random model and pool of three modules, and two batches of one-token answers, those of the modules' sum.

    The second batch holds a row that only fills it up.
    """
    model, pool, batches = _drawn()
    batches = [
        jax.tree.map(lambda a: np.stack([np.asarray(a)] * len(seeds)), batch)
        for batch in batches
    ]
    return _job_of(model, pool, batches, seeds=seeds, **more)


@functools.cache
def _drawn():
    model = T5(_CONFIG, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(2, 1, 3, 2, 8)).astype(np.float32)
    pool = lf.LoraPool(
        A={_SITE: jnp.asarray(A.swapaxes(2, 3))},
        B={_SITE: jnp.asarray(B)},
        rank={_SITE: jnp.full((1, 3), 2)},
        names=("a", "b", "c"),
    )
    batches = []
    for real in (4, 3):
        row_mask = np.arange(4) < real
        ids = rng.integers(2, 16, (4, 5)).astype(np.int32)
        mask = np.broadcast_to(row_mask[:, None], ids.shape)
        answers = np.argmax(
            _mixed(model, pool, np.ones(3))(ids, mask, np.zeros((4, 1), np.int32)),
            axis=-1,
        )
        labels = np.where(row_mask[:, None], answers, -100).astype(np.int32)
        batches.append(lf.Batch(ids, mask, labels, row_mask))
    return model, pool, batches


def _mixed(model, pool, weights):
    """Return the model with A' B' added to its kernel: the oracle, which knows no adapters."""
    A = np.einsum("lnab,n->lab", np.asarray(pool.A[_SITE]), weights)
    B = np.einsum("lnab,n->lab", np.asarray(pool.B[_SITE]), weights)
    kernel = np.asarray(lf.kernels(model)[_SITE]) + A @ B
    mixed = nnx.clone(model)
    mixed.decoder.self_attention.v.kernel.set_value(jnp.asarray(kernel, jnp.float32))
    graph, weights = nnx.split(mixed)
    return lambda *inputs: _logits(graph, weights, *map(jnp.asarray, inputs))


@functools.partial(jax.jit, static_argnames="graph")
def _logits(graph, weights, ids, mask, start):
    return nnx.merge(graph, weights)(ids, mask, start)


# The objective.


def _arrays(path):
    with np.load(path) as file:
        return dict(file)


def _golden(folder, seed_mode):
    model = lf.load_base(folder / "base")
    sources = [str(folder / "adapters" / f"lora_{n}") for n in range(4)]
    pool = lf.read_pool(
        sources, model.config, base_tensor=lf.base_tensor(folder / "base")
    )
    arrays = _arrays(folder / "inputs.npz")
    batches = [
        lf.Batch(
            input_ids=jnp.asarray(arrays[f"input_ids_{k}"], jnp.int32)[None],
            input_mask=jnp.asarray(arrays[f"attention_mask_{k}"] > 0)[None],
            labels=jnp.asarray(arrays[f"labels_{k}"], jnp.int32)[None],
            row_mask=jnp.ones((1, len(arrays[f"labels_{k}"])), bool),
        )
        for k in (0, 1)
    ]
    job = _job_of(model, pool, batches, seeds=(42,), seed_mode=seed_mode)
    return lorahub.objective_of(job), _arrays(folder / "lorahub.npz")


@pytest.mark.parametrize(
    "seed_mode", ["sequential", pytest.param("batched", marks=pytest.mark.long)]
)
def test_the_objective_equals_the_golden_search(goldens, seed_mode):
    objective, golden = _golden(goldens / "fusion" / "t5a", seed_mode)
    for weights, score in zip(
        golden["eval_weights"], golden["eval_scores"], strict=True
    ):
        assert objective(1, weights[None]) == pytest.approx([score], abs=1e-4)


@needs_nevergrad
def test_the_search_proposes_the_weights_of_the_golden_search(goldens):
    objective, golden = _golden(goldens / "fusion" / "t5a", "sequential")
    tried = []

    def recorded(number, weights):
        tried.append(weights[0])
        return objective(number, weights)

    found = lorahub.search(recorded, (42,), 4, evaluations=40)
    # The simplex that COBYLA starts from; later steps depend on differences of scores, whose last digits differ.
    assert_allclose(tried[:5], golden["eval_weights"][:5], atol=1e-6)
    assert objective(1, found) == pytest.approx(float(golden["final_score"]), abs=0.01)
    assert_allclose(found[0], golden["recommendation"], atol=0.1)


# The searches.


@needs_nevergrad
def test_a_search_improves_on_zeros_and_reports_every_round():
    lines = []
    job = _small(_SEEDS, record=lines.extend, evaluations=40)
    params, rounds = find("lorahub").search(job)
    objective = lorahub.objective_of(job)
    zero = objective(1, np.zeros((2, 3)))
    found = objective(1, np.asarray(params["coefficients"], float))
    assert (found < zero - 0.01).all()
    scores = np.array([line["score"] for line in lines]).reshape(rounds, 2)
    assert_allclose(scores.min(axis=0), found, atol=1e-6)
    steps = [(line["step"], line["seed"]) for line in lines]
    assert steps == [
        (number, seed) for number in range(1, rounds + 1) for seed in _SEEDS
    ]


@needs_nevergrad
def test_the_weights_of_a_seed_depend_on_the_seed_alone():
    def objective(number, weights):
        return np.sum((weights - 0.5) ** 2, axis=1)

    found = {}
    for seeds in ((1, 2, 3), (3,)):
        np.random.seed(len(seeds))  # noqa: NPY002, the global state that it might read
        found[seeds] = lorahub.search(objective, seeds, 20, evaluations=200)
    assert_array_equal(found[3,][0], found[1, 2, 3][2])
    assert np.sum((found[3,] - 0.5) ** 2) < 0.2 * 20 * 0.5**2


@needs_nevergrad
def test_weights_stay_within_the_bounds():
    """The further out the better."""
    tried = []

    def objective(number, weights):
        tried.append(weights)
        return -np.abs(weights).sum(axis=1)

    found = lorahub.search(objective, _SEEDS, 3, evaluations=150)
    assert 0.99 * lorahub.BOUND < np.abs(tried).max() <= lorahub.BOUND
    assert (np.abs(found) > 0.99 * lorahub.BOUND).all()


@needs_nevergrad
def test_an_interrupted_search_leaves_no_thread_that_keeps_python_alive():
    before = threading.active_count()

    def interrupt(number, weights):
        if number == 6:
            raise KeyboardInterrupt
        return np.sum(weights**2, axis=1)

    with pytest.raises(KeyboardInterrupt) as interrupted:
        lorahub.search(interrupt, (1,), 3, evaluations=40)
    # The traceback, which a dying interpreter keeps, holds the frames and what they name.
    assert interrupted.traceback
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (
        threading.active_count() <= before
    )  # those of earlier searches may have ended meanwhile


# Single modules.


def _ragged():
    """Batches of several target tokens, of which the second has fewer, other ones for every seed."""
    rng = np.random.default_rng(7)
    batches = []
    for lengths in ((3, 2, 3, 1), (1, 1, 2, 0)):
        real = np.array(lengths) > 0
        mask = np.broadcast_to(real[:, None], (2, 4, 5))
        ids = rng.integers(2, 16, (2, 4, 5))
        labels = rng.integers(2, 16, (2, 4, 3))
        labels = np.where(np.arange(3) < np.array(lengths)[:, None], labels, IGNORED)
        row_mask = np.broadcast_to(real, (2, 4)).copy()
        batches.append(
            lf.Batch(ids.astype(np.int32), mask, labels.astype(np.int32), row_mask)
        )
    return batches


def test_a_module_without_a_finite_loss_is_never_the_best():
    job = _small(_SEEDS, method=lf.Fusion(granularity="global", magnitudes=False))
    losses = single_losses(list(job.rows.once(4)), job.problem)
    best = int(np.argmin(losses[0]))
    frozen = job.problem.frozen
    # overflows where it is read, and is zero where it is not
    B = frozen.pool.B[_SITE].at[:, best].set(3e38)
    frozen = replace(frozen, pool=replace(frozen.pool, B={_SITE: B}))
    problem = job.problem.replace(frozen=frozen)
    params, steps = find("single").search(job._replace(problem=problem))
    losses[:, best] = np.inf
    assert_array_equal(params["coefficients"], np.eye(3)[losses.argmin(axis=1)])
    assert steps == 3


@pytest.mark.parametrize("seed_mode", ["sequential", "batched"])
def test_losses_of_single_modules_are_those_of_merged_kernels(seed_mode):
    method = lf.Fusion(granularity="global", magnitudes=False)
    batches = _ragged()
    problem = _small(_SEEDS, seed_mode=seed_mode, method=method).problem
    problem = problem.replace(
        index=jnp.array([[2, 0], [1, 2]])
    )  # some of the pool's modules, in another order
    got = single_losses(batches, problem)
    assert np.ptp(got) > 0.1
    model = nnx.merge(problem.graph, problem.frozen.base)
    pool = problem.frozen.pool
    for seed, modules in enumerate(np.asarray(problem.index)):
        for n, module in enumerate(modules):
            mixed = _mixed(model, pool, np.eye(3)[module])
            picked = []
            for batch in batches:
                labels = batch.labels[seed]
                start = np.pad(np.maximum(labels[:, :-1], 0), [(0, 0), (1, 0)])
                logits = mixed(batch.input_ids[seed], batch.input_mask[seed], start)
                log_probs = jax.nn.log_softmax(logits)
                rows, places = np.nonzero(labels != IGNORED)
                picked += log_probs[rows, places, labels[rows, places]].tolist()
            # Every token counts alike, whatever its batch.
            assert len(picked) == 9 + 4
            assert got[seed, n] == pytest.approx(-np.mean(picked), abs=1e-5)
