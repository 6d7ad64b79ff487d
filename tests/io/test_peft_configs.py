"""98 real adapter_config.json files, each accepted or refused by name, with weights made to fit them."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorafusion_jax.io.peft.adapter import read_adapter

# Where the verdict differs from the index's, and why.
_DIFFERENT = {
    "103__HarshilMaks__ghost-architect.json": (
        "one DoRA adapter by itself can be used; a pool of several is refused where the pool is made"
    ),
}


def _tensors(config):
    """Weights of every module that the configuration names, or of two."""
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
    return tensors


def _verdict(folder, data):
    """Return (accept or refuse, scaling, reason)."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(data)
    config = json.loads(data) if data.lstrip().startswith(b"{") else {}
    save_file(_tensors(config), folder / "adapter_model.safetensors")
    try:
        adapter = read_adapter(str(folder))
    except ValueError as error:
        return "refuse", None, str(error).replace(f"{folder}/", "")
    assert adapter.config == config and adapter.config_text == data
    scalings = set(adapter.scaling.values())
    assert len(scalings) == 1
    return "accept", scalings.pop(), "; ".join(note for note in adapter.notes if note.startswith("warning"))


def test_every_real_config_is_accepted_or_refused_by_name(shared, tmp_path, capsys):
    configs = shared / "data" / "peft_configs"
    index = json.loads((configs / "index.json").read_text())
    assert len(index) == 98
    rows, wrong = [], []
    for entry in index:
        verdict, scaling, reason = _verdict(tmp_path / entry["file"], (configs / entry["file"]).read_bytes())
        rows.append(f"{entry['file'][:34]:34} {verdict:6}  {scaling or '':<8.5}  {reason[:110]}")
        expected = entry["expected"]
        if (verdict != expected) != (entry["file"] in _DIFFERENT):
            wrong.append(f"{entry['file']}: {verdict}, but the index says {expected}: {reason}")
        if verdict == "accept" and not np.isclose(scaling, entry["scaling"], rtol=1e-4):
            wrong.append(f"{entry['file']}: scaling {scaling}, but the index says {entry['scaling']}")
        if verdict == "refuse" and not reason.startswith("adapter_config.json: "):
            wrong.append(f"{entry['file']}: does not name its file: {reason}")
    with capsys.disabled():
        print("\n" + "\n".join(rows))
        print("\n".join(f"differs from the index: {file}: {why}" for file, why in _DIFFERENT.items()))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("002__wujindou__BLOOM-LORA.json", "enable_lora is set: the MergedLinear of PEFT 0.2"),
        ("101__CE-RAG__cctv.json", r"modules_to_save is \['logit_scale', 'logit_bias'\]"),
        ("133__AnHu2410__MD_crosslingual.json", "AdapterHub"),
        ("136__kotlarmilos__gemma3-reasoning.json", "tunix / qwix"),
        ("137__jungyoon-lee__aicity2026-track5.json", "own format, 'cosmos3-native-lora'"),
        ("139__Inishpy__lerobot-libero.json", r"no peft_type among its fields \['base_model'\]"),
        ("140__Faizanyousaf140__VLM-qlora-doc2markdown.json", "this is a Git LFS pointer"),
        ("143__chatchat-space__Langchain-Chatchat.json", "peft_type is 'PREFIX_TUNING': wanted 'LORA'"),
    ],
)
def test_each_kind_of_refusal_names_its_reason(shared, tmp_path, file, name):
    data = (shared / "data" / "peft_configs" / file).read_bytes()
    (tmp_path / "adapter_config.json").write_bytes(data)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{name}"):
        read_adapter(str(tmp_path))
