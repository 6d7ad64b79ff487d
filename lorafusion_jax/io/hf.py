"""Base models in Hugging Face's format: folders or hub ids in, folders out.

Hugging Face stores weights as [d_out, d_in], one tensor per layer; here they are kernels [L, d_in, d_out].
"""

import dataclasses
import fnmatch
import functools
import mmap
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from ..models import weights as linear
from ..models.architecture import Architecture, Checkpoint, Family, Model, Slot
from ..models.families import family_of_json
from . import safetensors as safetensors_map
from . import torch_pickle
from .buffers import aligned_zeros, copy_transposed
from .checkpoint import new_folder, read_json
from .source import check_lfs, inside, resolve

_CONFIG = "config.json"
_SAFETENSORS = "model.safetensors"
_BIN = "pytorch_model.bin"
_COPIED_FILES = (
    _CONFIG,
    "generation_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
)


def read_config(source: str | Path) -> Architecture:
    """Read the `config.json` of a base model.

    Only the weights show whether the head is tied to the embedding. Until `load_base` reads them, the value of the
    file is used.

    Raises:
      ValueError: the model belongs to no known family, or a size is missing; the message names it.
    """
    path = resolve(str(source), patterns=(_CONFIG,)) / _CONFIG
    raw = _read_config(path)
    return _family(path, raw)[1]


def load_base(
    source: str | Path, *, dtype: Literal["float32", "bfloat16"] = "float32", quantise: str | None = None
) -> Model:
    """Load a base model. Peak memory is little more than the model itself.

    The head is tied if the weights hold no head and the configuration has a tied one, or if it equals the embedding.

    Args:
      source: a folder, or a hub id `owner/name` or `owner/name@revision`.
      dtype: of weights and activations.
      quantise: one of `linear.QUANTISED_TYPES`, for all kernels and the head (unless tied); tiles along d_in.

    Raises:
      ValueError: the model is of another kind, a file is missing or damaged, or tensors are missing, unexpected,
        not floats, not finite or of another shape than the configuration gives.
    """
    folder = _fetch(source)
    tensors = _open(folder)
    family, config = _family(folder / _CONFIG, _read_config(folder / _CONFIG))
    names = family.checkpoint
    config = dataclasses.replace(config, dtype=dtype)
    if names.head in tensors:
        tied = names.embedding in tensors and np.array_equal(tensors[names.head], tensors[names.embedding])
        config = dataclasses.replace(config, tied=tied)
    model = family.abstract(config)
    slots = names.slots(model)
    _check_tensors(folder, tensors, slots, names, tied=config.tied)
    for slot in slots:
        weights = jax.device_put(_gather(folder, slot, tensors, dtype))
        if quantise and slot.transposed:
            weights = linear.quantise(weights, quantise, tiled_axis=-2)
        slot.variable.set_value(weights)
    return model


def base_tensor(source: str | Path) -> Callable[[str], np.ndarray]:
    """Return a function from a Hugging Face tensor name to the base's tensor, in the dtype of the file.

    Files are opened at the first call. The function raises KeyError on a name that the base lacks.
    """

    @functools.cache
    def files() -> tuple[dict[str, np.ndarray], Checkpoint]:
        folder = _fetch(source)
        return _open(folder), _family(folder / _CONFIG, _read_config(folder / _CONFIG))[0].checkpoint

    def read(name: str) -> np.ndarray:
        tensors, names = files()
        repeats = name in (*names.copies, names.head) and name not in tensors
        return tensors[names.embedding if repeats else name]

    return read


def save_base(model: Model, folder: Path, source: str | Path) -> None:
    """Write a model as a Hugging Face folder, which gets its name only when it is complete.

    Args:
      model: plain or quantised weights (written dequantised, in the model's dtype).
      folder: the folder to make.
      source: the base model that it was loaded from; its configuration and tokenizer are copied.

    Raises:
      ValueError: the folder exists, or the source has no configuration.
    """
    from safetensors.numpy import save_file

    origin = resolve(str(source), patterns=_COPIED_FILES)
    family, said = _family(origin / _CONFIG, _read_config(origin / _CONFIG))
    names, tensors = family.checkpoint, {}
    for slot in names.slots(model):
        weights = np.asarray(linear.dense(slot.variable.get_value(), model.config.dtype))
        layers = weights if slot.stacked else weights[None]
        tensors |= {
            name: np.ascontiguousarray(layer.T if slot.transposed else layer)
            for name, layer in zip(slot.names, layers, strict=True)
        }
    # A head that equals the embedding is tied here, but transformers needs it if the configuration is untied.
    if model.config.tied and not said.tied:
        tensors[names.head] = tensors[names.embedding].copy()
    with new_folder(folder) as partial:
        for name in _COPIED_FILES:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, partial / name)
        # transformers rejects a file without its format in the metadata.
        save_file(tensors, partial / _SAFETENSORS, metadata={"format": "pt"})


