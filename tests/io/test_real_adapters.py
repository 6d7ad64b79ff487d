"""Real configurations of adapters whose base is known: which are accepted, and in which words the others are refused.

`real_adapters.json` has 67: the first 24 folders named `adapters/`, by the name of their public repository, and 43 in
other folders, in random order. Each row has the repository that published it, when it was made (the version of PEFT by
the newest field of the file, or the commit), the base and its `model_type`, and the fields that are read.
Rows of mlx-lm have the linear maps that its version adapts by default: all since 0.28.2, before only some.

Each adapter is made with its real modules, kind and ranks, for a base of the same family with small matrices.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import small_llama
from json_files import read_json, write_json
from refusals import refused
from safetensors.numpy import save_file

import lorafusion_jax as lf
from lorafusion_jax.io import open_base, read_adapter
from lorafusion_jax.models import linear_shapes

_ROWS = read_json(Path(__file__).with_name("real_adapters.json"))
_LAYERS = 6
_TEXT = small_llama.CONFIG | {"vocab_size": 40, "num_hidden_layers": _LAYERS}
_T5 = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_heads": 4,
    "num_layers": _LAYERS,
}
_TEXT_MODELS = {
    "idefics3": small_llama.CONFIG,
    "qwen3_vl": {"model_type": "qwen3_vl_text"},
    "qwen3_5": small_llama.QWEN3_5,
    "gemma4": small_llama.GEMMA4,
}
_QWEN_IMAGES = (
    "model.visual.blocks.0.attn.qkv",
    "model.visual.blocks.0.attn.proj",
    "model.visual.blocks.0.mlp.linear_fc1",
    "model.visual.blocks.0.mlp.linear_fc2",
)
# Linear maps of the part that reads images, in transformers 5.24.
_IMAGES = {
    "idefics3": (
        *(
            f"model.vision_model.encoder.layers.0.{module}"
            for module in (
                *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")),
                *("self_attn.out_proj", "mlp.fc1", "mlp.fc2"),
            )
        ),
        "model.connector.modality_projection.proj",
    ),
    "qwen3_vl": _QWEN_IMAGES,
    "qwen3_5": _QWEN_IMAGES,
}


def _write_base(row, folder):
    """Write the configuration of a small base of the row's family, without weights."""
    kind = row["model_type"]
    if kind in _TEXT_MODELS:
        fields = {"text_config": _TEXT | _TEXT_MODELS[kind], "eos_token_id": 1}
    else:
        fields = _T5 if kind == "t5" else _TEXT
    base = folder / row["base"].rpartition("/")[2]
    base.mkdir()
    write_json(base / "config.json", fields | {"model_type": kind})
    save_file({}, base / "model.safetensors")
    return open_base(str(base))


def _adapted(row, paths):
    """Return those of the base's linear maps that the adapter changes, by the rules of PEFT and mlx-lm."""
    fields = row["fields"]
    targets = fields.get("target_modules", row.get("linear"))
    if "peft_type" in fields:
        if isinstance(targets, str):
            return [path for path in paths if re.fullmatch(targets, path)]
        return [
            path for path in paths if any(f".{path}".endswith(f".{t}") for t in targets)
        ]
    layers = fields.get("num_layers", fields.get("lora_layers"))
    first = 0 if layers == -1 else max(0, _LAYERS - layers)
    return [
        path
        for path in paths
        if "layers." in path
        and int(path.partition("layers.")[2].partition(".")[0]) >= first
        and (targets == "all" or path.rpartition(".")[2] in targets)
    ]


def _write_adapter(row, folder, shapes):
    fields = row["fields"]
    folder.mkdir()
    if "peft_type" in fields:
        fields = fields | {"base_model_name_or_path": row["base"]}
        tensors = {
            f"base_model.model.{path}.lora_{factor}.weight": np.ones(shape, np.float32)
            for path, (d_in, d_out) in shapes.items()
            for factor, shape in (
                ("A", (fields["r"], d_in)),
                ("B", (d_out, fields["r"])),
            )
        }
        # PEFT saves the new head of a classifier, whether or not the configuration lists it.
        if fields.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"):
            tensors["base_model.model.score.weight"] = np.ones((2, 16), np.float32)
        save_file(tensors, folder / "adapter_model.safetensors")
    else:
        fields = fields | {"model": row["base"]}
        rank = fields["lora_parameters"]["rank"]
        tensors = {
            f"{path}.lora_{factor}": np.ones(shape, np.float32)
            for path, (d_in, d_out) in shapes.items()
            for factor, shape in (("a", (d_in, rank)), ("b", (rank, d_out)))
        }
        save_file(tensors, folder / "adapters.safetensors")
    write_json(folder / "adapter_config.json", fields)
    return str(folder)


def _read(row, folder):
    """Return the adapter, read as `convert` reads it, and the paths of its modules."""
    base = _write_base(row, folder)
    shapes = linear_shapes(base.config)
    images = dict.fromkeys(_IMAGES.get(row["model_type"], ()), (8, 8))
    linear = shapes | images
    adapted = {path: linear[path] for path in _adapted(row, linear)}
    adapter = read_adapter(
        _write_adapter(row, folder / "adapter", adapted),
        base=base,
        shapes=shapes,
        base_tensor=lf.base_tensor(base),
    )
    return adapter, adapted


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: row["source"])
def test_a_real_configuration_is_accepted_or_refused_by_name(row, tmp_path):
    if row["refused"] is not None:
        with refused(row["refused"]):
            _read(row, tmp_path)
        return
    adapter, adapted = _read(row, tmp_path)
    text = {path for path in adapted if path not in _IMAGES.get(row["model_type"], ())}
    assert set(adapter.factors) == text and len(text) >= 4
    assert len(adapter.kept) == 2 * (len(adapted) - len(text))
    fields = row["fields"]
    rank = fields["r"] if "r" in fields else fields["lora_parameters"]["rank"]
    assert {A.shape[0] for A, _ in adapter.factors.values()} == {rank}
