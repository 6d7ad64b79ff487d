"""Loops over stacks of narrow numbers: results and gradients as without bits, and no more memory than that needs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.models.bit_cast import from_bits, to_bits

_LAYERS = 6
_WIDTH = 64


def _stack(dtype):
    numbers = jax.random.normal(jax.random.key(0), (_LAYERS, _WIDTH, _WIDTH))
    return (
        jnp.abs(4 * numbers) if jnp.issubdtype(dtype, jnp.integer) else 0.1 * numbers
    ).astype(dtype)


def _body(x, layer):
    y = jnp.tanh(
        jnp.dot(x, layer.astype(x.dtype), preferred_element_type=jnp.float32) / 8
    ).astype(x.dtype)
    return y, y[0]


def _plain(x, stack):
    return jax.lax.scan(_body, x, stack)


def _by_bits(x, stack, *, save=None):
    def body(carry, layer):
        return to_bits(_body(*from_bits((carry, layer))))

    if save is not None:
        body = jax.checkpoint(
            body, policy=jax.checkpoint_policies.save_only_these_names(save)
        )
    return from_bits(jax.lax.scan(body, *to_bits((x, stack))))


def _equal(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(
            np.asarray(a, np.float32), np.asarray(b, np.float32)
        )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.uint4, jnp.int4])
def test_a_loop_over_bits_is_a_loop_over_numbers(dtype):
    x = jax.random.normal(jax.random.key(1), (3, _WIDTH)).astype(jnp.bfloat16)
    _equal(jax.jit(_by_bits)(x, _stack(dtype)), jax.jit(_plain)(x, _stack(dtype)))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("save", [None, "nothing has this name"])
def test_gradients_are_those_of_the_numbers(batched, save):
    x = jax.random.normal(
        jax.random.key(1), (2, 3, _WIDTH) if batched else (3, _WIDTH)
    ).astype(jnp.bfloat16)

    def loss(of, x, stack):
        run = jax.vmap(of, in_axes=(0, None)) if batched else of
        return jnp.sum(jnp.square(run(x, stack)[0].astype(jnp.float32)))

    gradients = [
        jax.jit(jax.grad(partial(loss, of), argnums=(0, 1)))(x, _stack(jnp.bfloat16))
        for of in (partial(_by_bits, save=save), _plain)
    ]
    assert all(np.any(np.asarray(g, np.float32)) for g in gradients[1])
    _equal(*gradients)


@pytest.mark.parametrize(("dtype", "bits"), [(jnp.bfloat16, 16), (jnp.uint4, 4)])
def test_a_loop_holds_no_wider_copy_of_its_stack(dtype, bits):
    layers = 64
    stack = jax.ShapeDtypeStruct((layers, _WIDTH, _WIDTH), dtype)
    x = jax.ShapeDtypeStruct((1, _WIDTH), jnp.bfloat16)

    def temporaries(of):
        """Return the bits for each number of the stack."""
        found = (
            jax.jit(lambda *given: of(*given)[0])
            .lower(x, stack)
            .compile()
            .memory_analysis()
        )
        return 8 * found.temp_size_in_bytes / (layers * _WIDTH**2)

    assert temporaries(_by_bits) < 1.2 * bits
    if dtype == jnp.uint4 or jax.__version__.startswith(
        "0.10."
    ):  # Once this fails, there is no need of bits any more.
        assert temporaries(_plain) > 1.8 * bits
