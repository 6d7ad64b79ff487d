"""The public names, and what they are enough for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import one_block
from flax import nnx

import lorafusion_jax as lf


def test_every_public_name_is_there_and_documented():
    assert len(set(lf.__all__)) == len(lf.__all__)
    for name in lf.__all__:
        assert getattr(lf, name).__doc__ or name == "PRESETS", name


def test_a_fusion_is_read_trained_and_merged_with_public_names_alone(tmp_path):
    """A gradient step by hand goes where `fusion_step` goes, and the merged model gives the fused one's loss."""
    folder, adapters = one_block.cut(tmp_path, adapters=2)
    model = lf.load_base(folder)
    graph, base = nnx.split(model)
    sources = [str(path) for path in sorted(adapters.iterdir())]
    pool = lf.read_pool(sources, model.config, base_tensor=lf.base_tensor(folder))
    assert lf.places(model.config)["encoder.block.0.layer.0.SelfAttention.q"] == ("encoder.self.q", 0)
    used = {site: kernel for site, kernel in lf.kernels(model).items() if site in pool.A}
    frozen, index = lf.Frozen(base, pool, jax.jit(lf.gram)(pool, used)), jnp.arange(2)
    batch = lf.Batch(
        input_ids=jnp.array([[5, 6, 7], [8, 9, 0]]),
        input_mask=jnp.array([[True, True, True], [True, True, False]]),
        labels=jnp.array([[4, 1], [3, 1]]),
        row_mask=jnp.ones(2, bool),
    )
    method = lf.Fusion(magnitudes=False)
    state = lf.init_state(method, frozen, index, jax.random.key(0), {"coefficients": jnp.full((2, 2), 0.3)})
    rates = lf.Rates({"coefficients": jnp.float32(0.1)}, l2=jnp.float32(0), l1=jnp.float32(0))
    step = jax.jit(lf.fusion_step, static_argnames=("graph", "method", "optimisation"))
    static = {"graph": graph, "method": method}
    new, metrics = step(state, batch, index, frozen, rates, **static, optimisation=lf.Optimisation(steps=1))

    @functools.partial(jax.jit, static_argnames=("graph", "method"))
    def value_and_gradient(params, frozen, **static):
        def loss(params):
            return lf.objective(params, batch, index, frozen, jnp.float32(0), **static)[0]

        return jax.value_and_grad(loss)(params)

    value, gradient = value_and_gradient(state.params, frozen, **static)
    np.testing.assert_allclose(value, metrics["loss"], rtol=1e-6)
    # Adam's first step is the learning rate against the gradient's sign.
    wanted = state.params["coefficients"] - 0.1 * jnp.sign(gradient["coefficients"])
    np.testing.assert_allclose(new.params["coefficients"], wanted, atol=1e-4)

    fused, _ = jax.jit(method.adapters)(state.params, frozen, index)
    merged, weights = nnx.split(lf.merged_base(model, fused))
    again, _ = value_and_gradient({}, lf.Frozen(weights), graph=merged, method=lf.ZeroShot())
    np.testing.assert_allclose(again, value, rtol=1e-5)
