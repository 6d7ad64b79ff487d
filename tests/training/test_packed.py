"""Packed steps have the loss and gradients of padded ones, for models, methods, seeds, 4 bits, meshes and chips."""

import contextlib
import copy
import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama
import tiny
from flax import nnx
from numpy.testing import assert_allclose

import lorafusion_jax as lf
from lorafusion_jax import training
from lorafusion_jax.crossbar import PRESETS as ARRAYS
from lorafusion_jax.models import qwen3_5
from lorafusion_jax.models.decoder import FAMILY
from lorafusion_jax.tasks import Encoded, Packing, Split, TrainingRows, train_batches

_CONFIG = replace(tiny.CONFIG, num_layers=1, num_decoder_layers=1, unroll=True)
_LLAMA = small_llama.CONFIG | {
    "vocab_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_QWEN = small_llama.QWEN3_5 | {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
_MODELS = {
    "t5": lambda: lf.models.T5(tiny.CONFIG, rngs=nnx.Rngs(0)),
    "llama": lambda: lf.models.Decoder(FAMILY.read_config(_LLAMA), rngs=nnx.Rngs(0)),
    # Windows that are shorter than rows, soft limits, and frequencies that depend on the lengths of rows.
    "gemma2": lambda: lf.models.Decoder(
        FAMILY.read_config(
            _LLAMA
            | {
                "model_type": "gemma2",
                "sliding_window": 3,
                "head_dim": 8,
                "attn_logit_softcapping": 1.5,
            }
            | {
                "final_logit_softcapping": 2.0,
                "max_position_embeddings": 6,
                "rope_parameters": _DYNAMIC,
            }
        ),
        rngs=nnx.Rngs(0),
    ),
    # A convolution and a memory that begin anew in every row.
    "qwen3.5": lambda: qwen3_5.Qwen35(
        qwen3_5.FAMILY.read_config(_LLAMA | _QWEN), rngs=nnx.Rngs(0)
    ),
}
_LENGTHS = [(5, 2), (9, 1), (3, 4), (7, 5), (12, 3), (1, 3), (6, 2), (4, 1)]


def _rows(config, count=8):
    rng = np.random.default_rng(0)
    return Encoded(*(
        tuple(rng.integers(3, config.vocab_size, length, np.int32) for length in lengths)
        for lengths in zip(*_LENGTHS[:count], strict=True)
    ))  # fmt: skip


def _packing(config):
    """Every width that saves tokens is worth a program."""
    return Packing(
        config.causal, lambda *shape: 1e9 * lf.models.rough_operations(config, *shape)
    )


def _both(config, order=(0, 1, 2, 3, 4, 5, -1, -1)):
    """Return a padded batch of one seed, and the packed one of the same rows."""
    orders = np.array([[order]], np.int32)
    encoded = _rows(config)
    padded = next(train_batches(encoded, orders, pad_id=0, packing=None))
    packed = next(train_batches(encoded, orders, pad_id=0, packing=_packing(config)))
    assert packed.rows is not None and packed.input_ids.shape[1] == 1
    return [
        jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), batch)
        for batch in (padded, packed)
    ]


def _compare(value_and_grad, batches, loss, gradients):
    """Losses agree to this relative error, gradients to this share of their largest entry."""
    (padded, slope), (packed, packed_slope) = map(value_and_grad, batches)
    assert float(packed) == pytest.approx(float(padded), rel=loss)
    leaves = jax.tree.leaves(slope)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in leaves)
    assert largest > 0
    for a, b in zip(leaves, jax.tree.leaves(packed_slope), strict=True):
        assert_allclose(b, a, rtol=0, atol=gradients * largest)


@pytest.mark.parametrize("name", _MODELS)
def test_models_have_the_loss_and_gradients_of_padded_rows(name):
    """In float64, with respect to every weight of the base."""
    model = _MODELS[name]()
    batches = _both(model.config)
    with jax.enable_x64(True):
        model.config = copy.copy(model.config)
        object.__setattr__(
            model.config, "dtype", "float64"
        )  # which the type checks of the tests refuse otherwise
        graph, base = nnx.split(model)
        base = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), base)

        @jax.jit
        def value_and_grad(batch):
            def loss(base):
                tokens = batch.input_ids, batch.input_mask, batch.labels
                logits = nnx.merge(graph, base).label_logits(*tokens, {}, batch.rows)
                return training.cross_entropy(logits, batch.labels)

            return jax.value_and_grad(loss)(base)

        _compare(value_and_grad, batches, 1e-9, 1e-9)


