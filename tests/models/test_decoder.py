"""Frequencies, and configs that are refused; `test_goldens.py` and `test_parity.py` compare with PyTorch."""

import jax.numpy as jnp
import numpy as np
import pytest
import small_llama

from lorafusion_jax.models.decoder import FAMILY
from lorafusion_jax.models.decoder.config import Rope
from lorafusion_jax.models.decoder.rotary import rotation

_TINY = small_llama.CONFIG | {
    "vocab_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

_YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
_FACTORS = {"short_factor": [1.0, 1.0], "long_factor": [1.0]}
_LONGROPE = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "longrope"} | _FACTORS,
}
_WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 4,
    "layer_types": ["sliding_attention"] * 3,
}


def test_llama3_stretches_low_frequencies_and_keeps_high_ones():
    plain = Rope(theta=100.0, width=8)
    llama3 = Rope(theta=100.0, width=8, scaling="llama3", factor=8.0, context=64)
    angles = [
        rotation(rope, jnp.ones((1, 1), int), jnp.ones((1, 1), int))
        for rope in (plain, llama3)
    ]
    before = np.arctan2(np.asarray(angles[0].sin), np.asarray(angles[0].cos))[0, 0]
    after = np.arctan2(np.asarray(angles[1].sin), np.asarray(angles[1].cos))[0, 0]
    # Wavelengths of 6, 20, 63 and 199 tokens: those below 64 / 4 are kept, those above 64 are stretched.
    ratio = after / before
    np.testing.assert_allclose(ratio[[0, 3]], [1, 1 / 8], rtol=1e-5)
    assert 1 > ratio[1] > ratio[2] > 1 / 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "proportional"}},
            "the rope scaling is 'proportional', which is not impl",
        ),
        (
            {"rope_parameters": _YARN | {"rope_theta": 1.0}},
            "rope_theta is 1.0: expected more than 1 with the scaling yarn",
        ),
        (
            _LONGROPE,
            "long_factor has 1 numbers: expected one for each of 2 rotated pairs",
        ),
        (
            {"model_type": "smollm3"} | _WINDOWS,
            "layer_types and no_rope_layers differ: expected windows in layers wi",
        ),
        (
            {"model_type": "granitemoehybrid", "mamba_n_heads": 4},
            "num_local_experts is 8, a mixture of experts: give",
        ),
        (
            {
                "model_type": "granitemoehybrid",
                "mamba_n_heads": 4,
                "num_local_experts": 0,
            },
            "layer_types has Mamba layers, which are not implemented: give a Granite of attention alone",
        ),
        (
            {"model_type": "qwen2_vl", "num_attention_heads": 64},
            "hidden_size is 16: expected at least 64, one for each",
        ),
        (
            {"model_type": "granite", "logits_scaling": 0.0},
            "logits_scaling is 0.0: expected a number",
        ),
        (
            {"rope_parameters": {"rope_type": "\x1b[31m", "factor": 2.0}},
            r"the rope scaling is '\\x1b\[31m'",
        ),
        (
            {"hidden_act": "relu"},
            "the activation is 'relu': expected silu or gelu_pytorch_tanh",
        ),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads is 4: expected a multiple of num_key_value_heads, 3",
        ),
        (
            {"eos_token_id": None},
            "eos_token_id is missing: expected the token, or tokens, that end an answer",
        ),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "the weights are quantised by awq: give the unquantised",
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "usually the one whose name lacks -bnb-4bit .*; --load-in nf4 loads it in 4 bits",
        ),
        (
            {"quantization": {"group_size": 64, "bits": 4}},
            "the weights are quantised by MLX .*give the unquantised",
        ),
        (
            {"hidden_size": "wide"},
            "hidden_size is 'wide': expected an integer from 1 to 10,000,000",
        ),
        (
            {"model_type": "gemma2", "use_bidirectional_attention": True},
            "use_bidirectional_attention is set: expected",
        ),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "use_bidirectional_attention is set",
        ),
    ],
)
def test_a_config_that_the_decoder_cannot_run_is_refused_by_field(
    changes, message, capfd
):
    with pytest.raises(ValueError, match=message):
        FAMILY.read_config(_TINY | {"model_type": "llama"} | changes)
    assert (
        capfd.readouterr().err == ""
    )  # libraries would print the file's text as it is
