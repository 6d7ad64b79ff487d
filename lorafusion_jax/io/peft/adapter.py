"""PEFT adapters, read from a folder or the hub and written back.

The tensors' keys and shapes decide which matrices an adapter is for and its rank. PEFT itself loads non-strictly and
only warns; here anything that would change the result is an error that names it.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...files import FileError, check_name, structured
from .. import safetensors as safetensors_map
from .. import torch_pickle
from ..folders import new_folder
from ..source import at_home, map_file, resolve
from .config import AdapterError, KnownBase, check_base, check_config, scalings
from .kinds import KINDS, as_lora
from .tensors import MAGNITUDE, collect, target_warnings

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_BIN = "adapter_model.bin"
_MAX_CONFIG = 1 << 20
_LONGEST_REASON = 2_000
_EXACT, _MUCH = 1e-5, 0.05  # relative errors of updates: rounding of float32, and what deserves a warning
_FOREIGN_FILES = {"adapters.safetensors": "MLX", "adapters.npz": "MLX", "pytorch_adapter.bin": "AdapterHub"}


@dataclasses.dataclass(frozen=True, eq=False)
class PeftAdapter:
    """One adapter as stored on disk; arrays are read-only views of its file, in the file's dtype.

    Attributes:
        name: The last part of its source, without a revision.
        source: The folder or hub id that it was read from.
        weights: The file that holds the tensors.
        config: The content of adapter_config.json.
        config_text: The bytes of that file.
        factors: (A [r, d_in], B [d_out, r]) by the path of the linear module in the base model.
        scaling: The factor on B A by path.
        magnitude: DoRA's magnitude [d_out] by path; None without DoRA.
        keys: The file's own spelling of the keys of A, B and, with DoRA, the magnitude, by path.
        kept: Tensors that are not applied, by key: copies of base weights and state of training.
        notes: Warnings, and everything that was ignored, with the reason.
        residual: Of an adapter of another kind than LoRA, ||dW - B A|| / ||dW|| by path.
    """

    name: str
    source: str
    weights: Path
    config: Mapping[str, Any]
    config_text: bytes
    factors: dict[str, tuple[np.ndarray, np.ndarray]]
    scaling: dict[str, float]
    magnitude: dict[str, np.ndarray] | None
    keys: dict[str, tuple[str, ...]]
    kept: dict[str, np.ndarray]
    notes: tuple[str, ...]
    residual: Mapping[str, float] = dataclasses.field(default_factory=dict)


def read_adapter(
    source: str,
    *,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    base_tensor: Callable[[str], np.ndarray] | None = None,
    base: KnownBase | None = None,
    compared: Collection[str] | None = None,
    rank: int = 16,
) -> PeftAdapter:
    """Read and check an adapter. Anything unsupported that would change its output is an error.

    Args:
        source: A folder, or a hub id `owner/name` or `owner/name@revision`.
        shapes: (d_in, d_out) of every linear module of the base model that may be adapted, by path.
        base_tensor: Function from a Hugging Face name (also a tied one) to the base's tensor; raises KeyError on a
            name that the base lacks. Full weights in the adapter are compared with it: if equal they are ignored,
            otherwise they are an error.
        base: The base model, to be compared with the one that the adapter names.
        compared: Keys of tensors that are not applied because they equalled the base's when the adapter was written
            into a pool; given instead of `base_tensor`.
        rank: Rank of the factors of an adapter of another kind than LoRA (see `kinds`).

    Raises:
        AdapterError: The adapter cannot be used, or a file is missing, truncated, corrupt or a Git LFS pointer. The
            message contains the adapter's name, the reason and what to do.
    """
    try:
        return _read(source, shapes, base_tensor, base, compared, rank)
    except Exception as error:
        # The checks raise AdapterError or ValueError. Any other error that a file causes also ends this adapter only;
        # the traceback keeps the cause.
        if isinstance(error, AdapterError) and source in str(error):
            raise
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        reason = reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]} ..."
        raise AdapterError(reason if source in reason else f"{source}: {reason}") from error


def _read(
    source: str,
    shapes: Mapping[str, tuple[int, int]] | None,
    base_tensor: Callable[[str], np.ndarray] | None,
    base: KnownBase | None,
    compared: Collection[str] | None,
    rank: int,
) -> PeftAdapter:
    folder = resolve(source, patterns=(CONFIG, WEIGHTS, _BIN))
    # A link has a name of its own, which `resolve` would not return.
    local = at_home(source).is_dir()
    name = Path(os.path.abspath(folder)).name if local else source.partition("@")[0].rpartition("/")[2]
    check_name(name)
    config_text, config = read_config_file(folder)
    kind, notes, residual = config.get("peft_type"), [], {}
    if kind not in KINDS:
        notes += _checked(config, folder, base_tensor, compared)
    weights = _weights_file(folder, notes)
    where = str(weights)
    tensors = (torch_pickle if weights.suffix == ".bin" else safetensors_map).load(weights)
    if kind in KINDS:
        if shapes is None or base_tensor is None:
            raise AdapterError(f"{where}: a {kind} adapter becomes LoRA only with its base's weights: give the base")
        converted = as_lora(config, tensors, rank=rank, where=where, shapes=shapes, base_tensor=base_tensor)
        config, tensors, residual = converted
        config_text = json.dumps(config, indent=2, sort_keys=True).encode()
        notes += [_loss(kind, rank, residual), *_checked(config, folder, base_tensor, compared)]
    kept = {key: tensors.pop(key) for key in compared or () if key in tensors}
    parts, ignored = collect(tensors, config, where=where, shapes=shapes, base_tensor=base_tensor)
    notes += [f"ignored: {key}, {reason}" for key, reason in ignored.items()]

    ranks = {path: part["lora_A"][1].shape[0] for path, part in parts.items()}
    scaling, warnings = scalings(config, ranks, where=where)
    notes += [f"warning: {warning}" for warning in warnings]
    notes += target_warnings(config, parts)
    if base is not None:
        notes += check_base(config, base, where=str(folder / CONFIG))

    dora = bool(config.get("use_dora"))
    return PeftAdapter(
        name=name,
        source=source,
        weights=weights,
        config=config,
        config_text=config_text,
        factors={path: (part["lora_A"][1], part["lora_B"][1]) for path, part in parts.items()},
        scaling=scaling,
        magnitude={path: part[MAGNITUDE][1] for path, part in parts.items()} if dora else None,
        keys={path: tuple(part[kind][0] for kind in sorted(part)) for path, part in parts.items()},
        kept=kept | {key: tensors[key] for key in ignored},
        notes=tuple(notes),
        residual=residual,
    )


def _checked(
    config: Mapping[str, Any],
    folder: Path,
    base_tensor: Callable[[str], np.ndarray] | None,
    compared: Collection[str] | None,
) -> tuple[str, ...]:
    compares = base_tensor is not None or compared is not None
    return check_config(config, where=str(folder / CONFIG), compare_saved=compares)


def _loss(kind: str, rank: int, residual: Mapping[str, float]) -> str:
    """Describe how well the factors represent the updates."""
    worst = max(residual, key=residual.__getitem__)
    if residual[worst] < _EXACT:
        return f"converted from {kind} to LoRA of rank {rank}, exactly"
    text = (
        f"converted from {kind} to LoRA of rank {rank}: the relative error of the updates is "
        f"{np.mean([*residual.values()]):.1%} on average and {residual[worst]:.1%} at {worst}"
    )
    return f"warning: {text}; a larger --rank lowers it" if residual[worst] > _MUCH else text


def resave(adapter: PeftAdapter, folder: Path) -> None:
    """Write an adapter back: the same tensors under the same keys, and its configuration byte for byte.

    Raises:
        ValueError: The folder exists.
    """
    with new_folder(folder) as partial:
        put_again(adapter, partial)


def put_again(adapter: PeftAdapter, folder: Path) -> None:
    """Write the files of `resave` into an existing folder."""
    tensors = dict(adapter.kept)
    for path, keys in adapter.keys.items():
        arrays = adapter.factors[path] + ((adapter.magnitude[path],) if adapter.magnitude else ())
        tensors |= zip(keys, arrays, strict=True)
    put_adapter(folder, adapter.config_text, tensors)


def write_adapter(folder: Path, config: Mapping[str, Any] | bytes, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a folder that PEFT loads: `adapter_config.json` and `adapter_model.safetensors`.

    The folder gets its name only when it is complete.

    Args:
        folder: The folder to make.
        config: The fields of the configuration, or the bytes of the file.
        tensors: By PEFT's keys, `base_model.model.<path>.lora_A.weight` [r, d_in] and so on.

    Raises:
        ValueError: The folder exists.
    """
    with new_folder(folder) as partial:
        put_adapter(partial, config, tensors)


