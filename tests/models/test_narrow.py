"""Loops over stacks of narrow numbers: results and gradients as without bits, and no more memory than that needs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from lorafusion_jax.adapters.composition import compose
from lorafusion_jax.crossbar import Segments
from lorafusion_jax.models import layers
from lorafusion_jax.models.architecture import kernels, set_matrices
from lorafusion_jax.models.narrow import from_bits, kept, to_bits
from lorafusion_jax.models.weights import dense, quantise

_LAYERS, _WIDTH = 6, 64


def _stack(dtype) -> jax.Array:
    numbers = jax.random.normal(jax.random.key(0), (_LAYERS, _WIDTH, _WIDTH))
    return (jnp.abs(4 * numbers) if jnp.issubdtype(dtype, jnp.integer) else 0.1 * numbers).astype(dtype)


def _body(x, layer):
    y = jnp.tanh(jnp.dot(x, layer.astype(x.dtype), preferred_element_type=jnp.float32) / 8).astype(x.dtype)
    return y, y[0]


def _plain(x, stack):
    return jax.lax.scan(_body, x, stack)


def _by_bits(x, stack, *, save: str | None = None):
    def body(carry, layer):
        return to_bits(_body(*from_bits((carry, layer))))

    if save is not None:
        body = jax.checkpoint(body, policy=jax.checkpoint_policies.save_only_these_names(save))
    return from_bits(jax.lax.scan(body, *to_bits((x, stack))))


def _equal(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.uint4, jnp.int4, jnp.float32, jnp.int8])
def test_a_loop_over_bits_is_a_loop_over_numbers(dtype):
    x = jax.random.normal(jax.random.key(1), (3, _WIDTH)).astype(jnp.bfloat16)
    _equal(jax.jit(_by_bits)(x, _stack(dtype)), jax.jit(_plain)(x, _stack(dtype)))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("save", [None, "nothing has this name"])
def test_gradients_are_those_of_the_numbers(batched, save):
    x = jax.random.normal(jax.random.key(1), (2, 3, _WIDTH) if batched else (3, _WIDTH)).astype(jnp.bfloat16)

    def loss(of, x, stack):
        run = jax.vmap(of, in_axes=(0, None)) if batched else of
        return jnp.sum(jnp.square(run(x, stack)[0].astype(jnp.float32)))

    gradients = [
        jax.jit(jax.grad(partial(loss, of), argnums=(0, 1)))(x, _stack(jnp.bfloat16))
        for of in (partial(_by_bits, save=save), _plain)
    ]
    assert all(np.any(np.asarray(g, np.float32)) for g in gradients[1])
    _equal(*gradients)


def test_gradients_pass_a_stack_of_integers():
    x = jax.random.normal(jax.random.key(1), (3, _WIDTH))

    def loss(of, x):
        return jnp.sum(of(x, _stack(jnp.uint4))[0])

    gradients = [jax.jit(jax.grad(partial(loss, of)))(x) for of in (_by_bits, _plain)]
    assert np.any(gradients[1])
    _equal(*gradients)


@pytest.mark.long
@pytest.mark.parametrize("remat", ["dots", pytest.param("none", marks=pytest.mark.nightly)])
@pytest.mark.usefixtures("own_programs")
def test_a_model_of_several_kinds_of_weights(monkeypatch, remat):
    """Bfloat16, NF4 and a stack of two kinds: losses and gradients of the adapters, with bits and without."""
    model = tiny.t5(dataclasses.replace(tiny.CONFIG, dtype="bfloat16", remat=remat))
    kernel = kernels(model)
    bfloat16 = {site: dense(k, jnp.bfloat16) for site, k in kernel.items()}
    parts = Segments((bfloat16["encoder.self.v"][:1], quantise(kernel["encoder.self.v"][1:], "nf4", tiled_axis=-2)))
    nf4 = quantise(kernel["encoder.ff.wo"], "nf4", tiled_axis=-2)
    set_matrices(model, bfloat16 | {"encoder.ff.wo": nf4, "encoder.self.v": parts})
    graph, base = nnx.split(model)
    pool, batch, index = tiny.pool(3), tiny.batch(), jnp.arange(3)

    def loss(coefficients, base):
        shared = {site: jnp.tile(coefficients[:, None], (len(a), 1, 1)) for site, a in pool.A.items()}
        adapters, _ = compose(pool, index, shared, "mix")
        logits = nnx.merge(graph, base)(batch.input_ids, batch.input_mask, jnp.maximum(batch.labels, 0), adapters)
        return jnp.mean(jnp.square(logits.astype(jnp.float32)))

    def both():
        return jax.jit(lambda *given: jax.value_and_grad(loss)(*given))(jnp.array([0.2, 0.5, 0.3]), base)

    with_bits = both()
    monkeypatch.setattr(layers, "to_bits", lambda tree: tree)
    without = both()
    assert np.all(np.abs(without[1]) > 0)
    for a, b in zip(with_bits, without, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.01)


def test_forward_derivatives():
    stack = _stack(jnp.bfloat16)
    x = jnp.ones((3, _WIDTH), jnp.bfloat16)
    _equal(*(jax.jvp(of, (x, stack), (x, stack)) for of in (_by_bits, _plain)))


@pytest.mark.parametrize(("dtype", "bits"), [(jnp.bfloat16, 16), (jnp.uint4, 4)])
def test_a_loop_holds_no_wider_copy_of_its_stack(dtype, bits):
    layers = 64
    stack = jax.ShapeDtypeStruct((layers, _WIDTH, _WIDTH), dtype)
    x = jax.ShapeDtypeStruct((1, _WIDTH), jnp.bfloat16)

    def temporaries(of) -> float:
        """Return the bits for each number of the stack."""
        found = jax.jit(lambda *given: of(*given)[0]).lower(x, stack).compile().memory_analysis()
        return 8 * found.temp_size_in_bytes / (layers * _WIDTH**2)

    assert temporaries(_by_bits) < 1.2 * bits
    if dtype == jnp.uint4 or jax.__version__.startswith("0.10."):  # Once this fails, there is no need of bits any more.
        assert temporaries(_plain) > 1.8 * bits


def test_odd_rows_and_single_numbers_stay_as_they_are():
    for array in (jnp.zeros((4, 3), jnp.uint4), jnp.zeros((), jnp.uint4), jnp.zeros(4, jnp.float32)):
        assert to_bits(array) is array


def test_other_devices_slice_the_numbers_themselves():
    stack = _stack(jnp.bfloat16)
    with tiny.for_tpu():
        assert to_bits({"a": stack})["a"] is stack


def test_what_the_backward_pass_keeps_is_kept_as_bits():
    x, stack = jnp.ones((3, _WIDTH), jnp.bfloat16), _stack(jnp.bfloat16)

    def by_bits(x, layer):
        return jnp.tanh(kept(x @ layer, "product")), None

    def plain(x, layer):
        return jnp.tanh(x @ layer), None

    def gradient(body):
        body = jax.checkpoint(body, policy=jax.checkpoint_policies.save_only_these_names("product"))
        return jax.grad(lambda x: jnp.sum(jax.lax.scan(body, x, stack)[0].astype(jnp.float32)))

    stacked = f"[{_LAYERS},3,{_WIDTH}]"
    assert f"u16{stacked}" in str(jax.make_jaxpr(gradient(by_bits))(x))
    assert f"u16{stacked}" not in str(jax.make_jaxpr(gradient(plain))(x))
    _equal(gradient(by_bits)(x), gradient(plain)(x))
