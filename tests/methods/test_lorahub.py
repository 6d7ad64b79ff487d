"""LoraHub's search: the objective of its code, the walk of its optimiser, and what it does to the process."""

import importlib.util
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_search
from flax import nnx

from lorafusion_jax.io.hf import base_tensor, load_base
from lorafusion_jax.io.pool import read_pool
from lorafusion_jax.methods import lorahub
from lorafusion_jax.tasks import Batch
from lorafusion_jax.training.frozen import SEARCH
from lorafusion_jax.training.problem import Problem

needs_nevergrad = pytest.mark.skipif(
    importlib.util.find_spec("nevergrad") is None, reason="needs nevergrad: pip install -e '.[lorahub]'"
)


def _golden(folder, seed_mode):
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
    return small_search.arguments(model, pool, batches, seeds=(42,), seed_mode=seed_mode)


def _without_seeds(arguments):
    return {name: value for name, value in arguments.items() if name != "seeds"}


@pytest.mark.parametrize("seed_mode", ["sequential", pytest.param("batched", marks=pytest.mark.long)])
def test_objective_replays_the_golden_search(goldens, seed_mode):
    folder = goldens / "fusion" / "t5a"
    arguments = _without_seeds(_golden(folder, seed_mode))
    golden = np.load(folder / "lorahub.npz")
    for weights, score in zip(golden["eval_weights"], golden["eval_scores"], strict=True):
        assert lorahub.score(weights[None], **arguments) == pytest.approx([score], abs=1e-4)


@needs_nevergrad
def test_search_walks_as_the_golden_one(goldens):
    folder = goldens / "fusion" / "t5a"
    found = lorahub.search(**_golden(folder, "sequential"), evaluations=40)
    golden = np.load(folder / "lorahub.npz")
    # The simplex that COBYLA starts from; later steps rest on differences of scores, whose last digits differ.
    np.testing.assert_allclose(found.tried[:5, 0], golden["eval_weights"][:5], atol=1e-6)
    assert found.scores.min() == pytest.approx(float(golden["final_score"]), abs=0.01)
    np.testing.assert_allclose(found.weights[0], golden["recommendation"], atol=0.1)


def test_objective_is_lorahubs():
    arguments = small_search.small(seeds=(1, 2))
    weights = np.array([[0.5, -1.0, 0.25], [0.0, 0.0, 0.0]])
    got = lorahub.score(weights, **_without_seeds(arguments))
    model = nnx.merge(arguments["problem"].graph, arguments["problem"].frozen.base)
    for seed, w in enumerate(weights):
        mixed = small_search.mixed(model, arguments["problem"].frozen.pool, w)
        total = 0.0
        for batch in arguments["batches"]:
            labels = batch.labels[seed]
            logits = mixed(batch.input_ids[seed], batch.input_mask[seed], np.zeros((4, 1), np.int32))
            real = np.asarray(labels[:, 0] >= 0)
            total -= np.asarray(jax.nn.log_softmax(logits[:, 0]))[real, labels[real, 0]].mean()
        assert got[seed] == pytest.approx(total / 7 + 0.05 * np.abs(w).mean(), abs=1e-5)


@needs_nevergrad
def test_search_improves_on_its_start_and_says_what_it_tried():
    arguments = small_search.small(seeds=(1, 2))
    seen = []
    found = lorahub.search(
        **arguments, evaluations=40, after_evaluation=lambda number, scores: seen.append((number, *scores))
    )
    assert found.tried.shape == (40, 2, 3) and (np.abs(found.tried) <= lorahub.BOUND).all()
    assert not found.tried[0].any()
    assert seen == [(number, *scores) for number, scores in enumerate(found.scores, start=1)]
    recommended = lorahub.score(found.weights, **_without_seeds(arguments))
    np.testing.assert_allclose(recommended, found.scores.min(axis=0), atol=1e-6)
    assert (recommended < found.scores[0] - 0.01).all()


@needs_nevergrad
def test_every_evaluation_and_batch_is_read_with_noise_of_its_own(monkeypatch):
    read, batches = [], []
    monkeypatch.setattr(Problem, "read", lambda problem, *number: read.append(number) or problem)
    monkeypatch.setattr(lorahub, "reads", lambda frozen, *number: batches.append(number) or frozen)
    lorahub.search(**small_search.small(), evaluations=3)
    assert read == [(SEARCH, 1), (SEARCH, 2), (SEARCH, 3)] and batches == [(0,), (1,)] * 3


@needs_nevergrad
def test_a_search_is_its_seeds_and_no_global_state():
    found = []
    for junk in (0, 1):
        np.random.seed(junk)  # noqa: NPY002, the global state that it might read
        found.append(lorahub.search(**small_search.small(seeds=(1, 2)), evaluations=12))
    np.testing.assert_array_equal(found[0].tried, found[1].tried)
    np.testing.assert_array_equal(found[0].weights, found[1].weights)


@needs_nevergrad
def test_an_interrupted_search_leaves_no_thread_that_keeps_python_alive():
    before = threading.active_count()

    def interrupt(number, scores):
        if number == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupted:
        lorahub.search(**small_search.small(), evaluations=40, after_evaluation=interrupt)
    # The traceback, which a dying interpreter keeps, holds the frames and what they name.
    assert interrupted.traceback
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before  # those of earlier searches may have ended meanwhile


@needs_nevergrad
@pytest.mark.parametrize("evaluations", [0, 151])
def test_evaluations_that_cannot_be_had(evaluations):
    with pytest.raises(ValueError, match=f"{evaluations} evaluations for 3 modules: wanted 1 to 150"):
        lorahub.search(**small_search.small(), evaluations=evaluations)


def test_missing_nevergrad_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(ValueError, match=r"needs nevergrad, .* pip install -e '\.\[lorahub\]'"):
        lorahub.search(**small_search.small())
