"""Configurations of PEFT's own classes: drawn options are converted as PEFT merges them, all others are refused."""

import json
import random

import numpy as np
import pytest

from lorafusion_jax.io.peft.adapter import read_adapter

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore")]  # PEFT warns about odd options

# Options of the kinds that are converted, each drawn by itself.
_RANKS = {"rank_pattern": [{}, {"k": 2}], "alpha_pattern": [{}, {r"layers\.0\.q": 9, "o": 2}]}
_LAYERS = {"layers_to_transform": [None, None, [1]], "exclude_modules": [None, ["layers.0.o"]]}
_DROPOUTS = {"rank_dropout": [0.0, 0.2], "module_dropout": [0.0, 0.2]}
_LYCORIS = {"r": [1, 3, 40], "alpha": [1, 5], "init_weights": [True, False], **_RANKS, **_LAYERS, **_DROPOUTS}
_OPTIONS = {
    "LORA": {
        **{"r": [1, 3, 20], "lora_alpha": [1, 5.5], "lora_dropout": [0.0, 0.1], "use_rslora": [False, True]},
        **{"use_dora": [False, True], "init_lora_weights": [True, False, "gaussian"]},
        **_RANKS,
        **_LAYERS,
    },
    "LOHA": {**_LYCORIS, "use_effective_conv2d": [False, True]},
    "LOKR": {
        **_LYCORIS,
        **{"decompose_both": [False, True], "decompose_factor": [-1, 2, 8], "rank_dropout_scale": [False, True]},
    },
    "VERA": {"r": [2, 5], "vera_dropout": [0.0, 0.1], "d_initial": [0.1, 1.0], "projection_prng_key": [0, 5]},
    "RANDLORA": {"r": [4, 7], "randlora_alpha": [3, 640], "sparse": [False, True], "very_sparse": [False, True]},
    "OFT": {
        **{"oft_block_size": [2, 4, 8], "coft": [False, True], "eps": [6e-5, 0.3], "block_share": [False, True]},
        **{"use_cayley_neumann": [False, True], "num_cayley_neumann_terms": [1, 2, 3, 5, 8]},
        **_LAYERS,
    },
    "BOFT": {"boft_block_size": [2, 4, 8], "boft_dropout": [0.0, 0.1], "init_weights": [True, False], **_LAYERS},
}

# Arguments that classes of other kinds need.
_NEEDED = {"ADALORA": {"total_step": 10}, "TRAINABLE_TOKENS": {"token_indices": [0]}}


def _saved(folder, kind, fields):
    """Save an adapter of PEFT's for a model of two layers, and return the base's weights and the merged ones."""
    import peft
    import torch

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.o = torch.nn.Linear(16, 24), torch.nn.Linear(16, 16), torch.nn.Linear(24, 16)

    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([Layer(), Layer()])})})
    base = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    model = peft.get_peft_model(model, _config(kind, target_modules=["q", "k", "o"], **fields))
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor += 0.1 * torch.randn_like(tensor)
    model.save_pretrained(folder)
    return base, {name: tensor.numpy() for name, tensor in model.merge_and_unload().state_dict().items()}


def _config(kind, **fields):
    import peft

    return peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**fields)


def _read(folder, base):
    weights = {name: array for name, array in base.items() if name.endswith(".weight")}
    shapes = {name.removesuffix(".weight"): array.shape[::-1] for name, array in weights.items()}
    return read_adapter(str(folder), shapes=shapes, base_tensor=base.__getitem__, rank=24)


def _merged(adapter, base):
    """Return the weights with an adapter's updates and magnitudes, in float64."""
    found = {name: array.astype(float) for name, array in base.items()}
    for path, (a, b) in adapter.factors.items():
        weight = found[f"{path}.weight"] + adapter.scaling[path] * b.astype(float) @ a
        if adapter.magnitude is not None:
            weight *= (adapter.magnitude[path] / np.linalg.norm(weight, axis=1))[:, None]
        found[f"{path}.weight"] = weight
    return found


@pytest.mark.parametrize("kind", _OPTIONS)
def test_drawn_configurations_are_converted_as_peft_merges_them(kind, tmp_path):
    draw = random.Random(f"configurations, {kind}")
    for number in range(8):
        fields = {name: draw.choice(values) for name, values in _OPTIONS[kind].items()}
        base, merged = _saved(tmp_path / str(number), kind, fields)
        adapter = _read(tmp_path / str(number), base)
        assert adapter.config["peft_type"] == "LORA" and adapter.factors
        for name, weight in _merged(adapter, base).items():
            np.testing.assert_allclose(weight, merged[name], atol=1e-5, err_msg=f"{fields} {name}")


@pytest.mark.parametrize("kind", ["OFT", "BOFT", "VERA", "RANDLORA"])
def test_trained_biases_of_other_kinds_are_refused(kind, tmp_path):
    base, _ = _saved(tmp_path, kind, {"bias": "all"})
    with pytest.raises(ValueError, match="bias is 'all'.*retrain with bias='none'"):
        _read(tmp_path, base)


def test_other_kinds_are_refused_by_their_configuration(tmp_path):
    """No weights are needed to refuse them."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    others = sorted({kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - _OPTIONS.keys())
    assert {"IA3", "LN_TUNING", "ADALORA", "PREFIX_TUNING", "XLORA"} <= set(others)
    for kind in others:
        remedy = r"merge it into the base with PEFT" if kind in ("IA3", "LN_TUNING") else "retrain as LoRA"
        folder = tmp_path / kind
        folder.mkdir()
        if kind in _NEEDED:
            _config(kind, **_NEEDED[kind]).save_pretrained(folder)
        else:
            (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        with pytest.raises(ValueError, match=f"peft_type is '{kind}'.*{remedy}"):
            read_adapter(str(folder))
