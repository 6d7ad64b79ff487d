"""LoRA that qwix puts on modules with tunix's names, against its products, as checkpoints and in safetensors."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from refusals import refused
from safetensors.numpy import save_file

from lorafusion_jax.io import ConvertOptions, convert, read_adapter

# Of the base `fusion/llama`: width, heads, heads of keys, of a head, of the MLP.
_D = 64
_N = 4
_K = 2
_H = 16
_F = 128
_RANK = 3
_ALPHA = 4.5
_EINSUMS = {
    "joint": {
        "q_einsum": ("BTD,NDH->BTNH", (_N, _D, _H)),
        "kv_einsum": ("BSD,CKDH->CBSKH", (2, _K, _D, _H)),
        "attn_vec_einsum": ("BTNH,NHD->BTD", (_N, _H, _D)),
    },
    "apart": {
        "q_proj": ("BTD,DNH->BTNH", (_D, _N, _H)),
        "k_proj": ("BSD,DKH->BSKH", (_D, _K, _H)),
        "v_proj": ("BSD,DKH->BSKH", (_D, _K, _H)),
        "o_proj": ("BTNH,NHD->BTD", (_N, _H, _D)),
    },
}
_MLP = {"up_proj": (_D, _F), "down_proj": (_F, _D)}


class _Einsum(nnx.Module):
    def __init__(self, text, shape, rngs):
        self.text = text
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.text, x, self.w[...])


class _Layer(nnx.Module):
    def __init__(self, einsums, rngs):
        self.attn = nnx.Dict(
            {name: _Einsum(*how, rngs) for name, how in einsums.items()}
        )
        self.mlp = nnx.Dict(
            {
                name: nnx.Linear(*of, use_bias=False, rngs=rngs)
                for name, of in _MLP.items()
            }
        )


class _Model(nnx.Module):
    """One layer, whose modules are given random inputs: returns their products by name."""

    def __init__(self, einsums, rngs):
        self.layers = nnx.List([_Layer(einsums, rngs)])

    def __call__(self, inputs):
        (layer,) = self.layers
        return {
            name: (layer.mlp if name in _MLP else layer.attn)[name](x)
            for name, x in inputs.items()
        }


def _inputs(kind):
    shapes = {
        "attn_vec_einsum": (1, 5, _N, _H),
        "o_proj": (1, 5, _N, _H),
        "down_proj": (1, 5, _F),
    }
    names = (*_EINSUMS[kind], *_MLP)
    return {
        name: jax.random.normal(
            jax.random.key(0), shapes.get(name, (1, 5, _D)), jnp.float32
        )
        for name in names
    }


def _save_orbax(folder, tree):
    from orbax.checkpoint import v1 as ocp

    with ocp.training.Checkpointer(str(folder)) as checkpoints:
        for step in (2, 10):
            checkpoints.save_checkpointables(
                step,
                {"model_params": jax.tree.map(lambda a, n=step: a * (n / 10), tree)},
            )


def _save_file(folder, tree):
    folder.mkdir()
    leaves = {
        ".".join(map(str, path)): np.asarray(leaf[...])
        for path, leaf in nnx.to_flat_state(tree)
    }
    save_file(leaves, folder / "lora.safetensors")


@pytest.mark.parametrize(
    ("kind", "save"), [("joint", _save_file), ("apart", _save_orbax)]
)
def test_products_are_those_of_qwix_also_from_a_converted_pool(
    goldens, tmp_path, kind, save
):
    model = _Model(_EINSUMS[kind], nnx.Rngs(0))
    inputs = _inputs(kind)
    random = jax.nn.initializers.normal(1.0)
    rule = qwix.LoraRule(
        module_path=".*", rank=_RANK, alpha=_ALPHA, lora_b_initializer=random
    )
    with warnings.catch_warnings(action="ignore"):  # of what qwix calls in Flax
        lora = qwix.apply_lora_to_model(
            model, qwix.LoraProvider([rule]), inputs, rngs=nnx.Rngs(0)
        )
        updates = jax.tree.map(
            lambda with_lora, base: np.asarray(with_lora - base),
            lora(inputs),
            model(inputs),
        )
    if kind == "joint":
        updates["k_proj"], updates["v_proj"] = updates.pop("kv_einsum")
    renamed = {"q_einsum": "q_proj", "attn_vec_einsum": "o_proj"}
    save(tmp_path / "tree", nnx.state(lora, nnx.LoRAParam))

    base = goldens / "fusion/llama/base"
    source = str(tmp_path / "tree")
    out = tmp_path / "pool"
    (entry,) = convert(
        ConvertOptions(base=str(base), adapters=(source,), out=out, alpha=_ALPHA)
    )["adapters"]
    for adapter in (
        read_adapter(source, alpha=_ALPHA),
        read_adapter(str(out / entry["folder"])),
    ):
        assert len(adapter.factors) == len(updates)
        for name, update in updates.items():
            last = renamed.get(name, name)
            path = next(path for path in adapter.factors if path.endswith(last))
            A, B = adapter.factors[path]
            given = inputs[
                "kv_einsum"
                if kind == "joint" and last in ("k_proj", "v_proj")
                else name
            ]
            found = adapter.scaling[path] * np.asarray(given).reshape(5, -1) @ A.T @ B.T
            np.testing.assert_allclose(
                found, update.reshape(5, -1), rtol=0, atol=1e-5 * np.abs(update).max()
            )


_LEAF = "layers.0.attn.{}_lora_{}"
_Q = {_LEAF.format("q_proj.w", "a"): (6, 2), _LEAF.format("q_proj.w", "b"): (2, 5, 2)}


def _write(folder, shapes):
    save_file(
        {name: np.ones(shape, np.float32) for name, shape in shapes.items()},
        folder / "lora.safetensors",
    )


def test_ranks_may_differ_and_other_arrays_are_noted(tmp_path):
    shapes = _Q | {
        _LEAF.format("o_proj.w", "a"): (5, 2, 3),
        _LEAF.format("o_proj.w", "b"): (3, 6),
        "final_norm.w": (6,),
    }
    _write(tmp_path, shapes)
    adapter = read_adapter(str(tmp_path), alpha=6.0)
    layer = "model.layers.0.self_attn"
    assert adapter.scaling == {f"{layer}.q_proj": 3.0, f"{layer}.o_proj": 2.0}
    assert adapter.notes == (
        "ignored: 1 arrays that are no LoRA, taken for those of the base",
    )


@pytest.mark.parametrize(
    ("shapes", "alpha", "message"),
    [
        (
            _Q,
            None,
            "qwix saves no alpha: give the one that the LoRA was trained with, with --alpha",
        ),
        (
            {"embedder.input_embedding_lora_a": (9, 2)},
            1.0,
            "'embedder.input_embedding_lora_a' is LoRA outside of atten",
        ),
        (
            {_LEAF.format("kv_einsum.w", "b"): (2, 3, 5, 2)},
            1.0,
            r"\[2, 3, 5, 2\]: expected \[r, 2, other axes\]",
        ),
        (
            _Q | {_LEAF.format("k_proj.w", "a"): (2,)},
            1.0,
            r"\[2\]: expected \[contracted axes, r\]",
        ),
        (
            _Q | {_LEAF.format("q_einsum.w", "a"): (6, 2)},
            1.0,
            "a second factor of model.layers.0.self_attn.q_proj",
        ),
        ({_LEAF.format("q_proj.w", "a"): (6, 2)}, 1.0, "has lora_A but no lora_B"),
    ],
)
def test_refused(tmp_path, shapes, alpha, message):
    _write(tmp_path, shapes)
    with refused(rf"{re.escape(str(tmp_path))}.*{message}"):
        read_adapter(str(tmp_path), alpha=alpha)


def test_alpha_is_refused_for_an_adapter_that_has_its_own(goldens):
    with refused(
        "alpha is 8, but only a LoRA of qwix lacks its own: leave out --alpha"
    ):
        read_adapter(str(goldens / "fusion/llama/adapters/lora_0"), alpha=8.0)
