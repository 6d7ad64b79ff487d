"""Corrections of chips on disk, and `lorafusion restore`, which computes them from text.

FOLDER/chip_N/manifest.json         digests of the base and the configuration, key, age, numbers, divergence
FOLDER/chip_N/arrays.safetensors    SITE/scale and so on, and the converters' ranges that they belong to
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from .. import crossbar
from ..io import store
from ..io.folders import locked
from ..loading.identity import digests
from ..loading.model import LoadedModel, load_model
from ..loading.spec import LoadOptions
from ..models.architecture import matrices
from ..models.weights import dense
from ..support.checks import at_least, check_uint32, flags_given
from ..support.options import (
    AgeOptions,
    BaseOptions,
    CrossbarOptions,
    DrawnChipsOptions,
    MeshOptions,
    OutOptions,
    SeedOptions,
)
from ..support.progress import progress
from ..support.reading import FileError
from ..tasks import IGNORED, Batch, tokenise
from ..training.mesh import axis_size, make_mesh, on_mesh
from .chip_file import Chips, aged, load_chips
from .chips import programmed
from .program import Restored, check_no_split, program
from .restore import (
    Method,
    Restoring,
    divergences,
    of_each,
    of_one_rank,
    restore_each,
    stacked_corrections,
)
from .texts import (
    LINES,
    WINDOW,
    Outputs,
    answered,
    logits_of_base,
    no_padding,
    read_texts,
    sampled,
    windows,
)

_KIND = "correction"
_RANGES = ("limits", "input_limit")
_PARTS = ("scale", "offset", "U", "V", *_RANGES)
# One of so many windows or lines is left out of the training, to measure on: the last windows, but lines from the whole
# text.
_MEASURED = 8
_SAMPLED = 3072  # tokens that a causal model samples by default
_PREPARED_RATE = 1.5e-3  # 0.01 makes chips of a prepared base worse at first


class Settings(TypedDict):
    """Settings that the corrections of one chip were computed from; `text` is the files' digest, or `sampled`."""

    base_sha256: str
    config_sha256: str
    key: list[int]
    digital: list[str]
    age: str | None
    in_advance: bool
    method: Method
    rank: float
    epochs: int
    rate: float
    rate_low_rank: float
    text: str
    tokens: int | None
    seed: int


