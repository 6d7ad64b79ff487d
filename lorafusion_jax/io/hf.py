"""Base models: Hugging Face folders, hub ids or GGUF files in, folders out.

Hugging Face stores weights as [d_out, d_in], one tensor per layer; here they are kernels [L, d_in, d_out].
"""

import dataclasses
import fnmatch
import functools
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jax.typing import DTypeLike

from ..models import weights as linear
from ..models.architecture import (
    Architecture,
    Checkpoint,
    Family,
    Model,
    Slot,
    unwrapped,
)
from ..models.registry import family_of_json
from ..support.reading import error_context, expand_user
from ..support.text import some
from ..support.writing import new_folder, write_text
from .base_files import FolderBase, GGUFBase
from .digests import Tensor, digest_of_all, digest_of_one, tensor_digest
from .gguf.reader import StoredTensor
from .source import COMPILED, release
from .tensor_files import save_tensors

if TYPE_CHECKING:
    import transformers

_ROWS = 1024  # copied at a time: a dequantised tensor is never in memory as a whole
_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
# Floats of 8 bits are no weights without the scales that their quantiser keeps next to them.
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_ALIGNMENT = 64  # bytes: XLA's CPU backend uses memory in place only at this alignment
_TRANSPOSED = 16  # rows at a time: 5 times faster than NumPy's own order on [2816, 1024] in float32
_Q8_0_TILE = 32  # numbers of a row that share a scale in a GGUF file's Q8_0

Files = FolderBase | GGUFBase


class Base:
    """A base model, opened once: what is read of it is read at the first use, and kept except for the weights.

    Attributes:
      source: a folder, a hub id `owner/name` or `owner/name@revision`, or a GGUF file. A folder is checked when it is
        read; a file that is not sound GGUF is a ValueError.
      files: its files.
    """

    def __init__(self, source: str | Path):
        # Imported without PyTorch, transformers warns that there are no models: none are needed.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        self.source = str(source)
        path = expand_user(source)
        self.files: Files = (
            GGUFBase(path)
            if path.is_file() or path.suffix == ".gguf"
            else FolderBase(self.source)
        )

    @functools.cached_property
    def raw(self) -> Mapping[str, Any]:
        """The configuration as a config.json of Hugging Face."""
        return self.files.config

    @functools.cached_property
    def family(self) -> Family:
        """The family; ValueError if it is not known."""
        classes = self.raw.get("architectures")
        with error_context(self.files.config_place):
            if isinstance(classes, list) and any(
                isinstance(name, str) and name.endswith(_HEADS) for name in classes
            ):
                got = f"architectures is {classes!r}, a model whose head generates no text"
                raise ValueError(f"{got}: give the language model")
            return family_of_json(self.raw)

    @functools.cached_property
    def config(self) -> Architecture:
        """The structure (see `read_config`)."""
        family = self.family
        with error_context(self.files.config_place):
            return family.read_config(self.raw)

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """The names of tensors other than kernels."""
        return self.family.checkpoint(self.config)

    @functools.cached_property
    def _known(self) -> Mapping[str, str]:
        layout = self.checkpoint
        slots = layout.slots(self.family.abstract(self.config))
        return {unwrapped(name): name for slot in slots for name in slot.names} | {
            layout.head: layout.head
        }

    def model_name(self, stored: str) -> str:
        """Return the name that the model gives to a stored tensor."""
        return self._known.get(unwrapped(stored), stored)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the stored tensors by the model's names, matrices [d_out, d_in]."""
        stored = {
            self.model_name(name): tensor
            for name, tensor in self.files.tensors().items()
        }
        return {
            name: np.asarray(tensor).T if self.checkpoint.is_flipped(name) else tensor
            for name, tensor in stored.items()
        }

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, without transformers where that gives the same; raises `load_tokenizer`'s errors."""
        return self.files.fast_tokenizer()

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of the stored tensors that the model uses; raises `load_base`'s errors."""
        tensors, _, slots = self._opened("float32")
        return tensor_digest(
            {name: tensors[name] for slot in slots for name in slot.names}
        )

    def load(
        self,
        *,
        dtype: str = "float32",
        quantise: str | None = None,
        hashed: bool = False,
    ) -> Model:
        """Load the weights (see `load_base`), with `hashed` the digest too."""
        tensors, model, slots = self._opened(dtype)
        digests: dict[str, Future[bytes]] = {}
        with (
            error_context(self.files.place),
            ThreadPoolExecutor(os.cpu_count()) as threads,
        ):
            for slot in slots:
                if hashed and "digest" not in vars(self):
                    digests |= {
                        name: threads.submit(digest_of_one, name, tensors[name])
                        for name in slot.names
                    }
                if quantise and slot.transposed:
                    slot.variable.set_value(
                        _gather_quantised(slot, tensors, dtype, quantise)
                    )
                elif (
                    quantise == "int8"
                    and model.config.tied
                    and slot.names == [self.checkpoint.embedding]
                ):
                    slot.variable.set_value(_embedding(slot, tensors, dtype))
                else:
                    slot.variable.set_value(
                        jax.device_put(_gather(slot, tensors, dtype))
                    )
        if digests:
            self.digest = digest_of_all(
                {name: digest.result() for name, digest in digests.items()}
            )
        return model

    def _opened(self, dtype: str) -> tuple[Mapping[str, Tensor], Model, list[Slot]]:
        """Return the tensors (checked but not read), the model without weights, and its slots."""
        tensors = self.tensors()
        names = self.checkpoint
        config = dataclasses.replace(self.config, dtype=dtype)
        if names.head in tensors:
            tied = names.embedding in tensors and np.array_equal(
                tensors[names.head], tensors[names.embedding]
            )
            config = dataclasses.replace(config, tied=tied)
        model = self.family.abstract(config)
        slots = names.slots(model)
        with error_context(self.files.place):
            _check_tensors(tensors, slots, names, tied=config.tied)
        return tensors, model, slots


