"""Configurations of adapters, each accepted or refused by name, with weights made to fit them."""

import json

import numpy as np
import pytest
from adapter_configs import ACCEPTED, REFUSED
from safetensors.numpy import save_file

from lorafusion_jax.io.peft.adapter import read_adapter


def _write(folder, data):
    """Write a configuration, and weights of every module that it names, or of two."""
    (folder / "adapter_config.json").write_bytes(data)
    config = json.loads(data) if data.lstrip().startswith(b"{") else {}
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


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_with_its_scaling(tmp_path, name):
    scaling, data = ACCEPTED[name]
    config = _write(tmp_path, data)
    adapter = read_adapter(str(tmp_path))
    assert adapter.config == config and adapter.config_text == data
    assert set(adapter.scaling.values()) == {scaling}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_file_and_the_reason(tmp_path, name):
    reason, data = REFUSED[name]
    _write(tmp_path, data)
    with pytest.raises(ValueError, match=rf"/adapter_config\.json: .*{reason}"):
        read_adapter(str(tmp_path))