def _fetch(source: str | Path) -> Path:
    """Return the folder with the weights; the .bin is fetched from the hub only if it has no safetensors."""
    folder = resolve(str(source), patterns=(_CONFIG, "model*.safetensors*"))
    if any(folder.glob("model*.safetensors*")):
        return folder
    return resolve(str(source), patterns=(_CONFIG, "pytorch_model*.bin*"))


def _open(folder: Path) -> dict[str, np.ndarray]:
    """Return all tensors by name as views of mapped files."""
    for name, load in ((_SAFETENSORS, safetensors_map.load), (_BIN, torch_pickle.load)):
        if (folder / name).is_file():
            return load(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            check_lfs(index)
            files = read_json(index, "a sharded model").get("weight_map")
            if not isinstance(files, dict):
                raise ValueError(f"{index} has no weight_map, which names the file of every tensor: fetch it again")
            # Every name is checked before the first file is opened.
            paths = [inside(folder, file) for file in files.values()]
            shards = {path: load(path) for path in set(paths)}
            for tensor, path in zip(files, paths, strict=True):
                if tensor not in shards[path]:
                    raise ValueError(f"{path} does not hold {tensor}, though {index.name} lists it: fetch it again")
            return {tensor: shards[path][tensor] for tensor, path in zip(files, paths, strict=True)}
    raise ValueError(f"{folder} has no weights: wanted {_SAFETENSORS} or {_BIN}, whole or in shards with an index")


def _check_tensors(
    folder: Path, tensors: Mapping[str, np.ndarray], slots: list[Slot], layout: Checkpoint, *, tied: bool
) -> None:
    shapes = {name: slot.shape for slot in slots for name in slot.names}
    optional = {*layout.copies} | ({layout.head} if tied else set())
    advice = f"do {_CONFIG} and the weights in {folder} belong together?"
    if missing := [name for name in shapes if name not in tensors]:
        raise ValueError(f"{folder}: the weights lack {_some(missing)}: {advice}")
    known = {*shapes, *optional}
    if unexpected := [name for name in tensors if name not in known and not _is_unused(name, layout)]:
        raise ValueError(f"{folder}: the model has no place for {_some(unexpected)}: {advice}")
    for name, shape in shapes.items():
        if tensors[name].dtype.kind in "biuc":
            raise ValueError(f"{folder}: {name} has dtype {tensors[name].dtype}: wanted floats; save it unquantised")
        if tensors[name].shape != shape:
            raise ValueError(f"{folder}: {name} has shape {list(tensors[name].shape)}, not {list(shape)}: {advice}")
    for name in layout.copies:
        if name in tensors and not np.array_equal(tensors[name], tensors[layout.embedding]):
            raise ValueError(f"{folder}: {name} differs from {layout.embedding}: the model has one embedding")


def _is_unused(name: str, layout: Checkpoint) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in layout.unused)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _gather(folder: Path, slot: Slot, tensors: Mapping[str, np.ndarray], dtype: str) -> np.ndarray:
    weights = aligned_zeros(slot.variable.shape, dtype)
    layers = weights if slot.stacked else weights[None]
    for name, layer in zip(slot.names, layers, strict=True):
        with np.errstate(over="ignore"):
            if slot.transposed:
                copy_transposed(tensors[name], layer)
            else:
                layer[...] = tensors[name]
        # Checked after the cast: a finite float64 may overflow float32. Takes 0.2 ns a number in float32, 0.9 in
        # bfloat16.
        if not np.isfinite(layer).all():
            raise ValueError(f"{folder}: {name} holds NaN or infinity in {dtype}: fetch the weights again")
        _release(tensors[name])
    return weights


def _release(tensor: np.ndarray) -> None:
    """Unmap the pages of a file that has been copied, which would count as memory of this process."""
    owner = tensor.base.obj if isinstance(tensor.base, memoryview) else tensor.base
    if isinstance(owner, mmap.mmap):
        owner.madvise(mmap.MADV_DONTNEED)


def _read_config(path: Path) -> dict[str, Any]:
    if path.is_file():
        check_lfs(path)
    return read_json(path, "a Hugging Face model")


def _family(path: Path, raw: Mapping[str, Any]) -> tuple[Family, Architecture]:
    """Return the family of a config.json's model and the structure that it describes."""
    try:
        family = family_of_json(raw)
        return family, family.read_config(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