def open_base(source: str | Path | Base) -> Base:
    """Return a base model, opened unless it is already."""
    return source if isinstance(source, Base) else Base(source)


def read_config(source: str | Path) -> Architecture:
    """Read the configuration of a base model: its `config.json`, or a GGUF file's metadata.

    Only the weights show whether the head is tied to the embedding; here the value of the file is used.

    Raises:
      ValueError: the model belongs to no known family, or a size is missing.
    """
    return open_base(source).config


def load_tokenizer(source: str | Path) -> "transformers.PreTrainedTokenizerBase":
    """Load the tokenizer of a base model.

    Raises:
      ValueError: there is none, transformers cannot read it, or a GGUF file names one that is not implemented.
    """
    return open_base(source).files.tokenizer()


def load_base(
    source: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    quantise: str | None = None,
) -> Model:
    """Load a base model. Peak memory is little more than the model itself.

    The head is tied if it equals the embedding, or if the weights hold none and the configuration has a tied one.
    GGUF files are dequantised, except that `int8` keeps the codes and scales of matrices in Q8_0.

    Args:
      source: a folder, a hub id `owner/name` or `owner/name@revision`, or a GGUF file.
      dtype: dtype of weights and activations.
      quantise: one of `linear.QUANTISED_TYPES`, for all kernels and the head (unless tied, except for codes that a
        GGUF file holds); tiles along d_in.

    Raises:
      ValueError: the model is of another kind, a file is missing or damaged, or tensors are missing, unexpected,
        not floats, not finite or not of the configuration's shape.
    """
    return open_base(source).load(dtype=dtype, quantise=quantise)


def base_tensor(source: str | Path | Base) -> Callable[[str], np.ndarray]:
    """Return a function from a Hugging Face tensor name to the base's tensor, [d_out, d_in] of a matrix, or KeyError.

    Files are opened at the first call. Tensors have the dtype of the file; those of a GGUF file are dequantised.
    """

    @functools.cache
    def files() -> tuple[Mapping[str, Tensor], Checkpoint]:
        base = open_base(source)
        return base.tensors(), base.checkpoint

    def read(name: str) -> np.ndarray:
        tensors, names = files()
        repeats = name in (*names.copies, names.head) and name not in tensors
        return np.asarray(tensors[names.embedding if repeats else name])

    return read


def save_base(model: Model, folder: Path, source: str | Path | Base) -> None:
    """Write a model, dequantised in its dtype, as a Hugging Face folder that is complete or absent.

    `source` is the base model whose configuration and tokenizer are written too; ValueError if the folder exists.
    """
    with new_folder(folder) as partial:
        put_base(hf_tensors(model, source), partial, source)


