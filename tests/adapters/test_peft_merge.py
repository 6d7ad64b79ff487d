"""Merges against PEFT's own `add_weighted_adapter` (0.21), matrix by matrix, on adapters made here.

Where PEFT is wrong we are not equal to it: adapters with use_rslora, which it scales by root r; up to 0.20 every svd,
and up to 0.18 negative weights. The random masks of `dare` are ours: `test_merges.py` has them.
"""

from typing import get_args

import jax.numpy as jnp
import numpy as np
import peft_models
import pytest
import tiny

from lorafusion_jax import read_pool
from lorafusion_jax.adapters import MergeKind
from lorafusion_jax.adapters.merges import check_merge, merge

pytestmark = pytest.mark.peft

# Unequal scalings; every one lacks sites, and "one" all layers but one.
_ADAPTERS = {
    "two": {"r": 4, "lora_alpha": 8, "target_modules": ["SelfAttention.q"]},
    "several": {"r": 4, "lora_alpha": 2, "target_modules": ["SelfAttention.q", "wi_0"]},
    "one": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["decoder.block.1.layer.0.SelfAttention.q", "wi_0"],
    },
    "wide": {"r": 6, "lora_alpha": 3, "target_modules": ["SelfAttention.q"]},
}
_ONE_RANK = ("two", "several", "one")
_WEIGHTS = {"positive": (0.7, 0.4, 1.3), "negative": (0.7, -0.4, -1.3)}
_DENSITY = 0.3


@pytest.fixture(scope="module")
def model():
    """A T5 with all adapters, by transformers and PEFT."""
    import peft

    configs = {
        name: peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **fields)
        for name, fields in _ADAPTERS.items()
    }
    first, *others = configs
    model = peft.get_peft_model(peft_models.t5(), configs[first], adapter_name=first)
    for name in others:
        model.add_adapter(name, configs[name])
    return peft_models.randomise(model)


@pytest.fixture(scope="module")
def pool_of(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    model.save_pretrained(folder)
    return lambda names: read_pool([str(folder / name) for name in names], tiny.CONFIG)


def _layers(model):
    """PEFT's layers by site and layer."""
    modules = dict(model.base_model.model.named_modules())
    found = {
        (s, n): modules[site.path_of(n)]
        for s, site in tiny.CONFIG.sites.items()
        for n in range(site.layers)
    }
    return {
        where: module for where, module in found.items() if hasattr(module, "lora_A")
    }


def _peft(model, names, weights, kind, **fields):
    """What PEFT adds to every kernel, transposed to our layout."""
    model.add_weighted_adapter(
        list(names),
        list(weights),
        "merged",
        combination_type=kind,
        density=_DENSITY,
        **fields,
    )
    found = {
        where: layer.get_delta_weight("merged").detach().numpy().T
        for where, layer in _layers(model).items()
        if "merged" in layer.lora_A
    }
    model.delete_adapter("merged")
    return found


def _ours(pool, weights, kind):
    check_merge(pool, kind)
    weights = jnp.array(weights, jnp.float32)
    adapters = merge(pool, jnp.arange(len(pool)), weights, kind, density=_DENSITY)
    zeros = {
        site: jnp.zeros((*A.shape[::2], pool.B[site].shape[-1]))
        for site, A in pool.A.items()
    }
    return {
        (site, layer): np.asarray(matrix)
        for site, matrices in tiny.matrices(adapters, zeros).items()
        for layer, matrix in enumerate(matrices)
    }


def _equal(ours, theirs, kind):
    # Where the last singular value kept is close to the next, an SVD turns the rounding of its input into more.
    atol = 1e-4 if kind == "svd" else 1e-5
    assert theirs.keys() <= ours.keys()
    for where, wanted in theirs.items():
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(
            ours[where], wanted, rtol=0, atol=atol, err_msg=str(where)
        )
    for where in ours.keys() - theirs.keys():
        assert not ours[where].any()


@pytest.mark.parametrize("weights", _WEIGHTS)
@pytest.mark.parametrize(
    "kind", [kind for kind in get_args(MergeKind) if not kind.startswith("dare")]
)
def test_merges(model, pool_of, kind, weights):
    pool = pool_of(_ONE_RANK)
    _equal(
        _ours(pool, _WEIGHTS[weights], kind),
        _peft(model, _ONE_RANK, _WEIGHTS[weights], kind),
        kind,
    )


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_merges_of_several_ranks(model, pool_of, kind):
    names = ("wide", "several")
    weights = (0.9, -0.5)
    _equal(
        _ours(pool_of(names), weights, kind), _peft(model, names, weights, kind), kind
    )
