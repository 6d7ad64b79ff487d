"""Exported adapters and merged models against PEFT's own formulas, in NumPy."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import lorafusion_jax as lf
from lorafusion_jax import io
from lorafusion_jax.adapters.coefficients import shape
from lorafusion_jax.models.layers import Linear

_MODEL = tiny.t5()
_INDEX = [3, 0, 2]


def _somewhere(n, site, layer):
    """Rank 4; module 0 has nothing in the decoder, nobody has anything in the encoder's second layer."""
    return (
        0
        if (n == 0 and "decoder" in site) or (site.startswith("encoder") and layer == 1)
        else 4
    )


def _several(n, site, layer):
    return (
        _somewhere(n, site, layer) and 1 + (n + 2 * layer + 3 * ("cross" in site)) % 5
    )


def _kernel(site, layer):
    return np.asarray(lf.kernels(_MODEL)[site][layer], np.float64)


def _in_peft(config, tensors):
    """Return by site and layer what PEFT multiplies by instead of W, [d_in, d_out]."""
    paths = {
        site.path_of(layer): (s, layer)
        for s, site in _MODEL.config.sites.items()
        for layer in range(site.layers)
    }
    # PEFT adapts every module that is named, whether it has tensors for it or not.
    named = [
        p
        for p in paths
        if any(p == t or p.endswith(f".{t}") for t in config["target_modules"])
    ]
    kinds = ["lora_A.weight", "lora_B.weight"] + ["lora_magnitude_vector"] * config[
        "use_dora"
    ]
    assert set(tensors) == {
        f"base_model.model.{path}.{kind}" for path in named for kind in kinds
    }
    found = {}
    for path in named:
        A, B, *m = (
            np.asarray(tensors[f"base_model.model.{path}.{kind}"], np.float64)
            for kind in kinds
        )
        rank = config.get("rank_pattern", {}).get(path, config["r"])
        alpha = config.get("alpha_pattern", {}).get(path, config["lora_alpha"])
        assert (len(A), *B.shape[1:]) == (rank, rank)
        assert (A.shape[1], B.shape[0]) == lf.models.linear_shapes(_MODEL.config)[path]
        W = _kernel(*paths[path]).T + alpha / rank * B @ A
        if m:
            W = W * (m[0] / np.linalg.norm(W, axis=1))[:, None]
        found[paths[path]] = W.T
    return found


