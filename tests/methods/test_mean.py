"""The mean module, by its definition in float64 and by the fusion whose coefficients are alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lorafusion_jax as lf
from lorafusion_jax.methods.mean import MeanFusion

_MODEL = tiny.t5()
_FROZEN, _INDEX, _KEY = tiny.frozen(_MODEL), jnp.array([2, 0, 1]), jax.random.key(0)


def _adapters(method, params):
    return jax.jit(method.adapters)(params, _FROZEN, _INDEX)[0]


def test_it_starts_where_a_uniform_fusion_does():
    mean, fusion = MeanFusion().init(_FROZEN, _INDEX, _KEY), lf.Fusion().init(_FROZEN, _INDEX, _KEY)
    assert list(mean) == ["mean", "magnitudes"] and mean["mean"].shape == fusion["coefficients"].shape[1:]
    pairs = zip(*(jax.tree.leaves(_adapters(*of)) for of in ((MeanFusion(), mean), (lf.Fusion(), fusion))), strict=True)
    for got, wanted in pairs:
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_its_update_is_the_mean_of_the_modules_times_one_coefficient():
    method, c = MeanFusion(magnitudes=False), tiny.coefficients((5,))
    merged, base = lf.kernels(lf.merged_base(_MODEL, _adapters(method, {"mean": c}))), lf.kernels(_MODEL)
    alike = tiny.coefficient_of(np.tile(np.asarray(c) / 3, (3, 1)), _FROZEN.pool, "block")
    for (site, layer), wanted in tiny.updates(_FROZEN.pool, [2, 0, 1], alike, "sum").items():
        np.testing.assert_allclose(merged[site][layer] - base[site][layer], wanted, atol=1e-5)
    spread, composition = method.as_fusion({"mean": c}, _FROZEN, _INDEX)
    same = lf.Fusion(magnitudes=False).as_fusion({"coefficients": jnp.tile(c / 3, (3, 1))}, _FROZEN, _INDEX)
    assert composition == same[1] == "sum"
    assert jax.tree.map(jnp.array_equal, spread, same[0]) == dict.fromkeys(spread, True)


def test_a_fusion_with_other_adapters_is_not_exported_as_a_plain_one():
    class Squared(lf.Fusion):
        def adapters(self, params, frozen, index):
            return super().adapters(params | {"coefficients": params["coefficients"] ** 2}, frozen, index)

    params = Squared().init(_FROZEN, _INDEX, _KEY)
    assert Squared().as_fusion(params, _FROZEN, _INDEX) is None
    assert lf.Fusion().as_fusion(params, _FROZEN, _INDEX) is not None


@pytest.mark.parametrize(("granularity", "acting"), [("global", True), ("block", [True] * 3 + [False] * 2)])
def test_it_trains_one_row_of_coefficients_where_a_module_acts(granularity, acting):
    method = MeanFusion(granularity=granularity)
    params = method.init(_FROZEN, _INDEX, _KEY)
    of_all = method.trainable(params, _FROZEN, _INDEX)
    assert jax.tree.map(jnp.shape, of_all) == jax.tree.map(jnp.shape, params) and bool(jnp.all(of_all["mean"]))
    only = method.trainable(params, _FROZEN, jnp.array([0]))  # a module without decoder sites
    assert only["mean"].tolist() == acting