def put_base(
    tensors: Mapping[str, np.ndarray], folder: Path, source: str | Path | Base
) -> None:
    """Write the files of `save_base` into an existing folder, from the tensors that `hf_tensors` returns."""
    base = open_base(source)
    dtype = next(iter(tensors.values())).dtype.name
    tensors = {
        name: tensor.T if base.checkpoint.is_flipped(name) else tensor
        for name, tensor in tensors.items()
    }
    if patterns := base.checkpoint.unread:
        # Named as in the base's files, so that whatever reads them reads the new ones.
        stored = base.files.tensors()
        places = {base.model_name(name): name for name in stored}
        tensors = {places.get(name, name): tensor for name, tensor in tensors.items()}
        unread = {
            name for pattern in patterns for name in fnmatch.filter(stored, pattern)
        }
        tensors |= {name: np.asarray(stored[name]) for name in unread}
    base.files.save_texts(folder)
    path = folder / "config.json"
    content = json.loads(path.read_bytes())
    # transformers loads the weights in the dtype of config.json.
    dtypes = {
        name: dtype
        for name in ("dtype", "torch_dtype")
        if content.get(name) is not None
    }
    changed = _with_older_rope(content) | dtypes
    # A T5's field says whether logits are scaled; its readers compare the weights.
    if base.config.causal and base.checkpoint.head in tensors:
        changed |= {"tie_word_embeddings": False}
    if changed != content:
        write_text(path, f"{json.dumps(changed, indent=2)}\n")
    save_tensors(folder / "model.safetensors", tensors)