_SITES = tuple(
    (name, site)
    for name, site in _CONFIG.sites.items()
    if name.rpartition(".")[2] in "qv"
)
_METHODS = {
    "fusion": lf.Fusion(),
    "a mix": lf.Fusion(composition="mix", magnitudes=False),
    "lora": lf.LoRA(sites=_SITES, rank=3, alpha=5.0),
    "dora": lf.LoRA(sites=_SITES, rank=3, alpha=5.0, dora=True),
    "vera": lf.methods.VeRA(sites=_SITES, rank=7),
    "magnitudes": lf.methods.Magnitudes(tuple(name for name, _ in _SITES)),
    "full": lf.methods.FullFineTuning(),
}


@functools.cache
def _frozen(nf4=False):
    model = tiny.t5(_CONFIG)
    pool = tiny.pool(3, config=_CONFIG)
    if nf4:
        lf.models.set_matrices(
            model,
            {
                site: lf.quantise(w, "nf4", tiled_axis=-2)
                for site, w in lf.kernels(model).items()
            },
        )
        pool = pool.quantised("nf4")
    return tiny.frozen(model, pool)


def _problem(method, index, frozen=None, **more):
    frozen = method.precompute(frozen or _frozen(), lf.kernels(tiny.t5(_CONFIG)))
    return tiny.problem(method, frozen, index, _CONFIG, **more)


@pytest.mark.parametrize(
    ("name", "nf4"),
    [
        pytest.param(name, nf4, marks=() if name == "fusion" else pytest.mark.long)
        for name in _METHODS
        for nf4 in (False, True)
        if not (nf4 and name == "full")  # weights in 4 bits are not trained
    ],
)
def test_methods_have_the_loss_and_gradients_of_padded_rows(name, nf4):
    problem = _problem(_METHODS[name], (2, 0), _frozen(nf4))
    params = problem.init(jax.random.key(1))

    @jax.jit
    def value_and_grad(batch):
        return jax.value_and_grad(
            lambda params: lf.objective(params, batch, problem)[0]
        )(params)

    _compare(value_and_grad, _both(_CONFIG), 1e-6, 1e-5)


def _losses(seed_mode, *, pack, mesh=None):
    """Return the losses of 20 steps of two seeds, and those of validation."""
    seeds = (1, 2)
    train = np.tile(np.arange(8, dtype=np.int32), (2, 1))
    problem = _problem(lf.Fusion(), [[0, 1], [2, 1]], seed_mode=seed_mode)
    rows = TrainingRows(
        _rows(_CONFIG), Split(train, train[:, :3]), 0, _packing(_CONFIG)
    )
    recipe = replace(lf.PRESETS["default"], epochs=5, batch_size=4, pack=pack)
    epochs = []
    with (
        contextlib.nullcontext()
        if mesh is None
        else jax.set_mesh(training.make_mesh(mesh, len(seeds)))
    ):
        problem = problem.replace(index=training.on_mesh(problem.index, of_seeds=True))
        training.fit(
            problem,
            rows,
            training.start(problem, seeds),
            recipe,
            seeds,
            after_epoch=epochs.append,
        )
    return np.concatenate(
        [[*epoch.metrics["loss"], epoch.validation_loss] for epoch in epochs]
    )


@pytest.fixture(scope="module")
def padded():
    return _losses("sequential", pack=False)


@pytest.mark.parametrize(
    ("seed_mode", "mesh"),
    [
        ("sequential", None),
        pytest.param("batched", None, marks=pytest.mark.long),
        pytest.param("sequential", "seed=2", marks=pytest.mark.long),
    ],
)
def test_steps_have_the_losses_of_padded_steps(seed_mode, mesh, padded):
    """The seeds' batches differ in width, so in turn each seed has its own shape."""
    packed = _losses(seed_mode, pack=True, mesh=mesh)
    assert not np.array_equal(packed, padded)
    assert_allclose(packed, padded, rtol=1e-4)


@pytest.mark.long
def test_ideal_arrays_have_the_loss_of_padded_rows():
    chips = lf.hardware.program_on_arrays(
        nnx.split(tiny.t5(_CONFIG))[0],
        _frozen(),
        {"*": ARRAYS["ideal"]},
        jax.random.key(5),
    )
    problem = _problem(lf.Fusion(), (2, 0), chips)
    params = problem.init(jax.random.key(1))
    losses = [
        float(jax.jit(lambda b: lf.objective(params, b, problem)[0])(b))
        for b in _both(_CONFIG)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
