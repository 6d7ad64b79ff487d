"""`lorafusion restore`: digital corrections of a base on simulated chips, computed from text, and on disk.

FOLDER/chip_N/manifest.json         digests of the base and the configuration, key, age, numbers, divergence
FOLDER/chip_N/arrays.safetensors    SITE/scale and so on, and the converters' ranges that they belong to
"""

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
from ..loading.model import LoadedModel, digests
from ..models.architecture import matrices as matrices_of
from ..models.weights import dense
from ..support.checks import at_least, check_uint32, flags_given
from ..support.options import (
    AgeOptions,
    BaseOptions,
    CrossbarOptions,
    DrawnChipsOptions,
    OutOptions,
    SeedOptions,
)
from ..support.progress import progress
from ..support.reading import FileError
from ..support.writing import locked
from ..tasks import IGNORED, Batch
from .chip_file import Chips, aged, load_chips
from .distil import Method, Restoring, divergence_on, restore
from .program import Restored, program
from .texts import (
    LINES,
    WINDOW,
    Outputs,
    answered,
    load_base,
    logits_of_base,
    no_padding,
    read_texts,
    sampled,
    token_ids,
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


class Manifest(TypedDict):
    """Metadata of the corrections of one chip.

    Attributes:
      chip: number of the chip.
      settings: base, chips, text and training that they were computed with; `text` is the files' digest, or `sampled`.
      numbers: digital parameters, and `share` the same as a share of the weights in arrays.
      tokens: tokens that they were trained on.
      divergence: from the digital model before and after, in nats per token of text that was left out.
    """

    chip: int
    settings: dict[str, Any]
    numbers: int
    share: float
    tokens: int
    divergence: list[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreOptions(
    OutOptions,
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
    rate = options.rate
    if rate is None:
        rate = Restoring.rate if chips.prepared is None else _PREPARED_RATE
    restoring = Restoring(  # refuses what cannot work, before the model is loaded
        method=options.method,
        numbers=int(low_rank),
        epochs=options.epochs,
        rate=rate,
        rate_low_rank=options.rate_low_rank,
        seed=options.seed,
    )
    config = aged(chips.config, options.age)
    keys = {number: chips.chip_key(number) for number in options.chip}
    if options.in_advance:
        config = drifting_otherwise(config)
    out = options.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder with --out")
    content = read_texts(options.text)
    loaded = chips.checked(load_base(options.base))
    text = "sampled"
    tokens = options.tokens or _SAMPLED
    if options.text:
        text = hashlib.sha256(content.encode()).hexdigest()
        tokens = options.tokens
    settings = _identity(chips, digests(loaded)["base"]) | {
        "age": options.age,
        "in_advance": options.in_advance,
        "method": options.method,
        "rank": rank if low_rank else 0.0,
        "epochs": options.epochs,
        "rate": rate,
        "rate_low_rank": restoring.rate_of_matrices,
        "text": text,
        "tokens": tokens,
        "seed": options.seed,
    }
    made = _all_kept(out, settings)
    if keys.keys() <= made.keys():
        return {number: made[number] for number in keys}
    train, left_out = _read_text(loaded, options, content)
    graph = loaded.problem.graph
    frozen = loaded.problem.frozen
    run = logits_of_base(graph)
    logits = jax.jit(run)
    targets = Outputs(logits, frozen.base, train)
    left_out_targets = Outputs(logits, frozen.base, left_out)
    with locked(out, "another --out"):
        made = _all_kept(out, settings)
        missing = [number for number in keys if number not in made]
        for number in progress("chips", missing):
            weights = program(graph, frozen, chips.rules(config), keys[number]).base
            weights = crossbar.calibrate_tree(run, weights, train)
            matrices = digital_matrices(loaded, weights)
            if low_rank:
                restoring = dataclasses.replace(
                    restoring, numbers=round(rank * crossbar.numbers_per_rank(matrices))
                )
            corrections = restore(
                run,
                weights,
                matrices,
                train,
                targets,
                restoring,
                left_out=(left_out, left_out_targets),
                counted=no_padding(loaded),
            )
            corrected = crossbar.with_corrections(weights, corrections)
            divergence_sums = np.zeros(2)
            for batch, target in zip(left_out, left_out_targets, strict=True):
                divergences = [
                    divergence_on(on_chip, batch, target, run)
                    for on_chip in (weights, corrected)
                ]
                divergence_sums += np.array(divergences) * batch.labels.size
            numbers = sum(correction.numbers() for correction in corrections.values())
            made[number] = {
                "chip": number,
                "settings": settings,
                "numbers": numbers,
                "share": numbers / sum(matrix.size for matrix in matrices),
                "tokens": _tokens(train),
                "divergence": (divergence_sums / _tokens(left_out)).tolist(),
            }
            tree = {}
            for chip in crossbar.chips_in(corrected):
                parts = vars(chip.correction) | {
                    "limits": chip.limits,
                    "input_limit": chip.input_limit,
                }
                tree[chip.name] = {
                    part: np.asarray(values)
                    for part, values in parts.items()
                    if values is not None
                }
            store.save(out / f"chip_{number}", _KIND, tree, made[number])
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
    identity = _identity(chips, base_sha256)
    titles = {
        "base_sha256": "base model",
        "config_sha256": "configuration or preparation",
        "key": "key",
        "digital": "digital weights",
    }
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
            raise FileError(
                chip_folder,
                got=f"computed with other settings than chip {numbers[0]}",
                fix="run `lorafusion restore` on all of them with another --out",
            )
        for field, title in titles.items():
            of_file = manifest["settings"].get(field)
            if of_file != identity[field]:
                raise ValueError(
                    f"{folder} corrects chips with another {title} ({_short(of_file)}, these have "
                    f"{_short(identity[field])}): run `lorafusion restore` on these chips"
                )
        trees.append(tree)
    _give_one_rank(trees)
    all_restored = []
    for tree in trees:
        corrections = {}
        ranges = {}
        for site, parts in jax.tree.map(jnp.asarray, tree).items():
            ranges[site] = {part: parts.pop(part) for part in _RANGES if part in parts}
            corrections[site] = crossbar.Correction(**parts)
        all_restored.append(Restored(corrections, ranges, str(folder)))
    return all_restored


def _check_parts(folder: Path, tree: dict[str, Any]) -> None:
    """Raise a FileError if the arrays of a chip are not the parts of corrections; their shapes are checked on it."""
    for site, parts in tree.items():
        sound = (
            isinstance(parts, dict)
            and parts.keys() <= {*_PARTS}
            and all(
                getattr(values, "dtype", None) == np.float32
                and not np.isnan(values).any()
                for values in parts.values()
            )
        )
        if sound and not parts.keys().isdisjoint({"U", "V"}):
            u = np.shape(parts.get("U", 0))
            v = np.shape(parts.get("V", 0))
            sound = len(u) > 1 and len(v) > 1 and (*u[:-2], u[-1]) == v[:-1]
        if not sound:
            raise FileError(
                folder,
                field=repr(site),
                got="other arrays",
                expected=f"float32 without NaN in {', '.join(_PARTS)}, and U [d_in, r] with V [r, d_out]",
                fix="run `lorafusion restore` again with another --out",
            )


def _give_one_rank(trees: Sequence[dict[str, dict[str, np.ndarray]]]) -> None:
    """Fill up matrices of low rank with zeros, so that those of all chips have one shape."""
    for site in trees[0]:
        low_rank_parts = [tree[site] for tree in trees if "U" in tree[site]]
        widest = max((parts["V"].shape[-2] for parts in low_rank_parts), default=0)
        for parts in low_rank_parts:
            padding = (0, widest - parts["V"].shape[-2])
            lead = [(0, 0)] * (parts["V"].ndim - 2)
            parts["U"] = np.pad(parts["U"], [*lead, (0, 0), padding])
            parts["V"] = np.pad(parts["V"], [*lead, padding, (0, 0)])


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
    drift = jax.tree_util.Partial(_drift_by_another_key, device.drift)
    return dataclasses.replace(config, device=dataclasses.replace(device, drift=drift))


def _drift_by_another_key(
    drift: Callable[..., Array], G: Array, key: Array, time: Any
) -> Array:
    return drift(G, jax.random.fold_in(key, 1), time)


def digital_matrices(
    loaded: LoadedModel, weights: Any
) -> list[Float[Array, "*N d_in d_out"]]:
    """Return the digital matrices of the chips in a tree of the base's weights."""
    base = matrices_of(nnx.merge(loaded.problem.graph, loaded.problem.frozen.base))
    return [dense(base[chip.name], jnp.float32) for chip in crossbar.chips_in(weights)]


def _identity(chips: Chips, base_sha256: str) -> dict[str, Any]:
    """Return what decides whether corrections belong to some chips: base, configuration, key and digital weights."""
    return {
        "base_sha256": base_sha256,
        "config_sha256": chips.sha256,
        "key": np.asarray(jax.random.key_data(chips.key)).tolist(),
        "digital": list(chips.digital),
    }


def _numbers(folder: Path) -> list[int]:
    names = (path.name.removeprefix("chip_") for path in folder.glob("chip_*"))
    return sorted(int(name) for name in names if name.isdecimal())


def _all_kept(out: Path, settings: dict[str, Any]) -> dict[int, Manifest]:
    """Return the metadata of a folder's corrections by chip; ValueError if one was computed from other settings."""
    made = {}
    for number in _numbers(out):
        folder = out / f"chip_{number}"
        manifest = store.read_manifest(folder, _KIND, Manifest)["metadata"]
        made[number] = manifest
        _check_number(folder, manifest, number)
        for name, value in settings.items():
            if (then := manifest["settings"].get(name)) != value:
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
    return sum(int(jnp.sum(batch.labels != IGNORED)) for batch in batches)


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
        ids = token_ids(loaded, content)[: options.tokens]
    else:
        ids = sampled(loaded, options.tokens or _SAMPLED, options.seed)
    if len(batches := windows(loaded, ids)) < 2:
        raise ValueError(
            f"the text has {len(ids)} tokens: give at least two windows of {WINDOW}, better {_SAMPLED:,}"
        )
    measured = max(1, len(batches) // _MEASURED)
    return batches[:-measured], batches[-measured:]


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
