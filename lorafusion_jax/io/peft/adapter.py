"""Adapters of PEFT and other formats, read from a folder or the hub and written as PEFT does.

The tensors' keys and shapes determine the adapted matrices and the rank. Anything unsupported that would change the
output is an error, whereas PEFT loads non-strictly and only warns.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...support.reading import check_name, error_context, expand_user
from ...support.writing import new_folder
from ..hf import Base
from ..source import resolve
from ..tensor_files import load_tensors, save_tensors
from . import mlx, qwix_tree
from .config import (
    CONFIG,
    Stored,
    check_base,
    check_config,
    config_text,
    read_config_file,
    scalings,
)
from .tensors import MAGNITUDE, collect, path_in_file

WEIGHTS = "adapter_model.safetensors"
_BIN = "adapter_model.bin"
_LONGEST_REASON = 2_000
_FOREIGN_FILES = {
    "adapters.npz": "MLX",
    "pytorch_adapter.bin": "AdapterHub",
    "pytorch_lora_weights.safetensors": "diffusers",
}


class AdapterError(ValueError):
    """An adapter cannot be used."""


@dataclasses.dataclass(frozen=True, eq=False)
class PeftAdapter:
    """One adapter as stored on disk; arrays are read-only views of its file, in the file's dtype."""

    name: str
    source: str  # folder or hub id
    weights: Path  # file of the tensors
    config: Mapping[str, Any]  # content of adapter_config.json
    config_text: bytes  # bytes of that file
    # (A [r, d_in], B [d_out, r]) by the path of the linear module in the base model
    factors: dict[str, tuple[np.ndarray, np.ndarray]]
    scaling: dict[str, float]  # factor on B A by path
    magnitude: (
        dict[str, np.ndarray] | None
    )  # DoRA's magnitude [d_out] by path; None without DoRA
    keys: dict[
        str, tuple[str, ...]
    ]  # keys of A, B and, with DoRA, the magnitude in the file, by path
    kept: dict[
        str, np.ndarray
    ]  # tensors that are not applied, by key: copies of base weights and state of training
    notes: tuple[str, ...]  # warnings, and what was ignored, with the reason


def read_adapter(
    source: str,
    *,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    base_tensor: Callable[[str], np.ndarray] | None = None,
    base: Base | None = None,
    compared: Collection[str] | None = None,
    alpha: float | None = None,
) -> PeftAdapter:
    """Read and check an adapter.

    Args:
        source: A folder, or a hub id `owner/name` or `owner/name@revision`.
        shapes: (d_in, d_out) of each linear module of the base model that may be adapted, by path.
        base_tensor: Function from a Hugging Face name (also a tied one) to the base's tensor, [d_out, d_in] of a
            matrix, or KeyError. Full weights in the adapter are ignored if they equal the base's; otherwise they are an
            error.
        base: The base model, to be compared with the one that the adapter names.
        compared: Keys of tensors that were compared with the base's when the adapter was written into a pool; given
            instead of `base_tensor`.
        alpha: Alpha of an adapter of qwix, which does not contain it.

    Raises:
        AdapterError: The adapter cannot be used, or a file is missing, truncated, corrupt or a Git LFS pointer.
    """
    with _errors_of(source):
        folder = resolve(source, patterns=(CONFIG, WEIGHTS, _BIN, mlx.WEIGHTS))
        # `resolve` follows a link, whose name is the adapter's.
        local = expand_user(source).is_dir()
        if local:
            name = Path(os.path.abspath(folder)).name
        else:
            name = source.partition("@")[0].rpartition("/")[2]
        check_name(name)
        weights, text, config, tensors, notes = _stored(
            folder, alpha, compare_saved=base_tensor is not None or compared is not None
        )
        kept = {key: tensors.pop(key) for key in compared or () if key in tensors}
        with error_context(weights):
            parts, ignored = collect(
                tensors, config, shapes=shapes, base_tensor=base_tensor
            )
        for reason in dict.fromkeys(ignored.values()):
            keys = [key for key in ignored if ignored[key] == reason]
            number = f"{len(keys)} tensors such as " if len(keys) > 1 else ""
            notes.append(f"ignored: {number}{keys[0]}, {reason}")

        # PEFT looks for the patterns in the modules' names of the version that wrote the file.
        names = {path: path_in_file(part["lora_A"][0]) for path, part in parts.items()}
        ranks = {names[path]: len(part["lora_A"][1]) for path, part in parts.items()}
        with error_context(folder / CONFIG):
            factors = scalings(config, ranks)
            scaling = {path: factors[name] for path, name in names.items()}
            if base is not None:
                notes += check_base(config, base)

        dora = bool(config.get("use_dora"))
        return PeftAdapter(
            name=name,
            source=source,
            weights=weights,
            config=config,
            config_text=text,
            factors={
                path: (part["lora_A"][1], part["lora_B"][1])
                for path, part in parts.items()
            },
            scaling=scaling,
            magnitude={path: part[MAGNITUDE][1] for path, part in parts.items()}
            if dora
            else None,
            keys={
                path: tuple(part[kind][0] for kind in sorted(part))
                for path, part in parts.items()
            },
            kept=kept | {key: tensors[key] for key in ignored},
            notes=tuple(notes),
        )


