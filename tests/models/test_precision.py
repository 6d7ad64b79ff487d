"""Which products of a lowered program ask for float32 in full.

TPUs and recent NVIDIA cards multiply float32 numbers in bfloat16 or TF32 unless asked not to. Products of weights with
weights (norms, Gram terms, mixes) ask; products with activations, of which every adapter and the base are made, do not.
Everything is lowered for a TPU, which needs none.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lorafusion_jax as lf
from lorafusion_jax.adapters.norms import pair_terms

_DOT = re.compile(
    r"stablehlo\.dot_general .*?precision = \[(\w+), (\w+)\].*?: \(tensor<([\dx]+)x\w+>, tensor<([\dx]+)x\w+>\)"
)
_ROWS = 7  # of a batch; no weight has an axis of a multiple of it
_MODEL = tiny.t5()


def _products(function, *args):
    """Of every product in a lowered program: whether both factors are of weights, and whether it asks for float32."""
    leaves, tree = jax.tree.flatten(args)
    # Lowering makes the arguments' trees anew from what the checks of types do not take for arrays.
    traced = jax.jit(
        lambda leaves: jax.tree.leaves(function(*tree.unflatten(leaves)))
    ).trace(leaves)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    found = _DOT.findall(text)
    assert len(found) == text.count("stablehlo.dot_general")
    return [
        (
            all(int(n) % _ROWS for n in (left + "x" + right).split("x")),
            (a, b) == ("HIGHEST", "HIGHEST"),
        )
        for a, b, left, right in found
    ]


def _check(products, *, of_weights=True):
    assert any(weights for weights, _ in products) == of_weights
    assert all(highest == weights for weights, highest in products)


def _step(method, pool, terms=lf.gram):
    problem = tiny.problem(method, tiny.frozen(_MODEL, pool, terms), (0, 1, 2))
    state = lf.init_state(problem, jax.random.key(0))
    rates = {group: jnp.float32(0.1) for group in state.params}
    step = partial(lf.fusion_step, optimisation=lf.Optimisation(steps=1))
    return _products(step, state, tiny.batch(rows=_ROWS), problem, rates)


@pytest.mark.parametrize("terms", [lf.gram, pair_terms])
def test_gram_terms(terms):
    pool = tiny.pool(2)
    _check(_products(terms, pool, {site: lf.kernels(_MODEL)[site] for site in pool.A}))


@pytest.mark.parametrize(
    ("composition", "rank", "differentiate_norm"),
    [("mix", 4, True), ("sum", 2, True), ("sum", 4, True), ("sum", 6, False)],
)
def test_a_step(composition, rank, differentiate_norm):
    """Ranks of 2, 4 and 6 make the norm by the Gram matrix, by dW a layer at a time, and from dW as a matrix."""
    method = lf.Fusion(composition=composition, differentiate_norm=differentiate_norm)
    _check(_step(method, tiny.pool(3, lambda n, site, layer: rank)))


def test_a_step_with_pair_terms_or_in_a_shared_basis():
    method = lf.Fusion(differentiate_norm=True)
    _check(_step(method, tiny.pool(3), pair_terms))
    basis = lf.shared_basis(tiny.pool(3), 5)
    _check(_products(lf.gram, basis, {s: lf.kernels(_MODEL)[s] for s in basis.rank}))
    _check(_step(lf.Fusion(basis=5, differentiate_norm=True), basis))


def test_a_dora_in_training():
    rng = np.random.default_rng(0)
    A = jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)
    B = jnp.asarray(rng.normal(size=(3, 12)), jnp.float32)
    W = jnp.asarray(rng.normal(size=(16, 12)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(_ROWS, 16)), jnp.float32)
    _check(
        _products(
            jax.value_and_grad(lambda d, x, W: jnp.sum(d(x, W))),
            lf.WeightDecomposed(A, B, jnp.ones(12)),
            x,
            W,
        )
    )
