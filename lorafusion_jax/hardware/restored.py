"""Corrections of chips on disk, and `lorafusion restore`, which computes them from text.

FOLDER/manifest.json         digests of the base and the configuration, key, ages, numbers, divergences
FOLDER/arrays.safetensors    chip_N/SITE/scale and so on, and the converters' ranges that they belong to
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ..checks import at_least, check_uint32
from ..crossbar import Correction, calibrate_tree, chips_in, config_hash, numbers_per_rank, place, with_corrections
from ..io import arrays
from ..io.folders import read_manifest
from ..models.architecture import Model, matrices
from ..models.generate import Sampling, generate
from ..models.weights import dense
from ..progress import progress
from ..runs.options import FuseOptions
from ..runs.prepare import LoadedModel, digests, load_model
from ..tasks import IGNORED, Batch, Example, encode, eval_batches
from .calibration import looped
from .folder import Chips, aged, load_chips
from .program import Restored, program
from .restore import Method, Restoring, divergence, restore

_WHAT = "a folder of corrections"
_RANGES = ("limits", "input_limit")
# Most tokens of a row of text; a last share of the rows is left out of the training, to measure on.
WINDOW, _MEASURED = 128, 8
# Tokens that a causal model samples by default; lines in a batch of another model, and most tokens of its answers.
_SAMPLED, _LINES, _ANSWER = 3072, 16, 32


class Manifest(TypedDict):
    """Metadata of a folder of corrections; `divergence` has nats per token on text that was not used, by chip."""

    base_sha256: str
    config_sha256: str
    key: list[int]
    digital: list[str]
    age: str | None
    chips: list[int]
    method: Method
    numbers: int
    share: float
    epochs: int
    tokens: int
    text: str
    seed: int
    divergence: dict[str, list[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreOptions:
    """Compute digital corrections that bring a base model on simulated chips back, from unlabelled text.

    No cell is written. `lorafusion fuse`, `evaluate` and `lm-eval` use the corrections with --restore.

    Examples:
      lorafusion restore --base base --crossbar chips/noisy --chip 0 1 --text page.txt
      lorafusion restore --base base --crossbar noisy.yaml --self-text 3072 --method low-rank --rank 3 --out restored

    Attributes:
      base: the base model, as in `lorafusion fuse`.
      crossbar: a folder that `lorafusion crossbar program` wrote, a preset, or a .yaml or .json file.
      chip: numbers of the chips.
      text: text files; a causal model reads windows of 128 tokens, another one each line.
      self_text: use so many tokens that a causal model samples itself, digitally, instead of text; by default
        3,072 without --text.
      tokens: a causal model uses the first so many tokens of the text; by default all.
      method: a factor of each column (`scales`), an offset too (`offsets`), factors and matrices of low rank
        (`low-rank`), or these matrices alone (`lora`).
      rank: mean rank of the matrices of `low-rank` and `lora`.
      epochs: passes of distillation over the text; 0 for the closed form alone.
      rate: learning rate of factors and offsets.
      rate_low_rank: learning rate of the matrices.
      seed: seed of the order of the text, and of sampled text.
      age: age of the chips: seconds, or as in 1h, 1day, 1month, 1year.
      keep_digital: patterns of weights that stay digital; a folder has its own.
      chip_key: key from which the chips of a preset or file are drawn; a folder has its own.
      out: folder to write, which must not exist; by default `restored-METHOD` in the folder of the chips.
    """

    base: str
    crossbar: str
    chip: tuple[int, ...] = (0,)
    text: tuple[Path, ...] = ()
    self_text: int | None = None
    tokens: int | None = None
    method: Method = "scales"
    rank: float = 4.0
    epochs: int = Restoring.epochs
    rate: float = Restoring.rate
    rate_low_rank: float = Restoring.rate_low_rank
    seed: int = 0
    age: str | None = None
    keep_digital: tuple[str, ...] = ()
    chip_key: int = 0
    out: Path | None = None


def restore_chips(options: RestoreOptions) -> Manifest:
    """Write the corrections of some chips to a folder, and return its metadata.

    Raises:
      ValueError: before anything is programmed: the folder exists, the text is shorter than a window, or a base, chips
        or a number cannot be used.
    """
    at_least(1, tokens=options.tokens, self_text=options.self_text)
    check_uint32(seed=options.seed)
    low_rank = options.method in ("low-rank", "lora")
    same = {name: getattr(options, name) for name in ("method", "epochs", "rate", "rate_low_rank", "seed")}
    # Refuses what cannot work before the model is loaded.
    how = Restoring(**same, numbers=int(low_rank and options.rank > 0))
    chips = load_chips(options.crossbar, key=options.chip_key, digital=options.keep_digital)
    config, keys = aged(chips.config, options.age), [chips.chip_key(number) for number in options.chip]
    out = options.out or Path(options.crossbar) / f"restored-{options.method}"
    if options.out is None and chips.manifest is None:
        raise ValueError(f"{options.crossbar} is no folder of chips to put corrections into: give a folder with --out")
    if out.exists():
        raise ValueError(f"{out} exists: give another --out; corrections are never overwritten")
    if options.text and options.self_text:
        raise ValueError("text comes from --text or from --self-text: leave out one of them")
    fuse = FuseOptions(base=options.base, task="", method="zero-shot")
    loaded = load_model(fuse)
    chips.check(loaded, fuse)
    batches, text = _read_text(loaded, options)
    setup = looped(loaded)
    graph, digital = setup.problem.graph, setup.problem.frozen
    run = logits_of_base(graph)
    logits = jax.jit(run)
    targets = [logits(digital.base, batch) for batch in batches]
    measured = max(1, len(batches) // _MEASURED) if len(batches) > 1 else 0
    train = slice(None, len(batches) - measured)
    found, before_and_after = {}, {}
    numbers = total = 0
    with progress("chips", len(keys)) as bar:
        for number, key in zip(options.chip, keys, strict=True):
            chip = program(graph, digital, chips.rules(config), key)
            weights = calibrate_tree(run, chip.base, batches[train])
            held = digital_matrices(setup, weights)
            if low_rank:
                how = dataclasses.replace(how, numbers=round(options.rank * numbers_per_rank(chips_in(weights))))
            corrections = restore(run, weights, held, batches[train], targets[train], how)
            pairs = list(zip(batches, targets, strict=True))[len(batches) - measured :] or [(batches[0], targets[0])]
            before_and_after[str(number)] = [
                float(np.mean([divergence(logits(tree, batch), target) for batch, target in pairs]))
                for tree in (weights, with_corrections(weights, corrections))
            ]
            numbers = sum(correction.numbers() for correction in corrections.values())
            total = sum(matrix.size for matrix in held)
            found[f"chip_{number}"] = _to_save(weights, corrections)
            bar.update()
    manifest: Manifest = {
        "base_sha256": digests(loaded, fuse)["base"],
        "config_sha256": config_hash(chips.config),
        "key": np.asarray(jax.random.key_data(chips.key)).tolist(),
        "digital": list(chips.digital),
        "age": options.age,
        "chips": list(options.chip),
        "method": options.method,
        "numbers": numbers,
        "share": numbers / total,
        "epochs": options.epochs,
        "tokens": sum(int(np.sum(np.asarray(batch.labels) != IGNORED)) for batch in batches[train]),
        "text": text,
        "seed": options.seed,
        "divergence": before_and_after,
    }
    _of_one_rank(found)
    arrays.save(out, found, manifest)
    return manifest


def load_restored(name: str, chips: Chips, number: int, base_sha256: str) -> Restored:
    """Return the corrections of a chip.

    Args:
      name: folder that `lorafusion restore` wrote, or its name in the folder of the chips.
      chips: the chips that they are for.
      number: number of the chip.
      base_sha256: digest of the base model.

    Raises:
      ValueError: the corrections are of another base, of other chips, or of other numbers of these.
    """
    inside = Path(chips.name) / name
    folder = inside if inside.is_dir() else Path(name)
    tree, manifest = arrays.load(folder, metadata=Manifest, what=_WHAT)
    now = {
        "base_sha256": base_sha256,
        "config_sha256": config_hash(chips.config),
        "key": np.asarray(jax.random.key_data(chips.key)).tolist(),
        "digital": list(chips.digital),
    }
    names = {"base_sha256": "base model", "config_sha256": "configuration", "key": "key", "digital": "digital weights"}
    for field, what in names.items():
        if manifest[field] != now[field]:
            raise ValueError(
                f"{folder} corrects chips with another {what} ({_short(manifest[field])}, these have "
                f"{_short(now[field])}): run `lorafusion restore` on these chips"
            )
    if number not in manifest["chips"]:
        there = ", ".join(map(str, manifest["chips"]))
        raise ValueError(f"{folder} corrects the chips {there}, not chip {number}: run `lorafusion restore` on it too")
    corrections, ranges = {}, {}
    for site, parts in tree[f"chip_{number}"].items():
        values = {part: jnp.asarray(value) for part, value in parts.items()}
        ranges[site] = {part: values.pop(part) for part in _RANGES if part in values}
        corrections[site] = Correction(**values)
    return Restored(corrections, ranges)


def read_corrections(folder: Path) -> Manifest:
    """Return the metadata of a folder of corrections."""
    return read_manifest(folder, Manifest, _WHAT)[1]


@functools.lru_cache  # the same function again: it is compiled once for each
def logits_of_base(graph: nnx.GraphDef) -> Callable[[nnx.State, Batch], Float[Array, "B T V"]]:
    """Return the base model as a function of its weights and a batch; logits of positions without a label are 0."""

    def run(base: nnx.State, batch: Batch) -> Float[Array, "B T V"]:
        model: Model = nnx.merge(graph, base)
        logits = model.label_logits(batch.input_ids, batch.input_mask, batch.labels, {})
        return jnp.where((batch.labels != IGNORED)[..., None], logits, 0)

    return run


def digital_matrices(loaded: LoadedModel, weights: Any) -> list[Float[Array, "*N d_in d_out"]]:
    """Return the digital matrices of the chips in a tree of the base's weights."""
    base = matrices(nnx.merge(loaded.problem.graph, loaded.problem.frozen.base))
    found = []
    for chip in chips_in(weights):
        matrix = dense(base[chip.name], jnp.float32)
        found.append(matrix[chip.first : chip.first + len(chip.codes)] if matrix.ndim > 2 else matrix)
    return found