@contextlib.contextmanager
def _errors_of(source: str) -> Iterator[None]:
    """Raise any error in the block as an AdapterError that names the adapter."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError):
            reason = str(error)
        else:
            reason = f"{type(error).__name__}: {error}"
        if len(reason) > _LONGEST_REASON:
            reason = f"{reason[:_LONGEST_REASON]} ..."
        raise AdapterError(
            reason if source in reason else f"{source}: {reason}"
        ) from error


def resave(adapter: PeftAdapter, folder: Path) -> None:
    """Write an adapter to a new folder: the same tensors with the same keys, and its configuration byte for byte."""
    tensors = dict(adapter.kept)
    for path, keys in adapter.keys.items():
        arrays = adapter.factors[path] + (
            (adapter.magnitude[path],) if adapter.magnitude else ()
        )
        tensors |= zip(keys, arrays, strict=True)
    write_adapter(folder, adapter.config_text, tensors)


def write_adapter(
    folder: Path, config: Mapping[str, Any] | bytes, tensors: Mapping[str, np.ndarray]
) -> None:
    """Write a new folder that PEFT loads, complete or not at all.

    `config` has the fields or bytes of `adapter_config.json`, and `tensors` PEFT's keys,
    `base_model.model.<path>.lora_A.weight` [r, d_in] and so on.
    """
    with new_folder(folder) as partial:
        put_adapter(partial, config, tensors)


def put_adapter(
    folder: Path, config: Mapping[str, Any] | bytes, tensors: Mapping[str, np.ndarray]
) -> None:
    """Write the files of `write_adapter`, with its arguments [r, d_in] and [d_out, r], into an existing folder."""
    (folder / CONFIG).write_bytes(
        config if isinstance(config, bytes) else config_text(config)
    )
    save_tensors(folder / WEIGHTS, tensors)


def _foreign(folder: Path) -> str:
    """Name the weights of another tool in a folder, or return nothing."""
    for file, tool in _FOREIGN_FILES.items():
        if (folder / file).exists():
            return f"{file} of {tool}"
    for path in folder.glob("*.safetensors"):
        if any(".lora_down." in key for key in load_tensors(path)):
            return f"{path.name} in the format of Kohya's scripts"
    return ""


def _stored(folder: Path, alpha: float | None, *, compare_saved: bool) -> Stored:
    """Return what a folder holds, in PEFT's format or another one."""
    weight_files = [
        folder / name for name in (WEIGHTS, _BIN) if (folder / name).is_file()
    ]
    if (
        not weight_files
        and not (folder / mlx.WEIGHTS).is_file()
        and (tree := qwix_tree.find(folder))
    ):
        return qwix_tree.read(tree, alpha)
    if alpha is not None:
        raise ValueError(
            f"{folder}: alpha is {alpha:g}, but only a LoRA of qwix lacks its own: leave out --alpha"
        )
    if not weight_files and (folder / mlx.WEIGHTS).is_file():
        return mlx.read(folder)
    if not weight_files and (foreign := _foreign(folder)):
        raise AdapterError(
            f"{folder} has {foreign}, not PEFT's {WEIGHTS}: save the adapter with PEFT, or fetch that"
        )
    text, config = read_config_file(folder)
    with error_context(folder / CONFIG):
        notes = check_config(config, compare_saved=compare_saved)
    if not weight_files:
        raise AdapterError(
            f"{folder} has neither {WEIGHTS} nor {_BIN}: fetch the weights as well"
        )
    if len(weight_files) > 1:
        notes.append(f"ignored: {_BIN}, because {WEIGHTS} is next to it")
    return Stored(weight_files[0], text, config, load_tensors(weight_files[0]), notes)