class Manifest(TypedDict):
    """Metadata of the corrections of one chip.

    Attributes:
      chip: number of the chip.
      settings: base, chips, text and training that they were computed with.
      numbers: digital parameters, and `share` the same as a share of the weights in arrays.
      tokens: tokens that they were trained on.
      divergence: from the digital model before and after, in nats per token of text that was left out.
    """

    chip: int
    settings: Settings
    numbers: int
    share: float
    tokens: int
    divergence: list[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreOptions(
    OutOptions,
    MeshOptions,
    DrawnChipsOptions,
    AgeOptions,
    SeedOptions,
    CrossbarOptions,
    BaseOptions,
):
    """Compute digital corrections of a base model on simulated chips, from unlabelled text.

    No cell is written. `lorafusion fuse`, `evaluate`, `generate` and `lm-eval` use the corrections with --restore.
    After an interruption, the same command continues with the next chip.

    Examples:
      lorafusion restore --base base --crossbar noisy_chips.json --chip 0 1 --text page.txt --out restored
      lorafusion restore --base base --crossbar noisy.yaml --tokens 3072 --method low-rank --rank 3 --out restored

    Attributes:
      crossbar: a file that `lorafusion crossbar program` wrote, a folder that `prepare` wrote, a preset, or a .yaml or
        .json file.
      seed: seed of the order of the text, and of sampled text.
      out: folder to write. Chips that it has are not computed again.
      chip: numbers of the chips.
      text: text files; a causal model reads windows of 128 tokens, another one each line.
      tokens: a causal model uses the first so many tokens of the text, by default all; without text it samples so
        many itself, digitally, by default 3,072.
      method: a factor of each column (`scales`), an offset too (`offsets`), factors and matrices of low rank
        (`low-rank`), or these matrices alone (`lora`).
      rank: mean rank of the matrices of `low-rank` and `lora`; by default 4.
      epochs: passes of distillation over the text; 0 for the closed form alone.
      rate: learning rate of factors and offsets; by default 0.01, and 0.0015 on chips of a prepared base.
      rate_low_rank: learning rate of the matrices; by default 0.001, and 0.003 for `lora`.
      in_advance: compute corrections for that age in advance, with other draws of the drift than the chips will have.
    """

    chip: tuple[int, ...] = (0,)
    text: tuple[Path, ...] = ()
    tokens: int | None = None
    method: Method = "scales"
    rank: float | None = None
    epochs: int = Restoring.epochs
    rate: float | None = None
    rate_low_rank: float | None = None
    in_advance: bool = False


def restore_chips(options: RestoreOptions) -> dict[int, Manifest]:
    """Write the corrections of some chips to a folder, and return their metadata by the chips' numbers.

    Raises:
      ValueError: before anything is programmed: the folder has corrections with other settings, or another process
        writes it, the text is shorter than two windows, or a base, chips or a number cannot be used.
    """
    at_least(1, chips=len(options.chip), tokens=options.tokens)
    check_uint32(seed=options.seed)
    mesh = None if options.mesh is None else make_mesh(options.mesh)
    if mesh is not None:
        check_no_split(mesh.shape["model"])
    low_rank = options.method in ("low-rank", "lora")
    rank = 4.0 if options.rank is None else options.rank
    unused = () if low_rank else ("rank", "rate_low_rank")
    if options.method == "lora":
        unused = ("rate",)
    if flags := flags_given(options, unused):
        raise ValueError(
            f"{flags}: without effect on the method {options.method}: leave it out, or choose another one"
        )
    if not 0 < rank < float("inf"):
        raise ValueError(f"rank is {rank}: expected a finite number above 0")
    chips = load_chips(
        options.crossbar, key=options.chip_key, digital=options.keep_digital
    )
    same = {
        name: getattr(options, name)
        for name in ("method", "epochs", "rate", "rate_low_rank", "seed")
    }
    if options.rate is None:
        same["rate"] = Restoring.rate if chips.prepared is None else _PREPARED_RATE
    how = Restoring(
        **same, numbers=int(low_rank)
    )  # refuses what cannot work, before the model is loaded
    same["rate_low_rank"] = how.rate_of_matrices
    config = aged(chips.config, options.age)
    keys = {number: chips.chip_key(number) for number in options.chip}
    if options.in_advance:
        config = drifting_otherwise(config)
    content = read_texts(options.text)
    loaded = load_model(LoadOptions(base=options.base, method="zero-shot"))
    loaded = chips.checked(loaded)
    settings = Settings(
        **_of_chips(chips, digests(loaded)["base"]),
        **same,
        age=options.age,
        in_advance=options.in_advance,
        rank=rank if low_rank else 0.0,
        text=hashlib.sha256(content.encode()).hexdigest()
        if options.text
        else "sampled",
        tokens=options.tokens or (None if options.text else _SAMPLED),
    )
    out = options.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder with --out")
    if not keys.keys() - (made := _all_kept(out, settings)):
        return {number: made[number] for number in keys}
    train, left_out = _read_text(loaded, options, content)
    setup = loaded.with_layers(unroll=False)
    run = logits_of_base(setup.problem.graph)
    logits = jax.jit(run)
    count = _tokens(left_out)
    on_devices = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    with locked(out, "another --out"), on_devices:
        made = _all_kept(out, settings)
        setup = setup.with_problem(frozen=on_mesh(setup.problem.frozen))
        digital = setup.problem.frozen
        devices = axis_size("seed")
        missing = [number for number in keys if number not in made]
        for first in progress("chips", range(0, len(missing), devices)):
            group = missing[
                first : first + devices
            ]  # one chip on every device, the last also where none is left
            group_keys = jnp.stack(
                [
                    keys[number]
                    for number in [*group, *group[-1:] * (devices - len(group))]
                ]
            )
            weights = _on_chips(setup, chips.rules(config), group_keys)
            weights = crossbar.calibrate_tree(of_each(run), weights, train)
            matrices = digital_matrices(setup, weights)
            if low_rank:
                how = dataclasses.replace(
                    how, numbers=round(rank * crossbar.numbers_per_rank(matrices))
                )
            targets = Outputs(logits, digital.base, train)
            kept_back = Outputs(logits, digital.base, left_out)
            corrections = restore_each(
                run,
                weights,
                matrices,
                train,
                targets,
                how,
                left_out=(left_out, kept_back),
                counted=no_padding(setup),
            )
            corrected = crossbar.with_corrections(
                weights, stacked_corrections(corrections)
            )
            before_and_after = np.zeros((2, devices))
            for batch_and_targets in zip(left_out, kept_back, strict=True):
                off = [
                    divergences(on, *batch_and_targets, run)
                    for on in (weights, corrected)
                ]
                before_and_after += (
                    np.asarray(off) * batch_and_targets[0].labels.size / count
                )
            ranges = jax.device_get(
                {c.name: (c.limits, c.input_limit) for c in crossbar.chips_in(weights)}
            )
            for place, number in enumerate(group):
                numbers = sum(
                    correction.numbers() for correction in corrections[place].values()
                )
                made[number] = {
                    "chip": number,
                    "settings": settings,
                    "numbers": numbers,
                    "share": numbers / sum(matrix.size for matrix in matrices),
                    "tokens": _tokens(train),
                    "divergence": before_and_after[:, place].tolist(),
                }
                chip_ranges = jax.tree.map(
                    lambda leaf, place=place: leaf[place], ranges
                )
                store.save(
                    out / f"chip_{number}",
                    _KIND,
                    _to_save(chip_ranges, corrections[place]),
                    made[number],
                )
    return {number: made[number] for number in keys}


def load_restored(
    name: str, chips: Chips, numbers: Sequence[int], base_sha256: str
) -> list[Restored]:
    """Return the corrections of some chips; matrices of low rank have the same rank on all of them.

    Args:
      name: folder that `lorafusion restore` wrote.
      chips: the chips that they are for.
      numbers: numbers of the chips.
      base_sha256: digest of the base model.

    Raises:
      ValueError: the corrections are of another base, of other chips, or of other numbers of these, they were computed
        with different settings, or their arrays are not corrections.
    """
    folder = Path(name)
    current = _of_chips(chips, base_sha256)
    names = {
        "base_sha256": "base model",
        "config_sha256": "configuration or preparation",
    }
    names |= {"key": "key", "digital": "digital weights"}
    if not (restored_numbers := _numbers(folder)):
        raise ValueError(
            f"{folder} has no corrections of a chip: give a folder that `lorafusion restore` wrote"
        )
    trees = []
    first = None
    for number in numbers:
        if number not in restored_numbers:
            list_of_chips = ", ".join(map(str, restored_numbers))
            raise ValueError(
                f"{folder} corrects {list_of_chips}, not chip {number}: run `lorafusion restore` on it too"
            )
        chip_folder = folder / f"chip_{number}"
        tree, manifest = store.load(chip_folder, _KIND, Manifest)
        _check_number(chip_folder, manifest, number)
        _check_parts(chip_folder, tree)
        first = first or (tree.keys(), manifest["settings"])
        if first != (tree.keys(), manifest["settings"]):
            fix = "run `lorafusion restore` on all of them with another --out"
            raise FileError(
                chip_folder,
                got=f"computed with other settings than chip {numbers[0]}",
                fix=fix,
            )
        for field, title in names.items():
            if manifest["settings"][field] != current[field]:
                raise ValueError(
                    f"{folder} corrects chips with another {title} ({_short(manifest['settings'][field])}, these have "
                    f"{_short(current[field])}): run `lorafusion restore` on these chips"
                )
        trees.append(tree)
    of_one_rank(trees)
    return [_restored(tree, str(folder)) for tree in trees]


def _check_parts(folder: Path, tree: dict[str, Any]) -> None:
    """Raise a FileError if the arrays of a chip are not the parts of corrections; their shapes are checked on it."""
    for site, parts in tree.items():
        parts = parts if isinstance(parts, dict) else {"": parts}
        shapes = {
            part: getattr(values, "shape", None) for part, values in parts.items()
        }
        u = shapes.get("U", (0, 0)) or ()
        v = shapes.get("V", (0, 0)) or ()
        for part, values in parts.items():
            right_type = part in _PARTS and getattr(values, "dtype", None) == np.float32
            if (
                not right_type
                or np.isnan(values).any()
                or len(u) < 2
                or len(v) < 2
                or u[-1] != v[-2]
                or u[:-2] != v[:-2]
            ):
                got = (
                    f"{getattr(values, 'dtype', 'a folder')}{list(shapes[part] or ())}"
                )
                expected = f"float32 without NaN in {', '.join(_PARTS)}, and U [d_in, r] with V [r, d_out]"
                fix = "run `lorafusion restore` again with another --out"
                raise FileError(
                    folder,
                    field=repr(f"{site}/{part}"),
                    got=got,
                    expected=expected,
                    fix=fix,
                )


def drifting_otherwise(config: crossbar.CrossbarConfig) -> crossbar.CrossbarConfig:
    """Return the configuration of the same chips with other draws of the drift.

    Raises:
      ValueError: the configuration has no drift, or no age.
    """
    device = config.device
    if device.drift is None or device.time is None:
        raise ValueError(
            "corrections are made in advance for an age of chips that drift: give --age, and device.drift"
        )
    drift = jax.tree_util.Partial(_drifted_otherwise, device.drift)
    return dataclasses.replace(config, device=dataclasses.replace(device, drift=drift))


def digital_matrices(
    loaded: LoadedModel, weights: Any
) -> list[Float[Array, "*N d_in d_out"]]:
    """Return the digital matrices of the chips in a tree of the base's weights, or of several chips."""
    base = matrices(nnx.merge(loaded.problem.graph, loaded.problem.frozen.base))
    return [dense(base[chip.name], jnp.float32) for chip in crossbar.chips_in(weights)]


def _of_chips(chips: Chips, base_sha256: str) -> dict[str, Any]:
    return {
        "base_sha256": base_sha256,
        "config_sha256": chips.sha256,
        "key": np.asarray(jax.random.key_data(chips.key)).tolist(),
        "digital": list(chips.digital),
    }


def _numbers(folder: Path) -> list[int]:
    names = (path.name.removeprefix("chip_") for path in folder.glob("chip_*"))
    return sorted(int(name) for name in names if name.isdecimal())


def _all_kept(out: Path, settings: Settings) -> dict[int, Manifest]:
    """Return the metadata of a folder's corrections by chip; ValueError if one was computed from other settings."""
    made = {}
    for number in _numbers(out):
        folder = out / f"chip_{number}"
        made[number] = manifest = store.read_manifest(folder, _KIND, Manifest)[
            "metadata"
        ]
        _check_number(folder, manifest, number)
        for name, value in settings.items():
            if (then := manifest["settings"][name]) != value:
                raise ValueError(
                    f"{folder} has corrections with another {name} ({_short(then)}, now {_short(value)}): give another "
                    "--out; corrections are never overwritten, and all in a folder have the same settings"
                )
    return made


def _check_number(folder: Path, manifest: Manifest, number: int) -> None:
    if (chip := manifest["chip"]) != number:
        raise FileError(
            folder,
            field="chip",
            got=str(chip),
            expected=str(number),
            fix=f"rename it to chip_{chip}",
        )


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(int(np.sum(np.asarray(batch.labels) != IGNORED)) for batch in batches)


def _read_text(
    loaded: LoadedModel, options: RestoreOptions, content: str
) -> tuple[list[Batch], list[Batch]]:
    """Return batches of the text, the content of its files or a sample: those to train on, and those left out."""
    if not loaded.config.causal:
        lines = [line for line in content.splitlines() if line.strip()]
        if len(lines) <= LINES or options.tokens:
            needed = f"more than {LINES} lines with --text, without --tokens"
            raise ValueError(
                f"{options.base} is not causal, and the text has {len(lines)} lines: give {needed}"
            )
        to_train = [line for place, line in enumerate(lines) if place % _MEASURED]
        return answered(loaded, to_train), answered(loaded, lines[::_MEASURED])
    if options.text:
        all_ids = tokenise(
            loaded.tokenizer, content, add_special_tokens=False, verbose=False
        )["input_ids"]
        ids = all_ids[: options.tokens]
    else:
        ids = sampled(loaded, options.tokens or _SAMPLED, options.seed)
    if len(batches := windows(loaded, ids)) < 2:
        raise ValueError(
            f"the text has {len(ids)} tokens: give at least two windows of {WINDOW}, better {_SAMPLED:,}"
        )
    measured = max(1, len(batches) // _MEASURED)
    return batches[:-measured], batches[-measured:]


def _on_chips(setup: LoadedModel, rules: crossbar.Rules, keys: Array) -> Any:
    """Return the base's weights on chips, with an axis of chips."""
    if len(keys) > 1:
        return programmed(setup.problem, rules, keys).base
    # Outside of one program, weights of one kind are written by one program, which compiles sooner.
    weights = program(setup.problem.graph, setup.problem.frozen, rules, keys[0]).base
    return jax.tree.map(lambda leaf: leaf[None], weights)


def _to_save(
    ranges: dict[str, tuple[Any, Any]], corrections: dict[str, crossbar.Correction]
) -> dict[str, dict[str, np.ndarray]]:
    """Return the arrays of one chip by site and part."""
    by_site = {}
    for site, values in ranges.items():
        parts = vars(corrections[site]) | dict(zip(_RANGES, values, strict=True))
        by_site[site] = {
            name: np.asarray(value)
            for name, value in parts.items()
            if value is not None
        }
    return by_site


def _restored(tree: dict[str, dict[str, np.ndarray]], folder: str) -> Restored:
    corrections = {}
    ranges = {}
    for site, parts in tree.items():
        values = {part: jnp.asarray(value) for part, value in parts.items()}
        ranges[site] = {part: values.pop(part) for part in _RANGES if part in values}
        corrections[site] = crossbar.Correction(**values)
    return Restored(corrections, ranges, folder)


def _drifted_otherwise(
    drift: Callable[..., Array], G: Array, key: Array, time: Any
) -> Array:
    return drift(G, jax.random.fold_in(key, 1), time)


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
