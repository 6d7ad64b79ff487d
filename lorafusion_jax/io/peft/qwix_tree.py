"""LoRA of qwix on models of tunix: the orbax checkpoint that tunix saves, or a safetensors file with the same names.

A leaf `w_lora_a` or `kernel_lora_a` is [contracted axes, r], and `_lora_b` is [r, other axes] of the kernel's product.
A kernel of keys and values is therefore two modules with the same A. Alpha is not saved. Source: qwix,
`providers/lora.py`; tunix, `sft/checkpoint_manager.py` and `models/*/params.py`.
"""

import re
from pathlib import Path

import numpy as np

from ...models.registry import paths_in_tunix
from ...support.reading import error_context
from ..tensor_files import load_tensors
from .config import Stored, config_text, plain_config

_CHECKPOINT = "manifest.ocdbt"
_LEAF = re.compile(r"(.+)\.(?:w|kernel)_lora_([ab])(?:\.value)?")


def find(folder: Path) -> Path | None:
    """Return a folder's newest checkpoint of tunix, or its safetensors file with LoRA of qwix, or None."""
    steps = sorted(
        (path for path in folder.iterdir() if path.name.isdecimal()),
        key=lambda path: int(path.name),
    )
    for place in (
        folder,
        folder / "model_params",
        *(step / "model_params" for step in reversed(steps)),
    ):
        if (place / _CHECKPOINT).is_file():
            return place
    files = sorted(folder.glob("*.safetensors"))
    return next(
        (
            file
            for file in files
            if any("_lora_" in name for name in load_tensors(file))
        ),
        None,
    )


def read(source: Path, alpha: float | None) -> Stored:
    """Read what `find` returned, with PEFT's fields and names."""
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    ignored = 0
    with error_context(source):
        if alpha is None:
            raise ValueError(
                "qwix saves no alpha: give the one that the LoRA was trained with, with --alpha"
            )
        for name, array in (
            _checkpoint(source) if source.is_dir() else load_tensors(source)
        ).items():
            if "_lora_" not in name:
                ignored += 1
                continue
            match = _LEAF.fullmatch(name.replace("/", "."))
            module, kind = match.groups() if match else ("", "")
            paths = paths_in_tunix(module)
            if not paths:
                raise ValueError(
                    f"{name!r} is LoRA outside of attention and MLPs: retrain without it"
                )
            joint = kind == "b" and len(paths) > 1
            if (
                0 in array.shape
                or array.ndim < 2 + joint
                or (joint and array.shape[1] != len(paths))
            ):
                if kind == "a":
                    expected = "contracted axes, r"
                else:
                    expected = f"r, {f'{len(paths)}, ' * joint}other axes"
                raise ValueError(
                    f"{name!r} has the shape {list(array.shape)}: expected [{expected}]"
                )
            for path, factor in zip(
                paths,
                np.moveaxis(array, 1, 0) if joint else [array] * len(paths),
                strict=True,
            ):
                key = f"base_model.model.{path}.lora_{kind.upper()}.weight"
                if key in tensors:
                    raise ValueError(
                        f"{name!r} is a second factor of {path}: save the adapters apart"
                    )
                r = ranks[path] = factor.shape[-1] if kind == "a" else factor.shape[0]
                tensors[key] = factor.reshape((-1, r) if kind == "a" else (r, -1)).T
    rank = max(ranks.values(), default=1)
    config = plain_config(None, ranks, rank=rank, alpha=alpha, task_type="CAUSAL_LM")
    config["rank_pattern"] = {path: r for path, r in ranks.items() if r != rank}
    if ignored:
        notes = [
            f"ignored: {ignored} arrays that are no LoRA, taken for those of the base"
        ]
    else:
        notes = []
    return Stored(source, config_text(config), config, tensors, notes)


def _checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays of LoRA in a checkpoint of orbax; other arrays, which are not read, are empty."""
    import tensorstore

    kvstore = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{folder.absolute()}/"},
    }
    keys = [
        key.decode()
        for key in tensorstore.KvStore.open(kvstore).result().list().result()
    ]
    arrays = {}
    for key in keys:
        name, _, last = key.rpartition("/")
        if last not in (".zarray", "zarr.json"):
            continue
        if "_lora_" not in name:
            arrays[name] = np.empty(0)
            continue
        spec = {"driver": "auto", "kvstore": kvstore | {"path": f"{name}/"}}
        arrays[name] = tensorstore.open(spec, read=True).result().read().result()
    return arrays
