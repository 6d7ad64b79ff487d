"""Configurations as trainers and users write them: each with the scalings that it gives.

Every adapter has the modules `_Q` and `_DOWN`, and the base is a Qwen 2.5. What a configuration gives is PEFT's rule:
alpha / r, with rslora alpha / sqrt(r), and patterns by PEFT's regular expressions.
"""

import numpy as np
import pytest
from json_files import write_json
from safetensors.numpy import save_file

from lorafusion_jax.io import open_base, read_adapter

_Q = "model.layers.0.self_attn.q_proj"
_DOWN = "model.layers.11.mlp.down_proj"
# Changes of the configuration -> the scalings of both modules. `_ranks` are those in the tensors, by default 8.
_ACCEPTED = [
    ({}, (1.0, 1.0)),
    ({"r": 1, "lora_alpha": 32, "_ranks": (1, 1)}, (32.0, 32.0)),
    ({"lora_alpha": -8}, (-1.0, -1.0)),
    ({"r": 16, "lora_alpha": 32, "use_rslora": True, "_ranks": (16, 16)}, (8.0, 8.0)),
    ({"lora_alpha": 16, "alpha_pattern": {"q_proj": 4}}, (0.5, 2.0)),
    (
        {"lora_alpha": 16, "alpha_pattern": {"self_attn.q_proj": 4, "q_proj": 8}},
        (0.5, 2.0),
    ),
    (
        {
            "lora_alpha": 16,
            "alpha_pattern": {"[qk]_proj": 8, r"layers.[0-9].self_attn\.q_proj": 4},
        },
        (1.0, 2.0),
    ),
    (
        {
            "lora_alpha": 16,
            "alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 24},
        },
        (3.0, 2.0),
    ),
    (
        {"lora_alpha": 16, "alpha_pattern": {r"layers\.\d+\.mlp\.down_proj": 24}},
        (2.0, 3.0),
    ),
    ({"rank_pattern": {"q_proj": 4, "down_proj": 2}, "_ranks": (4, 2)}, (2.0, 4.0)),
    ({"lora_alpha": 16, "rank_pattern": {_DOWN: 32}, "_ranks": (8, 32)}, (2.0, 0.5)),
    (
        {
            "rank_pattern": {"q_proj": 4},
            "alpha_pattern": {"q_proj": 1},
            "_ranks": (4, 8),
        },
        (0.25, 1.0),
    ),
    (
        {"r": 4, "rank_pattern": {"q_proj": 16}, "use_rslora": True, "_ranks": (16, 4)},
        (2.0, 4.0),
    ),
    # Without effect.
    (
        {
            "target_modules": "all-linear",
            "layers_to_transform": [0, 11],
            "layers_pattern": "layers",
            "modules_to_save": [],
            "bias": None,
            "lora_bias": False,
            "use_dora": None,
            "init_lora_weights": False,
            "layer_replication": [],
            "trainable_token_indices": [],
            "target_parameters": [],
            "base_model_name_or_path": None,
        },
        (1.0, 1.0),
    ),
    (
        {
            "target_modules": r".*\.(q_proj|down_proj)$",
            "layers_to_transform": 3,
            "exclude_modules": "lm_head",
            "init_lora_weights": "Gaussian",
            "fan_in_fan_out": True,
            "task_type": None,
            "inference_mode": False,
            "base_model_name_or_path": "/models/checkpoint-500/",
        },
        (1.0, 1.0),
    ),
    (
        {
            "target_modules": None,
            "init_lora_weights": "orthogonal",
            "revision": "main",
            "runtime_config": {"ephemeral_gpu_offload": False},
            "base_model_name_or_path": r"C:\models\Qwen2.5-7B",
        },
        (1.0, 1.0),
    ),
    (
        {
            "target_modules": ["q_proj", "down_proj", "q_proj", "no_such_module"],
            "init_lora_weights": "eva",
            "eva_config": {"rho": 2.0},
            "a_field_of_tomorrow": 1,
            "base_model_name_or_path": "unsloth/qwen2.5-7b-instruct-unsloth-bnb-4bit",
        },
        (1.0, 1.0),
    ),
    # Of the same family: the shapes decide.
    ({"base_model_name_or_path": "Qwen/Qwen3-8B"}, (1.0, 1.0)),
]


def _read(fields, folder):
    fields = {
        "peft_type": "LORA",
        "base_model_name_or_path": "Qwen/Qwen2.5-7B-Instruct",
    } | fields
    base = folder / "Qwen2.5-7B-Instruct"
    adapter = folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text('{"model_type": "qwen2"}')
    ranks = dict(zip((_Q, _DOWN), fields.pop("_ranks", (8, 8)), strict=True))
    write_json(adapter / "adapter_config.json", fields)
    shapes = {f"{path}.lora_A.weight": (r, 6) for path, r in ranks.items()}
    shapes |= {f"{path}.lora_B.weight": (5, r) for path, r in ranks.items()}
    tensors = {
        f"base_model.model.{name}": np.ones(shape, np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    modules = dict.fromkeys((_Q, _DOWN), (6, 5))
    return read_adapter(str(adapter), shapes=modules, base=open_base(str(base)))


@pytest.mark.parametrize(("fields", "scalings"), _ACCEPTED)
def test_accepted_with_scalings(tmp_path, fields, scalings):
    assert _read(dict(fields), tmp_path).scaling == dict(
        zip((_Q, _DOWN), scalings, strict=True)
    )
