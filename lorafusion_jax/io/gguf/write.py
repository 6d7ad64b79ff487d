"""GGUF files for llama.cpp: a LoRA adapter, or a model with merged weights.

Source: llama.cpp's `convert_lora_to_gguf.py` and `llama_adapter_lora_init` for the names and the metadata.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...models.registry import FAMILIES
from .reader import read_gguf

QUANTISED = {"gguf-f16": "F16", "gguf-q8_0": "Q8_0"}
"""Types of the matrices of a merged model, by the name of the export's format."""


def check_writable(content: Mapping[str, Any]) -> str:
    """Return `general.architecture` of a base model.

    Raises:
      ValueError: llama.cpp's files of this family are not supported.
    """
    for family in FAMILIES.values():
        if family.gguf and content.get("model_type") in family.gguf.architectures:
            return family.gguf.architectures[content["model_type"]]
    raise ValueError(
        f"a {content.get('model_type')} model is not written as GGUF: export it with --format adapter or merged"
    )


def write_lora(file: Path, content: Mapping[str, Any], tensors: Mapping[str, np.ndarray], alpha: float) -> None:
    """Write a LoRA adapter that llama.cpp's `--lora` loads, in float32.

    Args:
      file: new file.
      content: of the base's config.json.
      tensors: A [r, d_in] and B [d_out, r] by PEFT's keys.
      alpha: lora_alpha; llama.cpp scales B A by alpha / r.

    Raises:
      ValueError: the base's family is not supported.
    """
    from gguf import GGUFType, GGUFWriter, Keys

    architecture = check_writable(content)
    layout = next(f.gguf for f in FAMILIES.values() if f.gguf and content["model_type"] in f.gguf.architectures)
    writer = GGUFWriter(file, architecture)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    for key, array in sorted(tensors.items()):
        path, _, factor = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        name, heads = layout.written(content, path)
        array = array.astype(np.float32)
        if heads and factor == "lora_B":
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{name}.{factor.lower()}", np.ascontiguousarray(array))
    _finish(writer)


def write_merged(
    file: Path, base: Path, tensors: Mapping[str, np.ndarray], kind: Literal["F16", "Q8_0"]
) -> None:
    """Write a model with other matrices than the GGUF file of its base, whose metadata it keeps.

    Args:
      file: new file.
      base: GGUF file of the base.
      tensors: every tensor [d_out, d_in] or [d], by the name and with the rows of the base's file.
      kind: type of the matrices; vectors are float32, and so are rows that Q8_0 cannot divide.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    fields = GGUFReader(base).fields
    writer = GGUFWriter(file, fields["general.architecture"].contents())
    for key, field in fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            sub = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
    writer.add_file_type({"F16": 1, "Q8_0": 7}[kind])
    for name in read_gguf(base).tensors:
        array = tensors[name].astype(np.float32)
        fits = array.ndim > 1 and (kind == "F16" or array.shape[-1] % 32 == 0)
        chosen = GGMLQuantizationType[kind if fits else "F32"]
        writer.add_tensor(name, quantize(array, chosen), raw_dtype=chosen)
    _finish(writer)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
