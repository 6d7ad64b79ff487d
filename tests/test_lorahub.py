"""LoraHub's search: the objective of its code, the walk of its optimiser, and what it does to the process."""

import importlib.util
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorafusion_jax.fusion.compose import gram
from lorafusion_jax.fusion.pool import LoraPool
from lorafusion_jax.io.hf import base_tensor, load_base
from lorafusion_jax.io.pool import read_pool
from lorafusion_jax.models.t5 import T5, T5Config, kernels
from lorafusion_jax.tasks import Batch
from lorafusion_jax.train.methods import Frozen
from lorafusion_jax.train.search import lorahub, objective

_SITE = "decoder.self.v"
_CONFIG = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_heads=2, num_layers=1, num_decoder_layers=1)


needs_nevergrad = pytest.mark.skipif(
    importlib.util.find_spec("nevergrad") is None, reason="needs nevergrad: pip install -e '.[lorahub]'"
)


def _golden(folder, path):
    model = load_base(folder / "base")
    sources = [str(folder / "adapters" / f"lora_{n}") for n in range(4)]
    pool = read_pool(sources, model.config, base_tensor=base_tensor(folder / "base"))
    arrays = np.load(folder / "inputs.npz")
    batches = [
        Batch(
            input_ids=jnp.asarray(arrays[f"input_ids_{k}"], jnp.int32)[None],
            input_mask=jnp.asarray(arrays[f"attention_mask_{k}"] > 0)[None],
            labels=jnp.asarray(arrays[f"labels_{k}"], jnp.int32)[None],
            row_mask=jnp.ones((1, len(arrays[f"labels_{k}"])), bool),
        )
        for k in (0, 1)
    ]
    return _arguments(model, pool, batches, seeds=(42,), path=path)


def _arguments(model, pool, batches, *, seeds, path="map"):
    graph, base = nnx.split(model)
    used = {site: kernel for site, kernel in kernels(model).items() if site in pool.A}
    index = jnp.tile(jnp.arange(len(pool)), (len(seeds), 1))
    return {
        "batches": batches,
        "index": index,
        "frozen": Frozen(base, pool, gram(pool, used)),
        "seeds": seeds,
        "graph": graph,
        "path": path,
    }


def _without_seeds(arguments):
    return {name: value for name, value in arguments.items() if name != "seeds"}


def _small(seeds=(1,), modules=3):
    """A random model and pool, and two batches of one-token answers, those of the modules' sum.

    The second batch holds a row that only fills it up.
    """
    model = T5(_CONFIG, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(2, 1, modules, 2, 8)).astype(np.float32)
    pool = LoraPool(
        A={_SITE: jnp.asarray(A.swapaxes(2, 3))},
        B={_SITE: jnp.asarray(B)},
        rank={_SITE: jnp.full((1, modules), 2)},
        names=tuple("abcdefgh"[:modules]),
    )
    batches = []
    for real in (4, 3):
        row_mask = np.arange(4) < real
        ids = rng.integers(2, 16, (4, 5)).astype(np.int32)
        mask = np.broadcast_to(row_mask[:, None], ids.shape)
        answers = np.argmax(_mixed(model, pool, np.ones(modules))(ids, mask, np.zeros((4, 1), np.int32)), axis=-1)
        labels = np.where(row_mask[:, None], answers, -100).astype(np.int32)
        batch = Batch(ids, mask, labels, row_mask)
        batches.append(jax.tree.map(lambda a: jnp.asarray(np.stack([a] * len(seeds))), batch))
    return _arguments(model, pool, batches, seeds=seeds)


def _mixed(model, pool, weights):
    """Return the model with A' B' added to its kernel: the oracle, which knows no adapters."""
    A, B = (np.einsum("lnab,n->lab", np.asarray(m[_SITE]), weights) for m in (pool.A, pool.B))
    kernel = np.asarray(kernels(model)[_SITE]) + A @ B
    mixed = nnx.clone(model)
    mixed.decoder.self_attention.v.kernel.set_value(jnp.asarray(kernel, jnp.float32))
    return jax.jit(lambda ids, mask, start: mixed(*map(jnp.asarray, (ids, mask, start))))


