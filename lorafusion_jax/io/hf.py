"""Base models in Hugging Face's format: folders or hub ids in, folders out.

Weights are stored as [d_out, d_in] there, one tensor per layer; here they are kernels [L, d_in, d_out].
"""

import dataclasses
import functools
import mmap
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from ..models import weights as linear
from ..models.layers import Base, Linear
from ..models.sites import hf_path, sites
from ..models.t5.model import T5, T5Config
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
_SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers")
_LARGEST = 10_000_000
_SHARED = "shared.weight"
_HEAD = "lm_head.weight"
_COPIES_OF_SHARED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# T5 1.0 was published with a table that no layer reads.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def read_config(source: str | Path) -> T5Config:
    """Read the `config.json` of a T5 1.0, T5 1.1, FLAN-T5 or mT5, as transformers 4 and 5 write it.

    Whether the head is tied to the embedding shows in the weights alone; here it is what the file says, and
    `load_base` settles it.

    Raises:
      ValueError: the model is of another kind, or a size is missing; the message names it.
    """
    path = resolve(str(source), patterns=(_CONFIG,)) / _CONFIG
    raw = _read_config(path)
    kind, activation = raw.get("model_type"), raw.get("feed_forward_proj", "relu")
    if kind not in ("t5", "mt5"):
        why = ", whose every layer has a relative bias of its own" if kind == "umt5" else ""
        raise ValueError(f"{path}: model_type is {kind!r}{why}: wanted a T5 1.0, T5 1.1, FLAN-T5 or mT5")
    if activation not in ("relu", "gated-gelu"):
        raise ValueError(f"{path}: feed_forward_proj is {activation!r}: wanted 'relu' or 'gated-gelu'")
    for field in _SIZES:
        value = raw.get(field, "missing")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
            raise ValueError(f"{path}: {field} is {str(value)[:100]}: wanted an integer from 1 to {_LARGEST:,}")
    says_tied = raw.get("tie_word_embeddings", kind == "t5")
    return T5Config(
        **{field: raw[field] for field in _SIZES},
        num_decoder_layers=raw.get("num_decoder_layers") or raw["num_layers"],
        gated=activation == "gated-gelu",
        tied=says_tied,
        # transformers 5 says it outright; before, it went with the tied head, and mT5 never did.
        scale_logits=raw.get("scale_decoder_outputs", says_tied and kind == "t5"),
        buckets=raw.get("relative_attention_num_buckets", 32),
        max_distance=raw.get("relative_attention_max_distance", 128),
        eps=raw.get("layer_norm_epsilon", 1e-6),
        pad_id=raw.get("pad_token_id", 0),
        eos_id=raw.get("eos_token_id", 1),
        start_id=raw.get("decoder_start_token_id", raw.get("pad_token_id", 0)),
    )


def load_base(
    source: str | Path, *, dtype: Literal["float32", "bfloat16"] = "float32", quantise: str | None = None
) -> T5:
    """Load a base model; of the weights, little more than the model itself is in memory at any time.

    The head is tied if the weights have none and the configuration says so, or if it equals the embedding.

    Args:
      source: a folder, or a hub id `owner/name` or `owner/name@revision`.
      dtype: of weights and activations.
      quantise: one of `linear.QUANTISED_TYPES`, for all kernels and the head (unless tied); tiles along d_in.

    Raises:
      ValueError: the model is of another kind, a file is missing or damaged, or tensors are missing, unexpected,
        not floats, not finite or of another shape than the configuration says.
    """
    folder = _fetch(source)
    tensors = _open(folder)
    config = dataclasses.replace(read_config(folder), dtype=dtype)
    if _HEAD in tensors:
        tied = _SHARED in tensors and np.array_equal(tensors[_HEAD], tensors[_SHARED])
        config = dataclasses.replace(config, tied=tied)
    model = nnx.eval_shape(lambda: T5(config, rngs=nnx.Rngs(0)))
    slots = _slots(model)
    _check_tensors(folder, tensors, slots, config)
    for slot in slots:
        weights = jax.device_put(_gather(folder, slot, tensors, dtype))
        if quantise and slot.transposed:
            weights = linear.quantise(weights, quantise, tiled_axis=-2)
        slot.variable.set_value(weights)
    return model


def base_tensor(source: str | Path) -> Callable[[str], np.ndarray]:
    """Return a function from a Hugging Face tensor name to the base's tensor, in its own dtype.

    Nothing is opened before the first call. The function raises KeyError on a name that the base lacks.
    """

    @functools.cache
    def tensors() -> dict[str, np.ndarray]:
        return _open(_fetch(source))

    def read(name: str) -> np.ndarray:
        shared = name in (*_COPIES_OF_SHARED, _HEAD) and name not in tensors()
        return tensors()[_SHARED if shared else name]

    return read


def save_base(model: T5, folder: Path, source: str | Path) -> None:
    """Write a model as a Hugging Face folder, which appears under its name only when it is complete.

    Args:
      model: plain or quantised weights (written dequantised, in the model's dtype).
      folder: the folder to make.
      source: the base that it came from: its configuration and tokenizer are copied.

    Raises:
      ValueError: the folder exists, or the source has no configuration.
    """
    from safetensors.numpy import save_file

    origin = resolve(str(source), patterns=_COPIED_FILES)
    raw = _read_config(origin / _CONFIG)
    tensors = {}
    for slot in _slots(model):
        weights = np.asarray(linear.dense(slot.variable.get_value(), model.config.dtype))
        layers = weights if slot.stacked else weights[None]
        tensors |= {
            name: np.ascontiguousarray(layer.T if slot.transposed else layer)
            for name, layer in zip(slot.names, layers, strict=True)
        }
    # A head that happens to equal the embedding is tied here, but a file without it would not load there.
    if model.config.tied and not raw.get("tie_word_embeddings", raw["model_type"] == "t5"):
        tensors[_HEAD] = tensors[_SHARED].copy()
    with new_folder(folder) as partial:
        for name in _COPIED_FILES:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, partial / name)
        # transformers refuses a file that does not state its format.
        save_file(tensors, partial / _SAFETENSORS, metadata={"format": "pt"})


