"""Adapters of PEFT that add a matrix, converted to LoRA, against PEFT's merged weights and `convert_to_lora`."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from lorafusion_jax.io.peft.config import AdapterError
from lorafusion_jax.io.peft.kinds import as_lora


def _butterflies(monkeypatch):
    """Give PEFT the kernel of several butterfly factors, which it has for CUDA only."""
    import torch
    from peft.tuners.boft import layer

    class Diagonal:
        @staticmethod
        def apply(blocks):
            return torch.stack([torch.block_diag(*row) for row in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", Diagonal)


# PEFT's class of configurations and its fields.
_CONFIGS = {
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "loha patterns": (
        "LoHaConfig",
        {"r": 3, "alpha": 5, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"0.self_attn.q_proj": 9}},
    ),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 3}),
    "lokr both": ("LoKrConfig", {"r": 2, "alpha": 3, "decompose_both": True, "decompose_factor": 8}),
    "lokr full": ("LoKrConfig", {"r": 64, "alpha": 3}),
    "vera": ("VeraConfig", {"r": 6}),
    "randlora": ("RandLoraConfig", {"r": 5}),
    "oft": ("OFTConfig", {"oft_block_size": 8}),
    "oft exact": ("OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": False}),
    "oft terms": ("OFTConfig", {"oft_block_size": 4, "num_cayley_neumann_terms": 3}),
    "oft shared": ("OFTConfig", {"oft_block_size": 8, "coft": True, "eps": 0.3, "block_share": True}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "boft butterfly": ("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 3}),
}


def _saved(tmp_path, name):
    """Return the model, and the configuration, tensors, shapes and base weights of the adapter that PEFT saves."""
    import peft
    import torch
    import transformers

    kind, fields = _CONFIGS[name]
    config = getattr(peft, kind)(target_modules=["q_proj", "k_proj", "down_proj"], init_weights=False, **fields)
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


@pytest.mark.peft
@pytest.mark.parametrize("name", _CONFIGS)
def test_full_rank_equals_the_weights_that_peft_merges(name, tmp_path, monkeypatch):
    _butterflies(monkeypatch)
    model, config, tensors, shapes, base = _saved(tmp_path, name)
    found = as_lora(config, tensors, rank=32, where="here", shapes=shapes, base_tensor=base.__getitem__)
    merged = model.merge_and_unload().state_dict()
    updates = _updates(found.tensors)
    assert len(updates) == 2 * len(config["target_modules"])
    for path, update in updates.items():
        wanted = merged[f"{path}.weight"].numpy() - base[f"{path}.weight"]
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(update, wanted, atol=2e-6 * max(1, np.abs(wanted).max()))
        assert found.residual[path] < 1e-6


@pytest.mark.peft
@pytest.mark.parametrize("name", ["loha", "lokr", "vera", "randlora"])
def test_low_rank_equals_convert_to_lora_of_peft(name, tmp_path):
    model, config, tensors, shapes, base = _saved(tmp_path, name)
    found = as_lora(config, tensors, rank=4, where="here", shapes=shapes, base_tensor=base.__getitem__)
    import peft

    _, converted = peft.tuners.lora.conversion.convert_to_lora(model, rank=4)
    wanted = _updates({key: tensor.numpy() for key, tensor in converted.items()})
    updates = _updates(found.tensors)
    assert set(updates) == set(wanted)
    for path, update in updates.items():
        np.testing.assert_allclose(update, wanted[path], atol=1e-4 * max(1, np.abs(update).max()))
    full = _updates(as_lora(config, tensors, rank=32, where="", shapes=shapes, base_tensor=base.__getitem__).tensors)
    for path, update in updates.items():
        residual = np.linalg.norm(full[path] - update) / np.linalg.norm(full[path])
        assert found.residual[path] == pytest.approx(residual, abs=1e-5)


def _vera(rank=3, d_in=6, d_out=5, **changes):
    """Return the configuration and tensors of a VeRA adapter of one matrix."""
    draw = np.random.default_rng(0)
    tensors = {
        "base_model.vera_A": draw.normal(size=(rank, 8)),
        "base_model.vera_B": draw.normal(size=(7, rank)),
        "base_model.model.block.q.vera_lambda_d": draw.normal(size=rank),
        "base_model.model.block.q.vera_lambda_b": draw.normal(size=d_out),
    } | changes
    config = {"peft_type": "VERA", "r": rank, "target_modules": ["q"]}
    return config, {key: np.asarray(array, np.float32) for key, array in tensors.items() if array is not None}


def _converted(config, tensors, rank=3):
    return as_lora(config, tensors, rank=rank, where="vera", shapes={"block.q": (6, 5)}, base_tensor={}.__getitem__)


def test_a_vera_becomes_lora_exactly_at_its_rank_and_with_a_residual_below():
    config, tensors = _vera()
    scaled = tensors["base_model.model.block.q.vera_lambda_b"][:, None] * tensors["base_model.vera_B"][:5]
    expected = scaled @ (
        tensors["base_model.model.block.q.vera_lambda_d"][:, None] * tensors["base_model.vera_A"][:, :6]
    )
    for rank in (3, 2):
        found = _converted(config, tensors, rank)
        difference = np.linalg.norm(_updates(found.tensors)["block.q"] - expected) / np.linalg.norm(expected)
        assert found.config["peft_type"] == "LORA"
        assert found.config["r"] == found.config["lora_alpha"] == rank
        assert found.residual["block.q"] == pytest.approx(difference, abs=1e-6)
        assert (difference < 1e-6) == (rank == 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model.vera_A": None}, "has no vera_A.*save_projection=True"),
        ({"base_model.model.block.q.vera_lambda_d": np.ones(4)}, r"expected vera_lambda_d of shape \[3\], got \[4\]"),
        ({"base_model.model.block.q.vera_lambda_b": None}, "expected a tensor vera_lambda_b, got vera_lambda_d"),
        ({"base_model.model.block.z.vera_lambda_b": np.ones(5)}, "the base has no linear module block.z"),
    ],
)
def test_incomplete_adapters_are_refused_by_name(changes, message):
    with pytest.raises(AdapterError, match=message):
        _converted(*_vera(**changes))
