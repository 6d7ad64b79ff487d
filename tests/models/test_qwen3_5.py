"""The gated delta rule against its definition, token by token in float64; what it and a Gemma 4 refuse."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama
from flax import nnx
from numpy.testing import assert_allclose
from refusals import refused

import lorafusion_jax as lf
from lorafusion_jax.models.qwen3_5.model import CHUNK, delta_rule
from lorafusion_jax.models.registry import family_of_json
from lorafusion_jax.training.mesh import make_mesh, on_mesh


def _by_definition(queries, keys, values, decay, beta, memory):
    queries = queries / np.sqrt((queries**2).sum(-1, keepdims=True) + 1e-06)
    keys = keys / np.sqrt((keys**2).sum(-1, keepdims=True) + 1e-06)
    outputs = np.zeros_like(values)
    for row, token, head in np.ndindex(values.shape[:3]):
        of_keys = head * keys.shape[2] // values.shape[2]
        q = queries[row, token, of_keys]
        k = keys[row, token, of_keys]
        M = memory[row, head]
        M *= np.exp(decay[row, token, head])
        M += beta[row, token, head] * np.outer(k, values[row, token, head] - k @ M)
        outputs[row, token, head] = q @ M / np.sqrt(len(q))
    return outputs, memory


# One token as in decoding, part of a chunk, and chunks of which the last is not full.
@pytest.mark.parametrize("length", [1, 5, 2 * CHUNK + 3])
def test_the_delta_rule(length):
    rng = np.random.default_rng(0)
    shapes = [
        (2, length, 2, 3),
        (2, length, 2, 3),
        (2, length, 4, 5),
        (2, length, 4),
        (2, length, 4),
        (2, 4, 3, 5),
    ]
    q, k, v, decay, beta, memory = map(rng.standard_normal, shapes)
    given = (q, k, v, -np.exp(decay - 2), 1 / (1 + np.exp(-beta)), memory)
    ours = [jnp.asarray(a, jnp.float32) for a in given]
    rule = jax.jit(delta_rule).lower(*ours).compile()
    assert (
        "lapack" not in rule.as_text()
    )  # two of its calls in one program wait for each other's threads for ever
    for got, wanted in zip(rule(*ours), _by_definition(*given), strict=True):
        assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_types": 3 * ["full_attention", "linear_attention"]},
            "layer_types is .*expected the 6 layers in groups",
        ),
        (
            {"layer_types": 6 * ["linear_attention"]},
            "layer_types is .*with one full_attention at its end",
        ),
        (
            {"num_hidden_layers": 5, "layer_types": None},
            "layer_types is .*expected the 5 layers in groups of one size",
        ),
        (
            {"linear_num_key_heads": 3},
            "linear_num_value_heads is 4: expected a multiple of linear_num_key_heads, 3",
        ),
        (
            {"attn_output_gate": False},
            r"Invalid enum value False - at `\$\.attn_output_gate`",
        ),
        (
            {"hidden_act": "gelu_pytorch_tanh"},
            r"Invalid enum value 'gelu_pytorch_tanh' - at `\$\.hidden_act`",
        ),
        (
            {"linear_conv_kernel_dim": 0},
            r"Expected `int` >= 1 - at `\$\.linear_conv_kernel_dim`",
        ),
        (
            {"model_type": "qwen3_5", "text_config": {"linear_key_head_dim": "wide"}},
            r"Expected `int`, got `str` - at `\$\.linear_key_head_dim`",
        ),
        (
            {"model_type": "qwen3_5", "text_config": 3},
            r"Expected `object \| null`, got `int` - at `\$\.text_config`",
        ),
        (
            {"model_type": "qwen3_5_moe_text"},
            "model_type is 'qwen3_5_moe_text', which is none of the families: .* Give a dense model",
        ),
    ],
)
def test_a_config_that_cannot_be_run_is_refused_by_field(changes, message):
    raw = small_llama.CONFIG | {"vocab_size": 40} | small_llama.QWEN3_5 | changes
    with refused(message):
        family_of_json(raw).read_config(raw)


@pytest.mark.parametrize(
    ("model", "module", "shapes", "message"),
    [
        (
            small_llama.QWEN3_5,
            "layers.0.linear_attn.conv1d",
            ((2, 64, 4), (64, 2, 1)),
            r"layers\.0\.linear_attn\.conv1d.*LoRA on a convolution",
        ),
        (
            small_llama.GEMMA4,
            "per_layer_model_projection",
            ((2, 16), (24, 2)),
            r"LoRA on model\.per_layer_model_projection, which is not implemented",
        ),
    ],
)
def test_lora_on_other_maps_is_refused_by_name(
    tmp_path, model, module, shapes, message
):
    base = small_llama.make(tmp_path / "base", **model)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    tensors = {
        f"base_model.model.model.{module}.lora_{factor}.weight": np.ones(shape, "f")
        for factor, shape in zip("AB", shapes, strict=True)
    }
    lf.io.write_adapter(tmp_path / "lora", fields, tensors)
    adapters = (str(tmp_path / "lora"),)
    out = tmp_path / "pool"
    with refused(message):
        lf.io.convert(lf.io.ConvertOptions(base=str(base), adapters=adapters, out=out))


@pytest.mark.long
def test_a_mesh_that_splits_matrices_has_the_loss_and_gradients_of_one_device():
    """In float64, of every weight."""
    layers = {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    }
    raw = (
        small_llama.CONFIG
        | {"vocab_size": 40, "num_key_value_heads": 2}
        | small_llama.QWEN3_5
        | layers
    )
    family = family_of_json(raw)
    model = family.model(family.read_config(raw), rngs=nnx.Rngs(0))
    config = model.config = copy.copy(model.config)
    object.__setattr__(
        config, "dtype", "float64"
    )  # which the type checks of the tests refuse otherwise
    with jax.enable_x64(True):
        graph, base = nnx.split(model)
        base = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), base)
        ids = jax.random.randint(jax.random.key(0), (2, CHUNK), 3, 40, jnp.int32)
        labels = jax.random.randint(jax.random.key(0), (2, 5), 3, 40, jnp.int32)

        def value_and_grad(base):
            def loss(base):
                logits = nnx.merge(graph, base).label_logits(ids, ids > 20, labels, {})
                return lf.training.cross_entropy(logits, labels)

            return jax.value_and_grad(loss)(base)

        alone = jax.jit(value_and_grad)(base)
        with jax.set_mesh(make_mesh("model=2", 1)):
            there = on_mesh(base, config)
            kernel = there["decoder"]["delta0"]["linear_attn"]["in_proj_qkv"][
                "kernel"
            ].get_value()
            assert tuple(kernel.sharding.spec) == (None, None, "model")
            split = jax.jit(value_and_grad)(there)
    assert not jax.tree.all(jax.tree.map(np.array_equal, alone, split))
    jax.tree.map(lambda a, b: assert_allclose(b, a, rtol=0, atol=1e-12), alone, split)
