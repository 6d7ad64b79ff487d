"""Configs of decoder-only models: the published ones against their sizes, and old spellings against new ones."""

import dataclasses
import json

import pytest
import small_llama

from lorafusion_jax.estimates.params import size
from lorafusion_jax.models.decoder import FAMILY
from lorafusion_jax.models.registry import recorded_config

# Numbers of parameters that the models' pages on the Hugging Face hub show.
_SIZES = {
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b": 494_032_768,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini": 3_821_079_552,
    "gemma-2b": 2_506_172_416,
    "smollm3-3b": 3_075_098_624,
    "olmo-2-1b": 1_484_916_736,
}

_LLAMA_3_SCALING = {
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_NAMES = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
max_position_embeddings rms_norm_eps rope_theta""".split()
# The fields of the config.json on the hub that describe the model, for one model of each kind: numbers, and others.
_PUBLISHED = {
    "llama-3.2-1b": (
        (128256, 2048, 8192, 16, 32, 8, 131072, 1e-05, 500000.0),
        {
            "model_type": "llama",
            "rope_scaling": _LLAMA_3_SCALING | {"factor": 32.0},
            "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-0.5b": (
        (151936, 896, 4864, 24, 14, 2, 32768, 1e-06, 1000000.0),
        {
            "model_type": "qwen2",
            "sliding_window": 32768,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
        },
    ),
    "gemma-2-2b": (
        (256000, 2304, 9216, 26, 8, 4, 8192, 1e-06, 10000.0),
        {
            "model_type": "gemma2",
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        }
        | {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "gemma-3-1b": (
        (262144, 1152, 6912, 26, 4, 1, 32768, 1e-06, 1000000),
        {
            "model_type": "gemma3_text",
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 512,
        }
        | {
            "rope_local_base_freq": 10000,
            "sliding_window_pattern": 6,
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "phi-3-mini": (
        (32064, 3072, 8192, 32, 32, 32, 4096, 1e-05, 10000.0),
        {
            "model_type": "phi3",
            "sliding_window": 2047,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
        },
    ),
    "gemma-2b": (
        (256000, 2048, 16384, 18, 8, 1, 8192, 1e-06, 10000.0),
        {
            "model_type": "gemma",
            "head_dim": 256,
            "hidden_act": "gelu",
            "hidden_activation": None,
        },
    ),
    "smollm3-3b": (
        (128256, 2048, 11008, 36, 16, 4, 65536, 1e-06, 5000000.0),
        {"model_type": "smollm3"},
    ),
    "olmo-2-1b": (
        (100352, 2048, 8192, 16, 16, 16, 4096, 1e-06, 500000),
        {"model_type": "olmo2", "tie_word_embeddings": False},
    ),
}

_SMALL = small_llama.CONFIG | {
    "vocab_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "factor": 4.0}
_LLAMA3 = _LLAMA_3_SCALING | {"factor": 8.0, "original_max_position_embeddings": 16}
_THETA = {"rope_theta": 500.0}
_PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
# (model_type, spelling of transformers 4, spelling of transformers 5)
_SPELLINGS = {
    "no scaling": ("llama", _THETA, _PLAIN),
    "type": (
        "llama",
        _THETA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": _LINEAR | _THETA},
    ),
    "rope_type": (
        "llama",
        _THETA | {"rope_scaling": _LINEAR | {"rope_type": "dynamic"}},
        {"rope_parameters": _LINEAR | {"rope_type": "dynamic"} | _THETA},
    ),
    "llama3": (
        "llama",
        _THETA | {"rope_scaling": _LLAMA3},
        {"rope_parameters": _LLAMA3 | _THETA},
    ),
    "window of some layers": (
        "qwen2",
        _THETA
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        _PLAIN
        | {"use_sliding_window": True, "sliding_window": 5}
        | {"layer_types": ["full_attention"] + 3 * ["sliding_attention"]},
    ),
    "alternating windows": (
        "gemma2",
        _THETA | {"sliding_window": 5},
        _PLAIN
        | {
            "sliding_window": 5,
            "layer_types": 2 * ["sliding_attention", "full_attention"],
        },
    ),
    "two bases": (
        "gemma3_text",
        _THETA
        | {
            "rope_local_base_freq": 100.0,
            "rope_scaling": _LINEAR,
            "sliding_window": 5,
            "sliding_window_pattern": 3,
        },
        {
            "rope_parameters": {
                "full_attention": _LINEAR | _THETA,
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            "sliding_window": 5,
            "layer_types": [
                *2 * ["sliding_attention"],
                "full_attention",
                "sliding_attention",
            ],
        },
    ),
    "part of a head": (
        "phi3",
        _THETA | {"partial_rotary_factor": 0.5},
        {
            "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}
            | _THETA
        },
    ),
}


def _published(name):
    numbers, others = _PUBLISHED[name]
    return FAMILY.read_config(
        dict(zip(_NAMES, numbers, strict=True)) | others | {"eos_token_id": [1, 106]}
    )


def test_models_have_the_published_numbers_of_parameters():
    models = FAMILY.shapes | {name: _published(name) for name in _PUBLISHED}
    assert {name: size(config) for name, config in models.items()} == _SIZES


@pytest.mark.parametrize("name", _PUBLISHED)
def test_a_pool_s_manifest_gives_back_the_structure(name):
    config = _published(name)
    record = json.loads(
        json.dumps({"family": "decoder", "config": dataclasses.asdict(config)})
    )
    assert recorded_config(record) == config


@pytest.mark.parametrize("case", _SPELLINGS)
def test_configs_of_transformers_4_and_5_describe_the_same_model(case):
    model_type, old, new = _SPELLINGS[case]
    small = _SMALL | {"model_type": model_type}
    read = FAMILY.read_config(small | old)
    assert read == FAMILY.read_config(small | new)
    assert read.rope.theta == 500.0 and read != FAMILY.read_config(small)


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_minus_one_is_no_token_for_padding(model_type):
    fields = _SMALL | {
        "model_type": model_type,
        "auto_map": {"AutoConfig": "theirs.Theirs"},
    }
    config = FAMILY.read_config(fields | {"pad_token_id": -1})
    assert config == FAMILY.read_config(fields | {"pad_token_id": small_llama.EOS})


@pytest.mark.parametrize(
    ("model_type", "window", "sliding"),
    [
        ("llama", 0, ()),
        ("mistral", 5, (True, False, False, False)),
        ("phi3", 5, (True,) * 4),
    ],
)
def test_only_some_families_have_windows_or_layers_without_them(
    model_type, window, sliding
):
    layers = ["sliding_attention", "full_attention", "full_attention", "full_attention"]
    config = FAMILY.read_config(
        _SMALL | {"model_type": model_type, "sliding_window": 5, "layer_types": layers}
    )
    assert (config.window, config.sliding) == (window, sliding)


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
    complete = {
        "vocab_size": 40,
        "head_dim": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
    }
    complete |= {"attention_bias": False, "mlp_bias": False, "pad_token_id": None}
    complete = small_llama.CONFIG | complete | changes
    # A type of scaling that is spelled out is left to transformers.
    assert FAMILY.read_config(complete) == FAMILY.read_config(
        complete | {"rope_scaling": {"rope_type": "default"}}
    )


def test_a_complete_config_with_a_width_that_heads_do_not_divide_is_refused():
    complete = {
        "vocab_size": 40,
        "head_dim": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
    }
    complete |= {
        "attention_bias": False,
        "mlp_bias": False,
        "pad_token_id": None,
        "num_attention_heads": 3,
    }
    with pytest.raises(
        ValueError, match="not a multiple of the number of attention heads"
    ):
        FAMILY.read_config(small_llama.CONFIG | complete)
