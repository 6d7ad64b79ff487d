"""Adapters of PEFT that add a matrix, converted to LoRA, against PEFT's merged weights and `convert_to_lora`."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from lorafusion_jax.io.peft.config import AdapterError
from lorafusion_jax.io.peft.kinds import as_lora

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.peft

_TARGETS = ["q_proj", "k_proj", "down_proj"]


def _butterflies(monkeypatch):
    """Give PEFT the kernel of several butterfly factors, which it has for CUDA only."""
    from peft.tuners.boft import layer

    class Diagonal:
        @staticmethod
        def apply(blocks):
            return torch.stack([torch.block_diag(*row) for row in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", Diagonal)


_CONFIGS = {
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=_TARGETS, init_weights=False),
    "loha patterns": lambda: peft.LoHaConfig(
        r=3, alpha=5, target_modules=_TARGETS, init_weights=False, rank_pattern={"k_proj": 2}, alpha_pattern={"0.self_attn.q_proj": 9}
    ),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=_TARGETS, init_weights=False),
    "lokr both": lambda: peft.LoKrConfig(
        r=2, alpha=3, target_modules=_TARGETS, init_weights=False, decompose_both=True, decompose_factor=8
    ),
    "lokr full": lambda: peft.LoKrConfig(r=64, alpha=3, target_modules=_TARGETS, init_weights=False),
    "vera": lambda: peft.VeraConfig(r=6, target_modules=["q_proj", "down_proj"], init_weights=False),
    "randlora": lambda: peft.RandLoraConfig(r=5, target_modules=_TARGETS, init_weights=False),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=_TARGETS, init_weights=False),
    "oft exact": lambda: peft.OFTConfig(
        oft_block_size=4, target_modules=_TARGETS, init_weights=False, use_cayley_neumann=False
    ),
    "oft terms": lambda: peft.OFTConfig(
        oft_block_size=4, target_modules=_TARGETS, init_weights=False, num_cayley_neumann_terms=3
    ),
    "oft shared": lambda: peft.OFTConfig(
        oft_block_size=8, target_modules=_TARGETS, init_weights=False, coft=True, eps=0.3, block_share=True
    ),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=_TARGETS, init_weights=False),
    "boft butterfly": lambda: peft.BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=3, target_modules=_TARGETS, init_weights=False
    ),
}


def _saved(tmp_path, config):
    """Return the model, and the configuration, tensors, shapes and base weights of the adapter that PEFT saves."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=10, num_hidden_layers=2, **sizes))
    base = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    shapes = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor += 0.05 * torch.randn_like(tensor)
    model.save_pretrained(tmp_path)
    stored = peft.PeftConfig.from_pretrained(tmp_path).to_dict()
    stored["peft_type"] = stored["peft_type"].value
    return model, stored, load_file(tmp_path / "adapter_model.safetensors"), shapes, base


def _updates(tensors):
    ends = ".lora_A.weight", ".lora_B.weight"
    paths = {name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0])}
    return {path.removeprefix("base_model.model."): tensors[path + ends[1]] @ tensors[path + ends[0]] for path in paths}


@pytest.mark.parametrize("name", _CONFIGS)
def test_full_rank_equals_the_weights_that_peft_merges(name, tmp_path, monkeypatch):
    _butterflies(monkeypatch)
    model, config, tensors, shapes, base = _saved(tmp_path, _CONFIGS[name]())
    found = as_lora(config, tensors, rank=32, where="here", shapes=shapes, base_tensor=base.__getitem__)
    merged = model.merge_and_unload().state_dict()
    updates = _updates(found.tensors)
    assert len(updates) == 2 * len(config["target_modules"])
    for path, update in updates.items():
        wanted = merged[f"{path}.weight"].numpy() - base[f"{path}.weight"]
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(update, wanted, atol=2e-6 * max(1, np.abs(wanted).max()))
        assert found.residual[path] < 1e-6


@pytest.mark.parametrize("name", ["loha", "lokr", "vera", "randlora"])
def test_low_rank_equals_convert_to_lora_of_peft(name, tmp_path):
    model, config, tensors, shapes, base = _saved(tmp_path, _CONFIGS[name]())
    found = as_lora(config, tensors, rank=4, where="here", shapes=shapes, base_tensor=base.__getitem__)
    _, converted = peft.tuners.lora.conversion.convert_to_lora(model, rank=4)
    wanted = _updates({key: tensor.numpy() for key, tensor in converted.items()})
    updates = _updates(found.tensors)
    assert set(updates) == set(wanted)
    for path, update in updates.items():
        np.testing.assert_allclose(update, wanted[path], atol=1e-5 * max(1, np.abs(update).max()))
    full = _updates(as_lora(config, tensors, rank=32, where="", shapes=shapes, base_tensor=base.__getitem__).tensors)
    for path, update in updates.items():
        residual = np.linalg.norm(full[path] - update) / np.linalg.norm(full[path])
        assert found.residual[path] == pytest.approx(residual, abs=1e-5)
