"""GGUF files for llama.cpp: a LoRA adapter, or a model with merged weights.

Source: llama.cpp's `convert_lora_to_gguf.py` and `llama_adapter_lora_init` for the names and the metadata of adapters,
its `convert_hf_to_gguf.py` for those of models.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from ...models.architecture import GGUFLayout, GGUFTensor
from ...models.registry import family_of_json, gguf_layout
from ..base_files import FolderBase, GGUFBase
from .tokenizer import tokenizer_metadata

# Fields that a file may give another value: a Mistral without a window is a Llama, and ends of turns end answers too.
_UNLIKE = {"model_type", "stem", "tied", "pad_id", "eos_id"}
# Keys of every file that is written, whatever its base has.
_OWN = ("general.architecture", "general.file_type", "general.quantization_version")
_CONVERTER = (
    "use --format merged, and convert the folder with llama.cpp's convert_hf_to_gguf.py"
)


def write_lora(
    file: Path,
    content: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    alpha: float,
) -> None:
    """Write a LoRA adapter that llama.cpp's `--lora` loads, in float32.

    Args:
      file: new file.
      content: content of the base's config.json.
      tensors: A [r, d_in] and B [d_out, r] by PEFT's keys.
      alpha: lora_alpha; llama.cpp scales B A by alpha / r, with the rank r of each matrix.

    Raises:
      ValueError: the base's family is not supported.
    """
    from gguf import GGUFType, GGUFWriter, Keys

    layout = gguf_layout(content.get("model_type"), "model_type")
    places = _places(layout, content)
    writer = GGUFWriter(file, layout.architectures[content["model_type"]])
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    for key, array in sorted(tensors.items()):
        path, _, factor = (
            key.removeprefix("base_model.model.")
            .removesuffix(".weight")
            .rpartition(".")
        )
        name, stored = places[f"{path}.weight"]
        # B has the rows of the matrix, A its columns.
        moved_factor = "lora_A" if stored.axis else "lora_B"
        order = stored.order if factor == moved_factor else None
        array = GGUFTensor(name, order, stored.axis).in_file(array)
        writer.add_tensor(f"{name}.{factor.lower()}", array)
    _finish(writer)


def write_merged(
    file: Path,
    base: GGUFBase | FolderBase,
    tensors: Mapping[str, np.ndarray],
    kind: Literal["F16", "Q8_0"],
) -> None:
    """Write a model with other weights than its base, and the metadata of the base's GGUF file if it is one.

    Args:
      file: new file.
      base: the base.
      tensors: every weight under Hugging Face's name, matrices [d_out, d_in].
      kind: type of the matrices. Vectors, and matrices whose rows Q8_0's blocks of 32 do not divide, are float32.

    Raises:
      ValueError: the base is a folder whose configuration or tokenizer a GGUF file cannot describe.
    """
    from gguf import (
        GGML_QUANT_VERSION,
        GGMLQuantizationType,
        GGUFReader,
        GGUFValueType,
        GGUFWriter,
        LlamaFileType,
    )
    from gguf.quants import quantize

    if isinstance(base, GGUFBase):
        fields = GGUFReader(base.place).fields
        writer = GGUFWriter(file, fields["general.architecture"].contents())
        for key, field in fields.items():
            if not key.startswith("GGUF.") and key not in _OWN:
                sub = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
                writer.add_key_value(
                    key, field.contents(), field.types[0], sub_type=sub
                )
        stored = [*base.stored()]
        in_file = {place.name for _, place, _ in stored if place is not None}
        layout = gguf_layout(base.config["model_type"], "model_type")
        places = _places(layout, base.config)
        # The head, if it was tied in the base.
        stored += [
            (*places[name], tensor)
            for name, tensor in tensors.items()
            if name not in in_file
        ]
    else:
        metadata, stored = _described(base, tensors)
        writer = GGUFWriter(file, metadata.pop("general.architecture"))
        for key, value in metadata.items():
            unsigned = type(value) is int  # what llama.cpp expects
            writer.add_key_value(
                key,
                value,
                GGUFValueType.UINT32 if unsigned else GGUFValueType.get_type(value),
            )
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for name, place, values in stored:
        if place is None:
            array = np.asarray(values, np.float32)
        else:
            array = place.in_file(tensors[place.name])
        fits = (
            array.ndim > 1
            and (kind == "F16" or array.shape[-1] % 32 == 0)
            and not (place and place.change)
        )
        chosen = GGMLQuantizationType[kind if fits else "F32"]
        writer.add_tensor(name, quantize(array, chosen), raw_dtype=chosen)
    _finish(writer)


def _described(
    base: FolderBase, tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], list[tuple[str, GGUFTensor | None, np.ndarray]]]:
    """Return the metadata and the tensors of a GGUF file of a base in a Hugging Face folder."""
    content = base.config
    layout = gguf_layout(content.get("model_type"), "model_type")
    config = family_of_json(content).read_config(content)
    places = _places(layout, content)
    keys, further = layout.metadata(config)
    stored: list[tuple[str, GGUFTensor | None, np.ndarray]] = [
        (n, None, tensor) for n, tensor in further.items()
    ]
    stored += [(*places[name], tensor) for name, tensor in tensors.items()]
    try:
        tokens = tokenizer_metadata(base.tokenizer(), config.vocab_size)
    except ValueError as error:
        raise ValueError(f"{base.place}: {error}: {_CONVERTER}") from error
    ids = {
        "padding": config.pad_id,
        **dict(zip(("eos", "eot", "eom"), config.end_ids, strict=False)),
    }
    special = {f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items()}
    metadata = (
        {"general.architecture": layout.architectures[content["model_type"]]}
        | keys
        | tokens
        | special
    )
    # Whatever the keys cannot express is found by reading them back.
    again = layout.config_json(metadata, {name: tensor for name, _, tensor in stored})
    read_back = jax.tree.map(
        _rounded, dataclasses.asdict(family_of_json(again).read_config(again))
    )
    described = jax.tree.map(
        _rounded, dataclasses.asdict(family_of_json(content).read_config(content))
    )
    for name in described.keys() - _UNLIKE:
        if read_back[name] != described[name]:
            if name == layout.lost:
                fix = "no GGUF file holds it; use --format merged"
            else:
                fix = _CONVERTER
            raise ValueError(
                f"{base.place}: GGUF would hold {name} {read_back[name]}, not {described[name]}: {fix}"
            )
    return metadata, stored


def _rounded(value: Any) -> Any:
    return float(np.float32(value)) if isinstance(value, float) else value


def _places(
    layout: GGUFLayout, content: Mapping[str, Any]
) -> dict[str, tuple[str, GGUFTensor]]:
    """Return the place in a file of every tensor, by Hugging Face's name."""
    return {
        stored.name: (name, stored)
        for name, stored in layout.stored(content, layout.names(content)).items()
    }


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
