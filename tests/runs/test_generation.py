"""Answers of runs in batches of few rows: those that `generate` gives for all rows at once."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama
import tiny
from flax import nnx
from numpy.testing import assert_array_equal

import lorafusion_jax as lf
from lorafusion_jax.crossbar import PRESETS, Device, ReadNoise
from lorafusion_jax.hardware import program_on_arrays
from lorafusion_jax.loading.model import evaluation_compile_cost
from lorafusion_jax.models import GREEDY, T5, Decoder
from lorafusion_jax.models.decoder import FAMILY
from lorafusion_jax.runs import generate_rows
from lorafusion_jax.runs.generation import draw_keys
from lorafusion_jax.tasks import Encoded, eval_batches, pad
from lorafusion_jax.training import make_mesh, on_mesh
from lorafusion_jax.training.method import GENERATION

_ENDS = (1, 5, 9, 13)
_TINY = small_llama.CONFIG | {
    "vocab_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": list(_ENDS),
}
_WINDOWS = (
    _TINY
    | {
        "model_type": "gemma2",
        "sliding_window": 3,
        "head_dim": 8,
        "max_position_embeddings": 6,
    }
    | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}}
)
_DRAWN = lf.Sampling(temperature=1.5, top_k=20)


def _model(family):
    if family in ("t5", "fused"):
        return T5(replace(tiny.CONFIG, eos_id=_ENDS), rngs=nnx.Rngs(0))
    config = FAMILY.read_config({"llama": _TINY, "windows": _WINDOWS}[family])
    return Decoder(replace(config, dtype="float32"), rngs=nnx.Rngs(3))


def _problem(family, seeds, seed_mode="sequential"):
    """A problem of seeds with random modules, and their numbers."""
    graph, weights = nnx.split(_model(family))
    model = nnx.merge(graph, weights)
    method = lf.LoRA(sites=tuple(model.config.sites.items()), rank=2)
    index = jnp.zeros((seeds, 0), jnp.int32)
    frozen = lf.Frozen(weights)
    if family == "fused":
        method = lf.Fusion(magnitudes=False, granularity="rank")
        index = jnp.array([[2, 0]])
        frozen = method.precompute(
            lf.Frozen(weights, tiny.pool(3).quantised("int8")), lf.kernels(model)
        )
    problem = lf.Problem(
        graph=graph, method=method, frozen=frozen, index=index, seed_mode=seed_mode
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(
        jax.vmap(problem.replace(index=index[0]).init),
        jax.random.split(jax.random.key(0), seeds),
    )
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes
    )
    return problem, params


def _prompts(count, longest=8):
    rng = np.random.default_rng(1)
    rows = tuple(
        rng.integers(14, 48, length).astype(np.int32)
        for length in rng.integers(2, longest + 1, count)
    )
    return Encoded(rows, tuple(np.zeros(0, np.int32) for _ in rows))


def _wanted(problem, params, prompts, tokens, sampling=GREEDY):
    """Every seed's answers, all rows of one batch, each as long as the longest."""
    ids = jnp.asarray(pad(prompts.inputs, 0, 8))
    mask = jnp.asarray(
        np.arange(8) < np.array([len(row) for row in prompts.inputs])[:, None]
    )
    keys = draw_keys(sampling, 7, np.arange(len(ids)))

    @jax.jit
    def of_seed(params, index):
        model, adapters, _ = problem.replace(index=index).adapted_model(params)
        return lf.generate(
            model,
            ids,
            mask,
            adapters,
            max_new_tokens=tokens,
            sampling=sampling,
            row_keys=keys,
        )

    seeds = range(len(problem.index))
    return np.stack(
        [
            of_seed(jax.tree.map(lambda p, s=s: p[s], params), problem.index[s])
            for s in seeds
        ]
    )


def _said(problem, params, prompts, tokens, size, sampling=GREEDY, **more):
    how = {
        "pad_id": 0,
        "sampling": sampling,
        "keys": partial(draw_keys, sampling, 7),
    } | more
    return generate_rows(
        params,
        lambda number: problem,
        prompts,
        batch_size=size,
        max_new_tokens=tokens,
        **how,
    )


def _lengths(tokens):
    return np.sum(tokens != 0, axis=-1)