def windows(ids: Sequence[int], width: int) -> list[Batch]:
    """Return text in rows of `width` tokens, a batch each, that predict all tokens but their first."""
    rows = jnp.array(ids[: len(ids) // width * width], jnp.int32).reshape(-1, 1, width)
    first, alone = jnp.ones((1, 1), bool), jnp.ones(1, bool)
    return [Batch(row[:, :1], first, row[:, 1:], alone) for row in rows]


def sampled(loaded: LoadedModel, tokens: int, seed: int) -> list[int]:
    """Return text that a causal model samples from itself at temperature 1, from its end-of-text token on.

    Rows have `WINDOW` tokens, and each begins with that token.
    """
    rows = -(-tokens // WINDOW)
    end = loaded.config.end_ids[0]
    keys = jax.random.split(jax.random.key(seed), rows)
    model, start = nnx.merge(loaded.problem.graph, loaded.problem.frozen.base), jnp.full((rows, 1), end, jnp.int32)
    new = jax.jit(
        functools.partial(generate, max_new_tokens=WINDOW - 1, sampling=Sampling(temperature=1.0)),
    )(model, start, jnp.ones_like(start, bool), row_keys=keys)
    return np.concatenate([start, np.asarray(new)], axis=1).reshape(-1).tolist()


def answered(loaded: LoadedModel, lines: Sequence[str]) -> list[Batch]:
    """Return lines of text as sources, in batches; targets are the digital model's answers."""
    model, tokenizer = nnx.merge(loaded.problem.graph, loaded.problem.frozen.base), loaded.tokenizer
    answer = jax.jit(functools.partial(generate, max_new_tokens=_ANSWER))
    encoded = encode(tokenizer, [Example(line, "") for line in lines], loaded.text_format)
    found = []
    for numbers, batch in eval_batches(encoded, _LINES, pad_id=tokenizer.pad_token_id):
        tokens = answer(model, batch.input_ids, batch.input_mask)
        ended = jnp.cumsum(jnp.isin(tokens, jnp.array(loaded.config.end_ids)), axis=1)
        behind = (jnp.pad(ended, [(0, 0), (1, 0)])[:, :-1] > 0) | (numbers < 0)[:, None]
        found.append(batch._replace(labels=jnp.where(behind, IGNORED, tokens)))
    return [jax.tree.map(jnp.asarray, batch) for batch in found]


def _read_text(loaded: LoadedModel, options: RestoreOptions) -> tuple[list[Batch], str]:
    """Return the text in batches, and its name: the digest of the files, or `sampled`."""
    content = "\n".join(path.read_text(encoding="utf-8") for path in options.text)
    digest = hashlib.sha256(content.encode()).hexdigest()
    if not loaded.config.causal:
        lines = [line for line in content.splitlines() if line.strip()]
        if not lines or options.self_text or options.tokens:
            raise ValueError(
                f"{options.base} is not causal: give lines of text that it reads with --text, without --self-text and "
                "--tokens"
            )
        return answered(loaded, lines), digest
    if not options.text:
        return windows(sampled(loaded, options.self_text or _SAMPLED, options.seed), WINDOW), "sampled"
    ids = loaded.tokenizer(content, add_special_tokens=False)["input_ids"][: options.tokens]
    if len(ids) < WINDOW:
        raise ValueError(f"the text has {len(ids)} tokens: give at least one window of {WINDOW}, better {_SAMPLED:,}")
    return windows(ids, WINDOW), digest


def _to_save(weights: Any, corrections: dict[str, Correction]) -> dict[str, dict[str, np.ndarray]]:
    """Return the arrays of one chip by site and part."""
    found = {}
    for chip in chips_in(weights):
        parts = vars(corrections[place(chip)]) | {name: getattr(chip, name) for name in _RANGES}
        found[place(chip)] = {name: np.asarray(value) for name, value in parts.items() if value is not None}
    return found


def _of_one_rank(of_chips: dict[str, dict[str, dict[str, np.ndarray]]]) -> None:
    """Fill up matrices of low rank with zeros, so that those of all chips have one shape."""
    for site in next(iter(of_chips.values())):
        parts = [sites[site] for sites in of_chips.values() if "U" in sites[site]]
        widest = max((part["V"].shape[-2] for part in parts), default=0)
        for part in parts:
            more = (0, widest - part["V"].shape[-2])
            lead = [(0, 0)] * (part["V"].ndim - 2)
            part["U"], part["V"] = np.pad(part["U"], [*lead, (0, 0), more]), np.pad(part["V"], [*lead, more, (0, 0)])


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
