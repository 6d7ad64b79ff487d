"""GGUF files for llama.cpp: a LoRA adapter, or a model with merged weights.

Source: llama.cpp's `convert_lora_to_gguf.py` and `llama_adapter_lora_init` for the names and the metadata.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...models.architecture import GGUFLayout
from ...models.registry import FAMILIES
from .base import GGUFBase


def layout_of(content: Mapping[str, Any]) -> GGUFLayout:
    """Return the layout of GGUF files of a base model, given the content of its config.json.

    Raises:
      ValueError: files of this family are not supported.
    """
    for family in FAMILIES.values():
        if family.gguf and content.get("model_type") in family.gguf.architectures:
            return family.gguf
    raise ValueError(
        f"a {content.get('model_type')} model is not written as GGUF: export it with --format adapter or merged"
    )


def write_lora(file: Path, content: Mapping[str, Any], tensors: Mapping[str, np.ndarray], alpha: float) -> None:
    """Write a LoRA adapter that llama.cpp's `--lora` loads, in float32.

    Args:
      file: new file.
      content: content of the base's config.json.
      tensors: A [r, d_in] and B [d_out, r] by PEFT's keys.
      alpha: lora_alpha; llama.cpp scales B A by alpha / r.

    Raises:
      ValueError: the base's family is not supported.
    """
    from gguf import GGUFType, GGUFWriter, Keys

    layout = layout_of(content)
    writer = GGUFWriter(file, layout.architectures[content["model_type"]])
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    for key, array in sorted(tensors.items()):
        path, _, factor = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        name, heads = layout.written(content, path)
        array = _interleaved(array.astype(np.float32), heads if factor == "lora_B" else 0)
        writer.add_tensor(f"{name}.{factor.lower()}", array)
    _finish(writer)


def write_merged(file: Path, base: GGUFBase, tensors: Mapping[str, np.ndarray], kind: Literal["F16", "Q8_0"]) -> None:
    """Write a model with other weights than the GGUF file of its base, whose metadata it keeps.

    Args:
      file: new file.
      base: the base.
      tensors: every weight under Hugging Face's name.
      kind: type of the matrices. Vectors, and matrices whose rows Q8_0's blocks of 32 do not divide, are float32.
    """
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
    from gguf.quants import quantize

    fields = GGUFReader(base.place).fields
    writer = GGUFWriter(file, fields["general.architecture"].contents())
    for key, field in fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            sub = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind}"])
    for name, stored, own in base.stored():
        array = np.asarray(own if stored is None else tensors[stored.name], np.float32)
        if stored is not None:
            array = _interleaved(array + np.float32(stored.offset), stored.heads)
        fits = array.ndim > 1 and (kind == "F16" or array.shape[-1] % 32 == 0)
        chosen = GGMLQuantizationType[kind if fits else "F32"]
        writer.add_tensor(name, quantize(array, chosen), raw_dtype=chosen)
    _finish(writer)


def _interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows in the order of a file (see `Stored.heads`)."""
    if not heads:
        return np.ascontiguousarray(array)
    return np.ascontiguousarray(array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape))


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
