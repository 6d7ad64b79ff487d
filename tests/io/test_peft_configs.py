"""Configurations as PEFT from 0.2 to 0.21, other tools and people write them: those that are accepted.

Written for these tests in the form of files that lie in public repositories; the weights are made to fit them.
"""

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorafusion_jax.parts import read_adapter

# Fields by the version of PEFT that added them, with their defaults.
_ADDED: dict[str, dict[str, Any]] = {
    "0.2": {
        "base_model_name_or_path": "somebody/llama-7b",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    },
    "0.3": {"init_lora_weights": True},
    "0.4": {"auto_mapping": None, "layers_pattern": None, "layers_to_transform": None, "revision": None},
    "0.6": {"alpha_pattern": {}, "rank_pattern": {}},
    "0.7": {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"},
    "0.8": {"use_rslora": False},
    "0.9": {"use_dora": False},
    "0.10": {"layer_replication": None},
    "0.14": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.15": {"corda_config": None, "trainable_token_indices": None},
    "0.17": {"qalora_group_size": 16, "target_parameters": None, "use_qalora": False},
    "0.18": {"alora_invocation_tokens": None, "arrow_config": None, "peft_version": "0.18.0"},
    "0.21": {"kasa_config": None, "lora_ga_config": None, "use_bdlora": None, "velora_config": None},
}
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _fields(version: str, **changes: Any) -> dict[str, Any]:
    names = list(_ADDED)
    fields: dict[str, Any] = {}
    for name in names[: names.index(version) + 1]:
        fields |= _ADDED[name]
    return dict(sorted((fields | changes).items()))


def _peft(version: str, **changes: Any) -> bytes:
    """Write as PEFT does: sorted, indented, without a line break at the end."""
    return json.dumps(_fields(version, **changes), indent=2).encode()


_UNSLOTH = {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}, "lora_dropout": 0}
# Scaling and adapter_config.json.
_ACCEPTED: dict[str, tuple[float, bytes]] = {
    "the first version": (2.0, _peft("0.2")),
    "Conv1D": (4.0, _peft("0.6", lora_alpha=32, target_modules=["c_attn"], fan_in_fan_out=True)),
    "T5": (2.0, _peft("0.4", r=16, lora_alpha=32, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")),
    "a classifier without a saved head": (2.0, _peft("0.8", task_type="SEQ_CLS")),
    "every map of a Llama": (0.25, _peft("0.10", r=64, target_modules=_ALL, revision="main")),
    "layers by their paths": (1.0, _peft("0.14", target_modules=["h.0.c_attn", "h.1.c_attn"], lora_alpha=8)),
    "made by unsloth": (2.0, _peft("0.18", revision="unsloth", **_UNSLOTH)),
    "DoRA with a pattern of targets, rank-stabilised": (
        4.0,
        _peft("0.18", use_dora=True, use_rslora=True, r=64, lora_alpha=32, target_modules=r".*\.(q|v)_proj"),
    ),
    "a small scale and a high rank": (0.125, _peft("0.21", r=128, lora_alpha=16)),
    "by pattern": (2.0, _peft("0.21", r=4, lora_alpha=8, rank_pattern={"v_proj": 8}, alpha_pattern={"v_proj": 16})),
    "an escaped name": (2.0, json.dumps(_fields("0.15", base_model_name_or_path="C:\\Modelle\\größer")).encode()),
    "line ends of Windows": (2.0, _peft("0.8").replace(b"\n", b"\r\n")),
    "by hand": (2.0, b'{"peft_type": "LORA",\n "r": 16, "lora_alpha": 32,\n "target_modules": ["q_proj", "v_proj"]}\n'),
}


def _write(folder, data):
    """Write a configuration, and weights of every module that it names, or of two."""
    (folder / "adapter_config.json").write_bytes(data)
    config = json.loads(data)
    targets = config.get("target_modules")
    names = sorted(set(targets)) if isinstance(targets, list) else ["self_attn.q_proj", "self_attn.v_proj"]
    rng = np.random.default_rng(0)
    tensors = {}
    for name in names:
        r = (config.get("rank_pattern") or {}).get(name, config.get("r", 8))
        prefix = f"base_model.model.model.layers.0.{name}"
        tensors[f"{prefix}.lora_A.weight"] = rng.standard_normal((r, 12), np.float32)
        tensors[f"{prefix}.lora_B.weight"] = rng.standard_normal((10, r), np.float32)
        if config.get("use_dora"):
            tensors[f"{prefix}.lora_magnitude_vector"] = rng.standard_normal(10, np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    return config


@pytest.mark.parametrize("name", _ACCEPTED)
def test_accepted_with_its_scaling(tmp_path, name):
    scaling, data = _ACCEPTED[name]
    config = _write(tmp_path, data)
    adapter = read_adapter(str(tmp_path))
    assert adapter.config == config and adapter.config_text == data
    assert set(adapter.scaling.values()) == {scaling}