def _with_older_rope(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json that also has the fields of rotary positions from before transformers 5.

    mlx-lm reads only those of most families, and uses defaults for missing ones.
    """
    content = dict(content)
    if content.get("text_config"):
        content["text_config"] = _with_older_rope(content["text_config"])
    ropes = content.get("rope_parameters") or {}
    rope = ropes.get("full_attention") or ropes
    kind = rope.get("rope_type", "default")
    if kind == "proportional":
        return content  # of a Gemma 4, which is newer
    older = {
        "rope_theta": rope.get("rope_theta"),
        "rope_local_base_freq": (ropes.get("sliding_attention") or {}).get(
            "rope_theta"
        ),
        "partial_rotary_factor": rope.get("partial_rotary_factor"),
        "rope_scaling": None if kind == "default" else {"type": kind} | rope,
    }
    for name, value in older.items():
        if value is not None and content.get(name) is None:
            content[name] = value
    return content


def hf_tensors(
    model: Model, source: str | Path | Base, dtype: str | None = None
) -> dict[str, np.ndarray]:
    """Return weights by Hugging Face's names, matrices [d_out, d_in], by default in the model's dtype.

    `source` is the base they come from.
    """
    base = open_base(source)
    names = base.checkpoint
    tensors = {}
    for slot in names.slots(model):
        weights = np.asarray(
            linear.dense(slot.variable.get_value(), dtype or model.config.dtype)
        )
        layers = weights if slot.stacked else weights[None]
        tensors |= {
            name: layer.T if slot.transposed else layer
            for name, layer in zip(slot.names, layers, strict=True)
        }
    # A head that equals the embedding is tied here; transformers needs it if the configuration is untied.
    if model.config.tied and not base.config.tied:
        tensors[names.head] = tensors[names.embedding].copy()
    return tensors


def aligned_zeros(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Return zeros of this shape that `jax.device_put` uses in place on a CPU. Write to them only before that call."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def copy_transposed(matrix: np.ndarray, out: np.ndarray) -> None:
    """Write the transpose of `matrix` [rows, columns] to `out` [columns, rows], in the dtype of `out`."""
    for row in range(0, len(matrix), _TRANSPOSED):
        out[:, row : row + _TRANSPOSED] = matrix[row : row + _TRANSPOSED].T


def _check_tensors(
    tensors: Mapping[str, Tensor], slots: list[Slot], layout: Checkpoint, *, tied: bool
) -> None:
    shapes = {name: slot.shape for slot in slots for name in slot.names}
    optional = {*layout.copies} | ({layout.head} if tied else set())
    advice = "give a configuration and weights that belong together"
    if any(COMPILED in name for name in tensors):
        raise ValueError(
            f"the weights are of a compiled model, with names in {COMPILED}: save the model in it (its _orig_mod)"
        )
    if missing := [name for name in shapes if name not in tensors]:
        raise ValueError(f"the weights lack {some(missing)}: {advice}")
    unused = {
        name
        for pattern in layout.unused + layout.unread
        for name in fnmatch.filter(tensors, pattern)
    }
    if unexpected := [
        name for name in tensors if name not in {*shapes, *optional, *unused}
    ]:
        raise ValueError(f"the model has no place for {some(unexpected)}: {advice}")
    for name, shape in shapes.items():
        if tensors[name].dtype.name not in _FLOATS:
            raise ValueError(
                f"{name} has dtype {tensors[name].dtype}: expected floats of 16 bits or more; save it unquantised"
            )
        if tensors[name].shape != shape:
            raise ValueError(
                f"{name} has shape {list(tensors[name].shape)}, not {list(shape)}: {advice}"
            )
    for name in layout.copies:
        if name in tensors and not np.array_equal(
            tensors[name], tensors[layout.embedding]
        ):
            raise ValueError(
                f"{name} differs from {layout.embedding}: the model has one embedding: fetch the weights again"
            )


def _gather(slot: Slot, tensors: Mapping[str, Tensor], dtype: str) -> np.ndarray:
    weights = aligned_zeros(slot.variable.shape, dtype)
    for name, layer in zip(
        slot.names, weights if slot.stacked else weights[None], strict=True
    ):
        _copy(name, tensors[name], layer, slot.transposed)
    return weights


def _embedding(
    slot: Slot, tensors: Mapping[str, Tensor], dtype: str
) -> jax.Array | qwix.QArray:
    """Return an embedding that is the head too, in its codes if the file holds some; other ones stay whole."""
    (name,) = slot.names
    if not _in_int8(tensor := tensors[name]):
        return jax.device_put(_gather(slot, tensors, dtype))
    codes, scales = tensor.codes()
    scales = scales.astype(np.float32)
    _check_finite(name, scales)
    release(tensor)
    return qwix.QArray(jax.device_put(codes), jax.device_put(scales), qtype="int8")


def _gather_quantised(
    slot: Slot, tensors: Mapping[str, Tensor], dtype: str, qtype: str
) -> qwix.QArray:
    """Return a slot's matrices in few bits, quantised one by one, so that the full stack is never in memory."""
    shape = slot.variable.shape
    stored = qtype == "int8" and any(_in_int8(tensors[name]) for name in slot.names)
    tile = _Q8_0_TILE if stored else linear.tile_size(shape[-2])
    code_types = {"int8": np.int8, "nf4": jnp.uint4}
    codes = aligned_zeros(shape, code_types.get(qtype, jnp.int4))
    # The scales are float16 in the file, and a product with a code is exact in float32.
    scales = aligned_zeros(
        (*shape[:-2], shape[-2] // tile, shape[-1]), np.float32 if stored else dtype
    )
    layers = zip(codes, scales, strict=True) if slot.stacked else [(codes, scales)]
    for name, (code, scale) in zip(slot.names, layers, strict=True):
        tensor = tensors[name]
        if stored and _in_int8(tensor):
            file_codes, steps = tensor.codes()
            copy_transposed(file_codes, code)
            copy_transposed(steps, scale)
            _check_finite(name, scale)
            release(tensor)
        else:
            plain = aligned_zeros(code.shape, dtype)
            _copy(name, tensor, plain, transposed=True)
            quantised = linear.quantise(
                jax.device_put(plain), qtype, tiled_axis=-2, tile=tile
            )
            code[...] = np.asarray(quantised.qvalue)
            scale[...] = np.asarray(quantised.scale)
    return qwix.QArray(jax.device_put(codes), jax.device_put(scales), qtype=qtype)


def _in_int8(tensor: Tensor) -> TypeGuard[StoredTensor]:
    return isinstance(tensor, StoredTensor) and tensor.in_int8


def _copy(name: str, tensor: Tensor, out: np.ndarray, transposed: bool) -> None:
    with np.errstate(over="ignore"):
        for row in range(0, tensor.shape[0], _ROWS):
            rows = slice(row, row + _ROWS)
            if transposed:
                copy_transposed(tensor[rows], out[:, rows])
            else:
                out[rows] = tensor[rows]
    # Checked after the cast: a finite float64 may overflow float32. Takes 0.2 ns a number in float32, 0.9 in bfloat16.
    _check_finite(name, out)
    release(tensor)


def _check_finite(name: str, numbers: np.ndarray) -> None:
    if not np.isfinite(numbers).all():
        raise ValueError(
            f"{name} holds NaN or infinity in {numbers.dtype}: fetch the weights again"
        )
