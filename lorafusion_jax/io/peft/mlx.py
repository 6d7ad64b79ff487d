"""Adapters of MLX: mlx-lm writes `adapters.safetensors` and an `adapter_config.json` with other fields than PEFT's.

y = x W^T + scale x A B with A [d_in, r] and B [r, d_out]: PEFT has both transposed, and `scale` is alpha / r. A DoRA
has the magnitude `m` [d_out]. The tensors' names determine the adapted matrices: the configuration's layers and `keys`
are not read. Source: mlx-lm, `tuner/utils.py`, `tuner/lora.py` and `tuner/dora.py`.
"""

import re
from pathlib import Path
from typing import Required, TypedDict

from ...support.reading import decode_as, error_context
from ..tensor_files import load_tensors
from .config import CONFIG, Alpha, Stored, config_text, plain_config, read_config_file

WEIGHTS = "adapters.safetensors"
_TENSOR = re.compile(r"(?P<path>.+)\.(?P<kind>lora_a|lora_b|m)")
_KINDS = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "m": "lora_magnitude_vector",
}
_QUANTISED = re.compile(r"\dbit|quantized|[-_]q\d|mxfp|nvfp", re.IGNORECASE)


class _Parameters(TypedDict, total=False):
    scale: Required[Alpha]


class _Fields(TypedDict, total=False):
    fine_tune_type: str | None
    lora_parameters: _Parameters | None  # null if all weights were trained
    model: str | None
    use_dora: bool | None  # of versions before fine_tune_type


def read(folder: Path) -> Stored:
    """Read the adapter in a folder with `adapters.safetensors`, and return it with PEFT's fields and names."""
    _, content = read_config_file(folder)
    with error_context(folder / CONFIG):
        fields = decode_as(
            content,
            _Fields,
            "",
            allow_unknown=True,
            fix="correct the field, or save the adapter with mlx-lm",
        )
        kind = fields.get("fine_tune_type") or (
            "dora" if fields.get("use_dora") else "lora"
        )
        if kind not in ("lora", "dora"):
            fix = "merge it into the base with mlx_lm.fuse, and give that base"
            raise ValueError(
                f"fine_tune_type is {kind!r}: expected lora or dora; {fix}"
            )
        parameters = fields.get("lora_parameters")
        if parameters is None:
            raise ValueError(
                "lora_parameters is missing: expected an object with the scale; fetch the file again"
            )
    base = fields.get("model")
    scale = parameters["scale"]
    weights = folder / WEIGHTS
    tensors = {}
    paths = set()
    rank = 1
    for key, array in load_tensors(weights).items():
        match = _TENSOR.fullmatch(key)
        if match and array.ndim > 2:
            raise ValueError(
                f"{weights}: {key} {list(array.shape)} is LoRA on a layer of experts: use a dense model"
            )
        if match and match["path"].endswith("embed_tokens"):
            raise ValueError(
                f"{weights}: {key} is LoRA on an embedding: retrain without it among the keys"
            )
        if match:
            paths.add(match["path"])
            rank = array.shape[0] if match["kind"] == "lora_b" and array.ndim else rank
            key = f"base_model.model.{match['path']}.{_KINDS[match['kind']]}"
            array = array.T
        tensors[key] = array
    notes = []
    if base and _QUANTISED.search(base):
        notes.append(
            f"warning: trained on {base!r}, a quantised base, and converted for the unquantised one"
        )
    if "alpha" in parameters:
        notes.append(
            "ignored: lora_parameters.alpha, as mlx-lm does since 2024; earlier versions used scale alpha / r"
        )
    config = plain_config(
        base,
        paths,
        rank=rank,
        alpha=scale * rank,
        task_type="CAUSAL_LM",
        dora=kind == "dora",
    )
    return Stored(weights, config_text(config), config, tensors, notes)
