"""Real configurations of adapters whose base is known: which are accepted, and in which words the others are refused.

`real_adapters.json` has 67: the first 24 folders named `adapters/`, by the name of their public repository, and 43 in
other folders, in random order. Each row has the source, the base and its `model_type`, and the fields that are read.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorafusion_jax.models.registry import family_of_json
from lorafusion_jax.parts import open_base, read_adapter

_ROWS = json.loads(Path(__file__).with_name("real_adapters.json").read_text())
_MODULE = "model.layers.0.self_attn.q_proj"


def _read(row, folder):
    """Read an adapter of one module with a row's configuration, and find the family of its base."""
    fields = row["fields"]
    adapter = folder / "adapter"
    base = folder / row["base"].rpartition("/")[2]
    adapter.mkdir()
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": row["model_type"]}))
    if "peft_type" in fields:
        names = (f"base_model.model.{_MODULE}.lora_{kind}.weight" for kind in "AB")
        file = "adapter_model.safetensors"
        shapes = ((fields["r"], 2), (3, fields["r"]))
        fields = fields | {"base_model_name_or_path": row["base"]}
    else:
        names = (f"{_MODULE}.lora_{kind}" for kind in "ab")
        file = "adapters.safetensors"
        rank = fields["lora_parameters"]["rank"]
        shapes = ((2, rank), (rank, 3))
        fields = fields | {"model": row["base"]}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    save_file(
        {
            name: np.ones(shape, np.float32)
            for name, shape in zip(names, shapes, strict=True)
        },
        adapter / file,
    )
    read = read_adapter(str(adapter), base=open_base(str(base)))
    family_of_json({"model_type": row["model_type"]})
    return read


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: row["source"])
def test_a_real_configuration_is_accepted_or_refused_by_name(row, tmp_path):
    if row["refused"] is None:
        assert set(_read(row, tmp_path).factors) == {_MODULE}
    else:
        with pytest.raises(ValueError, match=row["refused"]):
            _read(row, tmp_path)


def test_how_many_real_configurations_are_accepted():
    assert len(_ROWS) == 67
    assert sum(row["refused"] is None for row in _ROWS) == 45