def _close(got, wanted, tolerance=1e-5):
    np.testing.assert_allclose(
        np.asarray(got, np.float64), wanted, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("magnitudes", [False, True])
@pytest.mark.parametrize("granularity", ["block", "rank"])
@pytest.mark.parametrize(
    ("composition", "ranks"), [("mix", _somewhere), ("sum", _several)]
)
def test_a_fusion_is_one_adapter(composition, granularity, magnitudes, ranks):
    pool = tiny.pool(4, ranks)
    c = tiny.coefficients(shape(pool, 3, granularity))
    rng = np.random.default_rng(0)
    m = {
        s: jnp.asarray(rng.uniform(0.5, 2, (b.shape[0], b.shape[3])), jnp.float32)
        for s, b in pool.B.items()
    }
    config, tensors = io.fused_adapter(
        _MODEL.config,
        pool,
        jnp.array(_INDEX),
        lf.adapters.expand(c, pool, granularity),
        composition,
        base="some/base",
        magnitudes=m if magnitudes else None,
    )
    found = _in_peft(config, tensors)
    wanted = tiny.updates(
        pool, _INDEX, tiny.coefficient_of(c, pool, granularity), composition
    )
    adapted = {where for where in wanted if any(ranks(n, *where) for n in _INDEX)}
    assert found.keys() == adapted and len(adapted) < len(wanted)
    for site, layer in adapted:
        W = _kernel(site, layer) + wanted[site, layer]
        if magnitudes:
            W = W * np.asarray(m[site][layer], np.float64) / np.linalg.norm(W, axis=0)
        _close(found[site, layer], W)
    # As small as it can be: the ranks of the modules that meet in one place.
    together = [sum(ranks(n, *where) for n in _INDEX) for where in adapted]
    if composition == "mix":
        together = [4] * len(adapted)
    assert config["r"] == config["lora_alpha"] == max(together)
    kept = [len(A) for name, A in tensors.items() if name.endswith("lora_A.weight")]
    assert sorted(kept) == sorted(together)
    assert (config["peft_type"], config["base_model_name_or_path"]) == (
        "LORA",
        "some/base",
    )
    assert (config["use_rslora"], config["use_dora"]) == (False, magnitudes)


@pytest.mark.parametrize("composition", ["mix", "sum"])
def test_a_quantised_pool_exports_what_it_computes(composition):
    pool = tiny.pool(4).quantised("nf4")
    plain = {
        f: {s: lf.models.dense(w, jnp.float32) for s, w in getattr(pool, f).items()}
        for f in ("A", "B")
    }
    spread = lf.adapters.expand(tiny.coefficients((3, 5)), pool, "block")
    exported = io.fused_adapter(
        _MODEL.config, pool, jnp.array(_INDEX), spread, composition, base="b"
    )
    wanted = io.fused_adapter(
        _MODEL.config,
        replace(pool, **plain),
        jnp.array(_INDEX),
        spread,
        composition,
        base="b",
    )
    assert exported[0] == wanted[0] and exported[1].keys() == wanted[1].keys()
    for key, tensor in exported[1].items():
        _close(tensor, wanted[1][key], 1e-6)


@pytest.mark.parametrize("magnitudes", [True, False], ids=["trained", "frozen"])
def test_magnitudes_of_either_sign_and_zero_start_the_next_fusion(tmp_path, magnitudes):
    """The oracle is the run that was exported: pruned and negative magnitudes are read back as they were."""
    pool = tiny.pool(3, _somewhere)
    index = jnp.arange(3)
    method = lf.Fusion()
    frozen = tiny.frozen(_MODEL, pool)
    rng = np.random.default_rng(0)
    params = method.init(frozen, index, jax.random.key(0))
    params["magnitudes"] = {
        s: m * jnp.asarray(rng.choice([-1.2, 0.0, 0.8], m.shape), jnp.float32)
        for s, m in params["magnitudes"].items()
    }
    spread = lf.adapters.expand(params["coefficients"], pool, "block")
    written = io.fused_adapter(
        _MODEL.config,
        pool,
        index,
        spread,
        "sum",
        base="b",
        magnitudes=params["magnitudes"],
    )
    io.write_adapter(tmp_path / "fused", *written)
    again = lf.read_pool([str(tmp_path / "fused")], _MODEL.config)
    frozen_again = tiny.frozen(_MODEL, again)
    next_method = lf.Fusion(magnitudes=magnitudes)
    start = next_method.init(frozen_again, jnp.arange(1), jax.random.key(1))
    assert (start["coefficients"] == 1).all() and ("magnitudes" in start) == magnitudes
    adapters = jax.jit(next_method.adapters)(start, frozen_again, jnp.arange(1))[0]
    wanted = jax.jit(method.adapters)(params, frozen, index)[0]
    _close(_logits(_MODEL, adapters), _logits(_MODEL, wanted))


def _fused(model):
    frozen = tiny.frozen(model, tiny.pool(4, _somewhere))
    method = lf.Fusion(composition="sum")
    params = method.init(frozen, jnp.array(_INDEX), jax.random.key(0))
    params["coefficients"] = tiny.coefficients(params["coefficients"].shape)
    params["magnitudes"] = {site: 1.5 * m for site, m in params["magnitudes"].items()}
    return jax.jit(method.adapters)(params, frozen, jnp.array(_INDEX))[0]


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, weights, adapters):
    batch = tiny.batch()
    start = lf.models.decoder_inputs(batch.labels, start_id=0, pad_id=0)
    return nnx.merge(graph, weights)(batch.input_ids, batch.input_mask, start, adapters)


def _logits(model, adapters=None):
    return np.asarray(_run(*nnx.split(model), adapters or {}))


def test_quantised_and_bf16_models_merge_in_float32():
    model = tiny.t5()
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            module.kernel.set_value(
                lf.quantise(module.kernel.get_value(), "int8", tiled_axis=-2)
            )
    adapters = _fused(model)
    merged = lf.merged_base(model, adapters)
    _close(_logits(merged), _logits(model, adapters), 1e-4)
    assert all(isinstance(lf.kernels(merged)[site], jax.Array) for site in adapters)
    in_bf16 = tiny.t5(replace(tiny.CONFIG, dtype="bfloat16"))
    for site, expected in lf.kernels(lf.merged_base(tiny.t5(), adapters)).items():
        np.testing.assert_array_equal(
            lf.kernels(lf.merged_base(in_bf16, adapters))[site], expected
        )