@pytest.mark.parametrize("path", ["map", "vmap"])
def test_objective_replays_the_golden_search(shared, path):
    folder = shared / "goldens" / "fusion" / "t5a"
    arguments = _without_seeds(_golden(folder, path))
    golden = np.load(folder / "lorahub_nevergrad_seed42.npz")
    for weights, score in zip(golden["eval_weights"], golden["eval_scores"], strict=True):
        assert objective.score(weights[None], **arguments) == pytest.approx([score], abs=1e-4)


@needs_nevergrad
def test_search_walks_as_the_golden_one(shared):
    folder = shared / "goldens" / "fusion" / "t5a"
    found = lorahub.search(**_golden(folder, "map"), evaluations=40)
    golden = np.load(folder / "lorahub_nevergrad_seed42.npz")
    # The simplex that COBYLA starts from; later steps rest on differences of scores, whose last digits differ.
    np.testing.assert_allclose(found.tried[:5, 0], golden["eval_weights"][:5], atol=1e-6)
    assert found.scores.min() == pytest.approx(float(golden["final_score"]), abs=0.01)
    np.testing.assert_allclose(found.weights[0], golden["recommendation"], atol=0.1)


def test_objective_is_lorahubs():
    arguments = _small(seeds=(1, 2))
    weights = np.array([[0.5, -1.0, 0.25], [0.0, 0.0, 0.0]])
    got = objective.score(weights, **_without_seeds(arguments))
    model = nnx.merge(arguments["graph"], arguments["frozen"].base)
    for seed, w in enumerate(weights):
        mixed = _mixed(model, arguments["frozen"].pool, w)
        total = 0.0
        for batch in arguments["batches"]:
            labels = batch.labels[seed]
            logits = mixed(batch.input_ids[seed], batch.input_mask[seed], np.zeros((4, 1), np.int32))
            real = np.asarray(labels[:, 0] >= 0)
            total -= np.asarray(jax.nn.log_softmax(logits[:, 0]))[real, labels[real, 0]].mean()
        assert got[seed] == pytest.approx(total / 7 + 0.05 * np.abs(w).mean(), abs=1e-5)


@needs_nevergrad
def test_search_improves_on_its_start_and_says_what_it_tried():
    arguments = _small(seeds=(1, 2))
    seen = []
    found = lorahub.search(
        **arguments, evaluations=40, after_evaluation=lambda number, scores: seen.append((number, *scores))
    )
    assert found.tried.shape == (40, 2, 3) and (np.abs(found.tried) <= objective.BOUND).all()
    assert not found.tried[0].any()
    assert seen == [(number, *scores) for number, scores in enumerate(found.scores, start=1)]
    recommended = objective.score(found.weights, **_without_seeds(arguments))
    np.testing.assert_allclose(recommended, found.scores.min(axis=0), atol=1e-6)
    assert (recommended < found.scores[0] - 0.01).all()


@needs_nevergrad
def test_a_search_is_its_seeds_and_no_global_state():
    found = []
    for junk in (0, 1):
        np.random.seed(junk)  # noqa: NPY002, the global state that it might read
        found.append(lorahub.search(**_small(seeds=(1, 2)), evaluations=12))
    np.testing.assert_array_equal(found[0].tried, found[1].tried)
    np.testing.assert_array_equal(found[0].weights, found[1].weights)


@needs_nevergrad
def test_an_interrupted_search_leaves_no_thread_that_keeps_python_alive():
    before = threading.active_count()

    def interrupt(number, scores):
        if number == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupted:
        lorahub.search(**_small(), evaluations=40, after_evaluation=interrupt)
    # The traceback, which a dying interpreter keeps, holds the frames and what they name.
    assert interrupted.traceback
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


@needs_nevergrad
@pytest.mark.parametrize("evaluations", [0, 151])
def test_evaluations_that_cannot_be_had(evaluations):
    with pytest.raises(ValueError, match=f"{evaluations} evaluations for 3 modules: wanted 1 to 150"):
        lorahub.search(**_small(), evaluations=evaluations)


def test_missing_nevergrad_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(ValueError, match=r"needs nevergrad, .* pip install -e '\.\[lorahub\]'"):
        lorahub.search(**_small())