@pytest.mark.parametrize(
    ("family", "sampling"),
    [("t5", _DRAWN), ("llama", GREEDY), ("windows", _DRAWN)],
    ids=["t5", "llama", "windows"],
)
def test_answers_are_those_of_generate(family, sampling):
    """Of 23 prompts, in batches of 12 rows, which shrink as rows end."""
    problem, params = _problem(family, 1)
    prompts = _prompts(23)
    wanted = _wanted(problem, params, prompts, 40, sampling)
    assert len({*_lengths(wanted)[0].tolist()}) > (1 if sampling is GREEDY else 3)
    ended = []
    found = _said(
        problem,
        params,
        prompts,
        40,
        12,
        sampling,
        compile_cost=1.0,
        update=ended.append,
    )
    assert_array_equal(found, wanted)
    assert sum(ended) == 23


@pytest.mark.parametrize(
    ("family", "tokens", "size"), [("fused", 12, 1), ("llama", 1, 5)]
)
def test_one_row_or_one_token_at_most(family, tokens, size):
    problem, params = _problem(family, 1)
    prompts = _prompts(4)
    found = _said(problem, params, prompts, tokens, size)
    assert_array_equal(found, _wanted(problem, params, prompts, tokens))


@pytest.mark.parametrize(
    ("seed_mode", "mesh"), [("batched", None), ("sequential", "seed=2")]
)
def test_seeds_have_their_own_pace(seed_mode, mesh):
    problem, params = _problem("t5", 4, seed_mode)
    prompts = _prompts(11)
    wanted = _wanted(problem, params, prompts, 40, _DRAWN)
    assert len({*np.sum(_lengths(wanted), axis=1).tolist()}) == 4
    if mesh is None:
        found = _said(problem, params, prompts, 40, 8, _DRAWN, compile_cost=1.0)
    else:
        with jax.set_mesh(make_mesh(mesh, 4)):
            there = on_mesh(problem.index, of_seeds=True)
            found = _said(
                problem.replace(index=there),
                on_mesh(params, of_seeds=True),
                prompts,
                40,
                8,
                _DRAWN,
                compile_cost=1.0,
            )
    assert_array_equal(found, wanted)


def test_rows_end_with_what_stops_them():
    """Answers that contain 20 are stopped at the next search, every third token."""
    problem, params = _problem("t5", 1)
    prompts = _prompts(23)
    wanted = _wanted(problem, params, prompts, 12, _DRAWN)[0]
    found = _said(
        problem,
        params,
        prompts,
        12,
        5,
        _DRAWN,
        stops=lambda rows: [20 in row for row in rows],
        between_stops=3,
    )[0]
    stopped = np.any(wanted == 20, axis=1)
    assert 0 < stopped.sum() < 23
    assert_array_equal(found[~stopped], wanted[~stopped])
    for row, whole in zip(found[stopped], wanted[stopped], strict=True):
        length = _lengths(row)
        assert 20 in row[:length]
        assert_array_equal(row[:length], whole[:length])
    assert _lengths(found).sum() < _lengths(wanted).sum()


def test_chips_with_read_noise_answer_batch_after_batch():
    """As `generate` answers each batch, each with its own noise."""
    problem, params = _problem("t5", 2)
    noisy = replace(PRESETS["ideal"], device=Device(read_noise=ReadNoise(0.1)))
    chip = program_on_arrays(
        problem.graph, problem.frozen, {"decoder.self.v": noisy}, jax.random.key(3)
    )
    problem = problem.replace(frozen=chip)
    prompts = _prompts(11)
    wanted = np.zeros((2, 11, 6), np.int32)

    @jax.jit
    def answers(params, batch, problem):
        def of_seed(one, params):
            model, adapters, _ = one.adapted_model(params)
            return lf.generate(
                model,
                batch.input_ids,
                batch.input_mask,
                adapters,
                row_mask=batch.row_mask,
                max_new_tokens=6,
            )

        return problem.over_seeds(of_seed, (params,))

    compile_cost = evaluation_compile_cost(problem.config)
    for number, (rows, batch) in enumerate(
        eval_batches(prompts, 4, pad_id=0, compile_cost=compile_cost)
    ):
        said = answers(params, batch, problem.read(GENERATION, number))
        wanted[:, rows[rows >= 0]] = np.asarray(said)[:, rows >= 0]
    found = generate_rows(
        params,
        partial(problem.read, GENERATION),
        prompts,
        batch_size=4,
        max_new_tokens=6,
        pad_id=0,
    )
    assert_array_equal(found, wanted)
    digital = _wanted(_problem("t5", 2)[0], params, prompts, 6)
    assert not np.array_equal(found, digital)