def put_adapter(folder: Path, config: Mapping[str, Any] | bytes, tensors: Mapping[str, np.ndarray]) -> None:
    """Write the files of `write_adapter` into an existing folder."""
    if not isinstance(config, bytes):
        config = json.dumps(dict(config), indent=2, sort_keys=True).encode()
    (folder / CONFIG).write_bytes(config)
    safetensors_map.save(folder / WEIGHTS, tensors)


def read_config_file(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes and the content of a folder's adapter_config.json.

    Raises:
        AdapterError: There is none, or it is too large.
        FileError: It is not a JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(f"{folder} has no {CONFIG}: expected the folder that PEFT's save_pretrained wrote")
    data = map_file(path)
    if len(data) > _MAX_CONFIG:
        raise AdapterError(f"{path}: has {len(data):,} bytes: expected at most {_MAX_CONFIG:,}")
    text = bytes(data)
    fix = "fetch the file again"
    try:
        content = json.loads(text)  # PEFT writes NaN and infinity, which JSON does not have
    except (ValueError, RecursionError) as error:
        raise FileError(path, got=f"not JSON ({error})", fix=fix) from None
    return text, structured(content, dict[str, Any], path, own=False, fix=fix)


def _weights_file(folder: Path, notes: list[str]) -> Path:
    if (folder / WEIGHTS).is_file():
        if (folder / _BIN).is_file():
            notes.append(f"ignored: {_BIN}, because {WEIGHTS} is next to it")
        return folder / WEIGHTS
    if (folder / _BIN).is_file():
        return folder / _BIN
    foreign = [f" ({file} is {name}'s)" for file, name in _FOREIGN_FILES.items() if (folder / file).exists()]
    raise AdapterError(f"{folder} has neither {WEIGHTS} nor {_BIN}{''.join(foreign)}: fetch the weights as well")
