"""Configs of decoder-only models: old spellings and new ones, sizes, and configs that are refused."""

import dataclasses
import json

import pytest
import small_llama
from refusals import refused

from lorafusion_jax.estimates.params import size
from lorafusion_jax.models.decoder import FAMILY
from lorafusion_jax.models.registry import family_of_json, recorded_config

_SMALL = small_llama.CONFIG | {
    "vocab_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "factor": 4.0}
_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
}
_THETA = {"rope_theta": 500.0}
_WINDOW = {"sliding_window": 5}
_IN_SOME = {"use_sliding_window": True} | _WINDOW
_FULL = "full_attention"
_SLIDING = "sliding_attention"


def _rope(rope_type="default", **scaling):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 500.0} | scaling}


# (model_type, spelling of transformers 4, spelling of transformers 5)
_SPELLINGS = {
    "no scaling": ("llama", {}, _rope()),
    "type": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        _rope(**_LINEAR),
    ),
    "rope_type": ("llama", {"rope_scaling": _DYNAMIC}, _rope(**_DYNAMIC)),
    "llama3": ("llama", {"rope_scaling": _LLAMA3}, _rope(**_LLAMA3)),
    "window of some layers": (
        "qwen2",
        _IN_SOME | {"max_window_layers": 1},
        _rope() | _IN_SOME | {"layer_types": [_FULL] + 3 * [_SLIDING]},
    ),
    "alternating windows": (
        "gemma2",
        _WINDOW,
        _rope() | _WINDOW | {"layer_types": 2 * [_SLIDING, _FULL]},
    ),
    "two bases": (
        "gemma3_text",
        {"rope_local_base_freq": 100.0, "sliding_window_pattern": 3}
        | {"rope_scaling": _LINEAR}
        | _WINDOW,
        {
            "rope_parameters": {
                _FULL: _LINEAR | _THETA,
                _SLIDING: {"rope_type": "default", "rope_theta": 100.0},
            },
            "layer_types": [_SLIDING, _SLIDING, _FULL, _SLIDING],
        }
        | _WINDOW,
    ),
    "part of a head": (
        "phi3",
        {"partial_rotary_factor": 0.5},
        _rope(partial_rotary_factor=0.5),
    ),
}


@pytest.mark.parametrize("case", _SPELLINGS)
def test_configs_of_transformers_4_and_5_describe_the_same_model(case):
    model_type, old, new = _SPELLINGS[case]
    small = _SMALL | {"model_type": model_type}
    config = FAMILY.read_config(small | _THETA | old)
    assert config == FAMILY.read_config(small | new) != FAMILY.read_config(small)
    assert config.rope.theta == 500.0
    # A pool's manifest gives back the structure.
    record = {"family": "decoder", "config": dataclasses.asdict(config)}
    assert recorded_config(json.loads(json.dumps(record))) == config


def test_a_model_has_the_number_of_parameters_that_its_page_shows():
    sizes = {name: size(config) for name, config in FAMILY.shapes.items()}
    assert sizes == {"smollm2-135m": 134_515_008}


def test_an_internlm_is_a_llama_with_biases():
    """Its frequencies are stretched in rows beyond its context."""
    rope = {"rope_parameters": _DYNAMIC | {"factor": 1.0}}
    llama = FAMILY.read_config(_SMALL | rope | {"attention_bias": True})
    config = FAMILY.read_config(_SMALL | {"model_type": "internlm", "bias": True})
    assert dataclasses.replace(config, model_type="llama") == llama


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_minus_one_is_no_token_for_padding(model_type):
    fields = _SMALL | {
        "model_type": model_type,
        "auto_map": {"AutoConfig": "theirs.Theirs"},
    }
    config = FAMILY.read_config(fields | {"pad_token_id": -1})
    assert config == FAMILY.read_config(fields | {"pad_token_id": small_llama.EOS})


_COMPLETE = small_llama.CONFIG | {
    "vocab_size": 40,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "pad_token_id": None,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"eos_token_id": [1, 3], "pad_token_id": -1, "tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
        {"rope_theta": 500.0, "rms_norm_eps": 1e-5, "sliding_window": 4},
    ],
    ids=str,
)
def test_a_complete_config_is_read_as_transformers_completes_it(changes):
    complete = _COMPLETE | changes
    # A type of scaling that is spelled out is left to transformers.
    spelled_out = complete | {"rope_scaling": {"rope_type": "default"}}
    assert FAMILY.read_config(complete) == FAMILY.read_config(spelled_out)


_YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [1.0]}


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "\x1b[31m", "factor": 2.0}},
            r"the rope scaling is '\\x1b\[31m', which is not impl",
        ),
        (
            "llama",
            {"rope_parameters": _YARN | {"rope_theta": 1.0}},
            "rope_theta is 1.0: expected more than 1 with the scaling yarn",
        ),
        (
            "llama",
            {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 16},
            "long_factor has 1 numbers: expected one for each of 2 rotated pairs",
        ),
        (
            "smollm3",
            _IN_SOME | {"layer_types": [_SLIDING] * 4},
            "layer_types and no_rope_layers differ: expected windows in layers wi",
        ),
        (
            "granitemoehybrid",
            {"mamba_n_heads": 4},
            "num_local_experts is 8, a mixture of experts: give",
        ),
        (
            "granitemoehybrid",
            {"mamba_n_heads": 4, "num_local_experts": 0},
            "layer_types has Mamba layers, which are not implemented: give a Granite",
        ),
        (
            "qwen2_vl",
            {"num_attention_heads": 64},
            "hidden_size is 16: expected at least 64, one for each",
        ),
        ("falcon", {"alibi": True}, "alibi is True: expected False"),
        ("gemma4_text", {"enable_moe_block": True}, "a mixture of experts: give a den"),
        (
            "gemma4_text",
            {"layer_types": [_SLIDING, _FULL] * 2, "num_kv_shared_layers": 1},
            "num_kv_shared_layers 1: expected groups of one size",
        ),
        (
            "granite",
            {"logits_scaling": 0.0},
            r"Expected `float` > 0.0 - at `\$\.logits_scaling`",
        ),
        ("llama", {"hidden_act": "relu"}, "the activation is 'relu': expected silu or"),
        (
            "llama",
            {"num_key_value_heads": 3},
            "num_attention_heads is 4: expected a multiple of num_key_value_heads, 3",
        ),
        (
            "llama",
            _COMPLETE | {"num_attention_heads": 3},
            "not a multiple of the number",
        ),
        (
            "llama",
            {"eos_token_id": None},
            "eos_token_id is missing: expected the token",
        ),
        (
            "llama",
            {"quantization_config": {"quant_method": "awq"}},
            "the weights are quantised by awq: give the unquantised",
        ),
        (
            "llama",
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "usually the one whose name lacks -bnb-4bit .*; --load-in nf4 loads it",
        ),
        (
            "llama",
            {"quantization": {"group_size": 64, "bits": 4}},
            "the weights are quantised by MLX .*give the unquantised",
        ),
        (
            "llama",
            {"hidden_size": "wide"},
            r"Expected `int`, got `str` - at `\$\.hidden_size`",
        ),
        (
            "gemma2",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention is set: expected",
        ),
    ],
)
def test_a_config_that_the_decoder_cannot_run_is_refused_by_field(
    model_type, changes, message, capfd
):
    with refused(message):
        raw = _SMALL | changes | {"model_type": model_type}
        family_of_json(raw).read_config(raw)
    # Libraries would print the file's text as it is.
    assert capfd.readouterr().err == ""
