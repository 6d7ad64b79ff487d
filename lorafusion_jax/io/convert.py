"""`convert`: turn adapters into a pool on disk, complete or absent, and make its shared basis.

Adapters are read, checked and written one after the other, so memory holds one at a time.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.basis import check_size, directions, in_directions
from ..models.architecture import adaptable_shapes
from ..support.checks import flags_given
from ..support.options import (
    AnyBaseOptions,
    BasisOptions,
    StoredDtypeOptions,
)
from ..support.progress import progress
from ..support.reading import utf8
from ..support.writing import new_folder
from .hf import base_tensor, open_base
from .peft.adapter import (
    AdapterError,
    PeftAdapter,
    read_adapter,
    resave,
)
from .peft.tensors import MAGNITUDE
from .pool import KIND, ConvertedPool
from .pool_arrays import check_finite, check_fits, describe
from .store import seal

_RUNTIME_FIELDS = ("dtype", "unroll")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions(BasisOptions, StoredDtypeOptions, AnyBaseOptions):
    r"""Convert LoRA adapters of PEFT, mlx-lm or qwix into a pool, ready to be fused, or make the shared basis of one.

    Examples:
      python convert_peft_weights.py --base google/flan-t5-large --out pools/two \
        --adapters lorahub/flan_t5_large-super_glue_wic lorahub/flan_t5_large-ag_news_subset
      lorafusion convert --out pools/two --basis 32

    Attributes:
      base: folder, hub id or GGUF file of the base model that the adapters were trained on; not needed for the basis of
        an existing pool, nor for a dry run.
      adapters: folders or hub ids (owner/name, owner/name@revision) of the adapters.
      out: folder to write, which must not exist; not needed for a dry run. Without adapters, the converted pool to
        which the basis is added.
      basis: also make a shared basis with this number of directions from all modules: the pool can then be fused with a
        fraction of its reads (`lorafusion fuse --basis`).
      dtype: store factors in this dtype; by default in the adapter's.
      adapters_file: a text file with one more folder or hub id per line; # begins a comment. `lorahub` is the list of
        LoraHub's 196 adapters of FLAN-T5-large, which comes with the package.
      alpha: alpha of adapters of qwix (or tunix), which do not contain it.
      dry_run: read and check everything and print the same report, but write nothing. Of a base in a folder,
        config.json is enough for this, unless an adapter carries copies of base weights. Without a base, check the
        files alone, list all adapters that cannot be used, and exit with 1 if there are any.
      skip_bad: leave out adapters that cannot be used, and list them, instead of stopping at the first.
      json: print the report as JSON.
    """

    adapters: tuple[str, ...] = ()
    adapters_file: Path | None = None
    out: Path | None = None
    alpha: float | None = None
    dry_run: bool = False
    skip_bad: bool = False
    json: bool = False


def convert(options: ConvertOptions) -> dict[str, Any]:
    """Convert the adapters, make the basis that the options name, and return the pool's metadata.

    Raises ValueError, before anything is written, if an option is wrong, `out` exists, or an adapter cannot be used.
    """
    if options.dry_run and options.basis is not None:
        raise ValueError("a dry run makes no basis: leave out --dry-run, or --basis")
    sources = _sources(options)
    if options.out is None and not options.dry_run:
        raise ValueError(
            "the pool has no folder: give --out FOLDER, or --dry-run to write nothing"
        )
    if not sources and options.out is not None:
        if flags := flags_given(
            options, ("base", "alpha", "dtype", "skip_bad", "json")
        ):
            raise ValueError(
                f"{flags}: only for adapters that are converted: leave it out, or give --adapters"
            )
        assert options.basis is not None
        add_basis(options.out, options.basis)
        return dict(ConvertedPool(options.out).manifest)
    with (
        contextlib.nullcontext()
        if options.dry_run or options.out is None
        else new_folder(options.out) as folder
    ):
        description = _convert(sources, options, folder)
        if folder is not None and options.basis is not None:
            add_basis(folder, options.basis)
        return description


def add_basis(folder: Path, k: int) -> None:
    """Make the shared basis of a converted pool and write it next to the adapters; ValueError if the pool has one."""
    stored = ConvertedPool(folder)
    if stored.basis_folder.exists():
        raise ValueError(
            f"{stored.basis_folder} exists: move it away to make another basis"
        )
    pool = stored.load()
    check_size(pool, k)
    with progress(
        "basis", sum(len(rank) for rank in pool.rank.values()), unit="layer"
    ) as bar:
        basis = in_directions(pool, directions(pool, k, done=bar.update))
    stored.save_basis(basis)


def _sources(options: ConvertOptions) -> list[str]:
    sources = list(options.adapters)
    file = options.adapters_file
    if file is not None:
        if not file.is_file() and str(file) == "lorahub":
            file = Path(__file__).with_name("lorahub_adapters.txt")
        if not file.is_file():
            raise ValueError(
                f"{file}: no such file: expected a list of adapters, one a line, or lorahub for LoraHub's"
            )
        with utf8(file):
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        sources += [
            source for line in lines if (source := line.partition("#")[0].strip())
        ]
    if not sources and (options.basis is None or options.out is None):
        raise ValueError(
            "no adapters given: --adapters FOLDER_OR_HUB_ID ..., or --adapters-file LIST"
        )
    return sources


def _convert(
    sources: list[str], options: ConvertOptions, folder: Path | None
) -> dict[str, Any]:
    """Read and check all adapters, write them and the manifest if there is a folder, and return the pool's metadata."""
    if options.base is None and not options.dry_run:
        raise ValueError(
            "the adapters need their base model: give --base FOLDER_OR_HUB_ID, or --dry-run"
        )
    opened = None if options.base is None else open_base(options.base)
    config = opened and opened.config
    shapes = None if opened is None else adaptable_shapes(opened.config)
    tensor_of_base = None if opened is None else base_tensor(opened)
    adapters: dict[str, dict[str, Any]] = {}
    skipped = []
    for source in progress("convert", sources, unit="adapter"):
        try:
            adapter = read_adapter(
                source,
                base=opened,
                shapes=shapes,
                base_tensor=tensor_of_base,
                alpha=options.alpha,
            )
            check_fits(adapter, adapters, alone=len(sources) == 1)
            if options.dtype is not None:
                adapter = _cast(adapter, options.dtype)
            entry = describe(adapter, config)
        except AdapterError as error:
            if not options.skip_bad and opened is not None:
                advice = "Nothing was written; --skip-bad leaves out such adapters and lists them."
                raise AdapterError(f"{error}. {advice}") from error
            skipped.append({"source": source, "reason": str(error)})
            continue
        entry["folder"] = f"adapters/{len(adapters):04d}"
        if folder is not None:
            resave(adapter, folder / entry["folder"])
        adapters[adapter.name] = entry
    if not adapters and opened is not None:
        raise AdapterError(
            f"none of {len(sources)} adapters can be used; the first: {skipped[0]['reason']}"
        )
    parameters = sum(entry["parameters"] for entry in adapters.values())
    description = {
        "base": opened
        and {
            "source": options.base,
            "config_sha256": opened.files.config_sha256(),
            "family": opened.config.family,
            "config": {
                k: v
                for k, v in dataclasses.asdict(opened.config).items()
                if k not in _RUNTIME_FIELDS
            },
        },
        "cast_to": options.dtype,
        "adapters": list(adapters.values()),
        "skipped": skipped,
        "totals": {
            "adapters": len(adapters),
            "skipped": len(skipped),
            "parameters": parameters,
        },
    }
    if folder is not None:
        seal(folder, KIND, description)
    return description


def _cast(adapter: PeftAdapter, dtype: str) -> PeftAdapter:
    def cast(path: str, kind: str, array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            out = array.astype(dtype)
        check_finite(adapter, path, kind, out)
        return out

    return dataclasses.replace(
        adapter,
        factors={
            path: (cast(path, "lora_A", a), cast(path, "lora_B", b))
            for path, (a, b) in adapter.factors.items()
        },
        magnitude=adapter.magnitude
        and {path: cast(path, MAGNITUDE, m) for path, m in adapter.magnitude.items()},
    )