class _Slot(NamedTuple):
    """A variable of the model and the tensors that fill it: one per layer if stacked, else a single one."""

    variable: Base
    names: list[str]
    stacked: bool = False
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each tensor in Hugging Face's layout."""
        shape = self.variable.shape[1:] if self.stacked else self.variable.shape
        return shape[::-1] if self.transposed else shape


def _slots(model: T5) -> list[_Slot]:
    slots = [_Slot(model.embedding, [_SHARED])]
    if not model.config.tied:
        slots.append(_Slot(model.head, [_HEAD], transposed=True))
    for stack, block, bias, norm in (
        ("encoder", model.encoder, model.encoder_bias, model.encoder_norm),
        ("decoder", model.decoder, model.decoder_bias, model.decoder_norm),
    ):
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        slots.append(_Slot(bias.table, [table]))
        slots.append(_Slot(norm.scale, [f"{stack}.final_layer_norm.weight"]))
        norms = ("self_norm", "ff_norm") if stack == "encoder" else ("self_norm", "cross_norm", "ff_norm")
        for sublayer, name in enumerate(norms):
            scale = getattr(block, name).scale
            names = [f"{stack}.block.{i}.layer.{sublayer}.layer_norm.weight" for i in range(scale.shape[0])]
            slots.append(_Slot(scale, names, stacked=True))
    layers = {name: site.layers for name, site in sites(model.config).items()}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            site = f"{path[0]}.{module.site}"
            names = [f"{hf_path(site, layer)}.weight" for layer in range(layers[site])]
            slots.append(_Slot(module.kernel, names, stacked=True, transposed=True))
    return slots


def _fetch(source: str | Path) -> Path:
    """Return the folder with the weights; from the hub comes the .bin only where there is no safetensors."""
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
                raise ValueError(f"{index} holds no weight_map, which names the file of every tensor: fetch it again")
            # Every name is checked before the first file is opened.
            paths = [inside(folder, file) for file in files.values()]
            shards = {path: load(path) for path in set(paths)}
            for tensor, path in zip(files, paths, strict=True):
                if tensor not in shards[path]:
                    raise ValueError(f"{path} holds no {tensor}, though {index.name} says so: fetch it again")
            return {tensor: shards[path][tensor] for tensor, path in zip(files, paths, strict=True)}
    raise ValueError(f"{folder} holds no weights: wanted {_SAFETENSORS} or {_BIN}, whole or in shards with an index")


def _check_tensors(folder: Path, tensors: Mapping[str, np.ndarray], slots: list[_Slot], config: T5Config) -> None:
    shapes = {name: slot.shape for slot in slots for name in slot.names}
    optional = {_UNUSED, *_COPIES_OF_SHARED} | ({_HEAD} if config.tied else set())
    advice = f"do {_CONFIG} and the weights in {folder} belong together?"
    if missing := [name for name in shapes if name not in tensors]:
        raise ValueError(f"{folder}: the weights lack {_some(missing)}: {advice}")
    if unexpected := [name for name in tensors if name not in shapes and name not in optional]:
        raise ValueError(f"{folder}: the model has no place for {_some(unexpected)}: {advice}")
    for name, shape in shapes.items():
        if tensors[name].dtype.kind in "biuc":
            raise ValueError(f"{folder}: {name} has dtype {tensors[name].dtype}: wanted floats; save it unquantised")
        if tensors[name].shape != shape:
            raise ValueError(f"{folder}: {name} has shape {list(tensors[name].shape)}, not {list(shape)}: {advice}")
    for name in _COPIES_OF_SHARED:
        if name in tensors and not np.array_equal(tensors[name], tensors[_SHARED]):
            raise ValueError(f"{folder}: {name} differs from {_SHARED}: a T5 has one embedding for both stacks")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _gather(folder: Path, slot: _Slot, tensors: Mapping[str, np.ndarray], dtype: str) -> np.ndarray:
    weights = aligned_zeros(slot.variable.shape, dtype)
    layers = weights if slot.stacked else weights[None]
    for name, layer in zip(slot.names, layers, strict=True):
        with np.errstate(over="ignore"):
            if slot.transposed:
                copy_transposed(tensors[name], layer)
            else:
                layer[...] = tensors[name]
        # As it is used: float64 may hold what float32 does not. 0.2 ns a number in float32, 0.9 in bfloat16.
        if not np.isfinite(layer).all():
            raise ValueError(f"{folder}: {name} holds NaN or infinity in {dtype}: fetch the weights again")
        _release(tensors[name])
    return weights


def _release(tensor: np.ndarray) -> None:
    """Unmap the pages of a file that has been copied: they would count as memory of this process."""
    owner = tensor.base.obj if isinstance(tensor.base, memoryview) else tensor.base
    if isinstance(owner, mmap.mmap):
        owner.madvise(mmap.MADV_DONTNEED)


def _read_config(path: Path) -> dict[str, Any]:
    if path.is_file():
        check_lfs(path)
    return read_json(path, "a Hugging Face model")
