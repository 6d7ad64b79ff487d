"""Options of PEFT's LoRA against its merged weights, and its other kinds of adapters, which are refused."""

import random

import numpy as np
import pytest
from json_files import write_json
from numpy.testing import assert_allclose
from refusals import refused

from lorafusion_jax.io import read_adapter


def _of_peft(test):
    """Mark a test that needs PEFT, which warns about odd options."""
    return pytest.mark.peft(pytest.mark.filterwarnings("ignore")(test))


_OPTIONS = {
    "r": [1, 3, 20],
    "lora_alpha": [1, 5.5],
    "lora_dropout": [0.0, 0.1],
    "use_rslora": [False, True],
    **{"use_dora": [False, True], "init_lora_weights": [True, False, "gaussian"]},
    "rank_pattern": [{}, {"k": 2}],
    "alpha_pattern": [{}, {r"layers\.0\.q": 9, "o": 2}],
    "layers_to_transform": [None, None, [1]],
    "exclude_modules": [None, ["layers.0.o"]],
}
_CHANGE_BASE = ("pissa", "olora")
# Kinds that PEFT converts to LoRA, and others that it merges.
_CONVERTED = {"LOHA", "LOKR", "RANDLORA", "VERA"}
_MERGED = {"BOFT", "IA3", "LN_TUNING", "OFT"}
# Arguments that classes of other kinds need.
_NEEDED = {"ADALORA": {"total_step": 10}, "TRAINABLE_TOKENS": {"token_indices": [0]}}


def _saved(folder, fields):
    """Save a LoRA of PEFT's for a model of two layers, and return it with the base's weights."""
    import peft
    import torch

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(16, 24)
            self.k = torch.nn.Linear(16, 16)
            self.o = torch.nn.Linear(24, 16)

    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {
            "model": torch.nn.ModuleDict(
                {"layers": torch.nn.ModuleList([Layer(), Layer()])}
            )
        }
    )
    base = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    model = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q", "k", "o"], **fields)
    )
    how = {}
    if fields.get("init_lora_weights") in _CHANGE_BASE:
        how["path_initial_model_for_weight_conversion"] = str(
            folder.with_name("initial")
        )
        model.save_pretrained(*how.values())
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor += 0.1 * torch.randn_like(tensor)
    model.save_pretrained(folder, **how)
    return model, base


def _read(folder, fields):
    """Save a LoRA with these fields, read it, and compare its weights with those that PEFT merges."""
    model, base = _saved(folder, fields)
    adapter = read_adapter(str(folder))
    assert not adapter.notes  # no field that PEFT writes is unknown
    merged = model.merge_and_unload().state_dict()
    for path, (a, b) in adapter.factors.items():
        weight = base[f"{path}.weight"] + adapter.scaling[path] * b.astype(float) @ a
        if adapter.magnitude is not None:
            factors = adapter.magnitude[path] / np.linalg.norm(weight, axis=1)
            weight *= factors[:, None]
        base[f"{path}.weight"] = weight
    for name, weight in base.items():
        message = f"{fields} {name}"
        assert_allclose(weight, merged[name].numpy(), atol=1e-5, err_msg=message)
    return adapter


@_of_peft
def test_drawn_configurations_are_read_as_peft_merges_them(tmp_path):
    draw = random.Random("configurations, LORA")
    for number in range(8):
        fields = {name: draw.choice(values) for name, values in _OPTIONS.items()}
        _read(tmp_path / str(number), fields)


@_of_peft
@pytest.mark.parametrize("init", _CHANGE_BASE)
@pytest.mark.parametrize("rslora", [False, True])
def test_an_initialisation_that_changes_the_base_is_read_after_its_conversion(
    tmp_path, init, rslora
):
    fields = {"r": 3, "lora_alpha": 2, "use_rslora": rslora, "init_lora_weights": init}
    adapter = _read(tmp_path / "saved", fields)
    assert {len(a) for a, _ in adapter.factors.values()} == {6}


@_of_peft
def test_other_kinds_are_refused_by_their_configuration(tmp_path):
    """No weights are needed to refuse them."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    others = sorted({kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {"LORA"})
    assert _CONVERTED | _MERGED | {"ADALORA", "PREFIX_TUNING", "XLORA"} <= set(others)
    for kind in others:
        remedy = (
            "convert it with PEFT's save_as_lora, or "
            if kind in _CONVERTED
            else "expected LORA; "
        )
        remedy += (
            "merge it into the base with PEFT's"
            if kind in _CONVERTED | _MERGED
            else "retrain as LoRA"
        )
        folder = tmp_path / kind
        folder.mkdir()
        if kind in _NEEDED:
            PEFT_TYPE_TO_CONFIG_MAPPING[kind](**_NEEDED[kind]).save_pretrained(folder)
        else:
            write_json(folder / "adapter_config.json", {"peft_type": kind})
        with refused(f"peft_type is '{kind}'.*{remedy}"):
            read_adapter(str(folder))
