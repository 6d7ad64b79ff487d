"""Perplexity of SmolLM2 on simulated arrays: against the bits of the ADC, for chips with programming errors.

    python experiments/language_on_arrays.py                                             # what is missing
    python experiments/language_on_arrays.py --bits 8 6 --errors 0 0.01 --tokens 1024 --out runs/arrays-quick

All seven projections of every layer are in the arrays of examples/smollm2/chip.yaml; embedding, tied head, norms and
attention are digital. ADC ranges are calibrated on text that is not measured, for each error on its own chip. Written
to OUT: a line of rows.jsonl for each setting, perplexity.csv, loss.csv (above the digital model's) and perplexity.png.
Interrupted, the same command continues with the next setting.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import _script
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Float, Int
from lab.common import ROOT, write_csv
from lab.smollm2 import EXAMPLES, base

from lorafusion_jax import LoadOptions
from lorafusion_jax.crossbar import (
    Cell,
    CrossbarConfig,
    Independent,
    calibrate_tree,
    chips_in,
    config_hash,
    load_config,
)
from lorafusion_jax.hardware import program_on_arrays
from lorafusion_jax.loading import LoadedModel, load_model
from lorafusion_jax.report import as_markdown as markdown
from lorafusion_jax.report import colour, plot
from lorafusion_jax.runs import environment
from lorafusion_jax.training import log_likelihood
from lorafusion_jax.trials import ResultRows, Row

TEXTS = EXAMPLES / "text"
CALIBRATION = "calibration.txt"
WINDOW = 128
BATCH = 8

Bits = int | Literal["ideal"]


class Setting(NamedTuple):
    """What a row is measured on: bits of the ADC and the programming error; None for the digital model."""

    bits: Bits | None
    error: float | None

    def __str__(self) -> str:
        if self.error is None:
            return "digital"
        return f"{self.bits if self.bits == 'ideal' else f'{self.bits}-bit'} ADC, error {100 * self.error:g} %"


DIGITAL = Setting(None, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      bits: of the ADC, in the order in which they are measured; `ideal` converts exactly.
      errors: standard deviations of the programming error, as shares of Gmax.
      tokens: measure on the first windows of 128 tokens that hold so many; by default on all.
      calibration_tokens: that the ADCs' ranges are calibrated on.
      chip_key: key from which the chip is drawn.
      out: folder of results; settings that have a row there are not measured again.
    """

    bits: tuple[Bits, ...] = ("ideal", 8, 6, 7, 5, 10, 4, 9)
    errors: tuple[float, ...] = (0.0, 0.01, 0.03, 0.05, 0.1)
    tokens: int | None = None
    calibration_tokens: int = 256
    chip_key: int = 0
    out: Path = ROOT / "runs" / "language_on_arrays"


class Text(NamedTuple):
    """Tokens to measure on, in windows that are each read from their own beginning; to calibrate on; and a digest."""

    windows: Int[np.ndarray, "N T"]
    calibration: Int[np.ndarray, "1 T"]
    sha256: str


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    loaded = load_model(LoadOptions(base=str(base()), method="zero-shot"))
    text = load_text(loaded.tokenizer, options)
    common = {
        "tokens": text.windows[:, 1:].size,
        "calibration_tokens": text.calibration.size,
        "chip_key": options.chip_key,
        "text_sha256": text.sha256,
    }
    cells = ResultRows(options.out / "rows.jsonl", setting_of, common)
    settings = [
        Setting(bits, error) for error in options.errors for bits in options.bits
    ]

    def show(row: Row) -> str:
        return f"{setting_of(row)}: perplexity {np.exp(row['loss']):.2f} in {row['cpu_seconds']:.0f} CPU seconds"

    def write() -> None:
        rows = cells.rows()
        for name, lines in tables(rows).items():
            write_csv(options.out / f"{name}.csv", lines)
        draw(rows, options.out / "perplexity.png")

    cells.fill(
        [DIGITAL, *settings],
        lambda missing: measured(loaded, text, missing, options.chip_key),
        show,
        write,
    )
    print(
        "\n".join(
            [*map(markdown, tables(cells.rows()).values()), f"written to {options.out}"]
        )
    )


def load_text(tokenizer: Any, options: Options) -> Text:
    """Read the texts of examples/smollm2/text.

    Raises:
      ValueError: there is not enough text.
    """
    files = sorted(TEXTS.glob("*.txt"))
    texts = {file.name: file.read_text() for file in files}
    calibration = tokenizer(texts.pop(CALIBRATION), add_special_tokens=False)[
        "input_ids"
    ]
    ids = tokenizer("\n".join(texts.values()), add_special_tokens=False)["input_ids"]
    count = (
        len(ids) // WINDOW if options.tokens is None else -(-options.tokens // WINDOW)
    )
    for name, asked, there in (
        ("tokens", count * WINDOW, len(ids)),
        ("calibration-tokens", options.calibration_tokens, len(calibration)),
    ):
        if not 0 < asked <= there:
            raise ValueError(
                f"--{name} is {asked} tokens, and {TEXTS} has {there}: give 1 to {there}"
            )
    return Text(
        np.array(ids[: count * WINDOW], np.int32).reshape(count, WINDOW),
        np.array([calibration[: options.calibration_tokens]], np.int32),
        hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
    )


def measured(
    loaded: LoadedModel, text: Text, settings: Sequence[Setting], chip_key: int
) -> Iterator[Row]:
    """Yield a row for each setting."""
    graph = loaded.problem.graph
    frozen = loaded.problem.frozen
    key = jax.random.fold_in(jax.random.key(chip_key), 0)

    def logits(weights: nnx.State, ids: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        return nnx.merge(graph, weights)(ids, jnp.ones_like(ids, bool))

    @jax.jit
    def losses(weights: nnx.State, ids: Int[Array, "B T"]) -> Float[Array, " B"]:
        return -log_likelihood(logits(weights, ids)[:, :-1], ids[:, 1:])

    for setting in settings:
        began = time.process_time()
        weights = frozen.base
        arrays = {}
        if setting != DIGITAL:
            config = config_of(setting, jnp.float32)
            weights = program_on_arrays(graph, frozen, {"*": config}, key).base
            weights = calibrate_tree(logits, weights, [jnp.asarray(text.calibration)])
            arrays = {
                "config_sha256": config_hash(config),
                "paths": sorted({c.plan.path for c in chips_in(weights)}),
            }
        batches = [
            text.windows[first : first + BATCH]
            for first in range(0, len(text.windows), BATCH)
        ]
        found = np.concatenate(
            [np.asarray(losses(weights, batch), float) for batch in batches]
        )
        yield {
            "bits": setting.bits,
            "error": setting.error,
            **arrays,
            "loss": found.sum() / text.windows[:, 1:].size,
            "window_losses": (found / (WINDOW - 1)).tolist(),
            "cpu_seconds": time.process_time() - began,
            **environment(),
        }
        del weights
        jax.clear_caches()  # other bits are other programs


def config_of(
    setting: Setting, number: Callable[[float], Any] = float
) -> CrossbarConfig:
    """Return the arrays of a setting; `number` makes its error a JAX array where settings are to share a program."""
    config = load_config(EXAMPLES / "chip.yaml")
    assert config.adc is not None
    adc = (
        None
        if setting.bits == "ideal"
        else dataclasses.replace(config.adc, bits=setting.bits)
    )
    programming = Independent(number(setting.error)) if setting.error else None
    return dataclasses.replace(
        config,
        cell=Cell(bits=(2, 2, 2, 2)),  # as in the rows
        adc=adc,
        device=dataclasses.replace(config.device, programming=programming),
    )


def setting_of(row: Row) -> Setting:
    """Return the setting of a row."""
    return Setting(row["bits"], row["error"])


def tables(rows: Sequence[Row]) -> dict[str, list[list[str]]]:
    """Return tables of errors by bits of the ADC, by name: perplexities, and losses above the digital model's.

    Losses are in nats per token, ± standard error over windows.
    """
    by_setting = {setting_of(row): row for row in rows}
    digital = by_setting[DIGITAL]
    errors, bits = axes(rows)

    def cells(said: Any) -> list[list[str]]:
        found = [[by_setting.get(Setting(b, error)) for b in bits] for error in errors]
        head = [
            "programming error, % of Gmax",
            *(b if b == "ideal" else f"{b} bits" for b in bits),
        ]
        lines = zip(errors, found, strict=True)
        return [
            head,
            *(
                [f"{100 * e:g}", *("-" if row is None else said(row) for row in f)]
                for e, f in lines
            ),
        ]

    def above(row: Row) -> str:
        differences = np.subtract(row["window_losses"], digital["window_losses"])
        spread = (
            differences.std(ddof=1) / np.sqrt(len(differences))
            if len(differences) > 1
            else np.nan
        )
        return f"{differences.mean():.3f} ± {spread:.3f}"

    return {
        "perplexity": cells(lambda row: _perplexity(np.exp(row["loss"]))),
        "loss": cells(above),
    }


def axes(rows: Sequence[Row]) -> tuple[list[float], list[Bits]]:
    """Return the errors and the bits that rows have, in order."""
    on_arrays = [row for row in rows if setting_of(row) != DIGITAL]
    bits = sorted(
        {row["bits"] for row in on_arrays},
        key=lambda bits: np.inf if bits == "ideal" else bits,
    )
    return sorted({row["error"] for row in on_arrays}), bits


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw perplexity against the ADC's bits, a line for each error, and against the error, a line for each ADC."""
    errors, bits = axes(rows)
    found = {setting_of(row): np.exp(row["loss"]) for row in rows}
    of_bits = {
        "perfect cells" if error == 0 else f"error {100 * error:g} %": [
            found.get(Setting(b, error)) for b in bits
        ]
        for error in errors
    }
    of_errors = {
        "ideal ADC" if b == "ideal" else f"ADC of {b} bits": [
            found.get(Setting(b, error)) for error in errors
        ]
        for b in bits
    }

    def on(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        left.set_xticks(range(len(bits)), [str(b) for b in bits])
        left.set_xlabel("bits of the ADC")
        left.set_ylabel("perplexity")
        right.set_xticks(range(len(errors)), [f"{100 * error:g}" for error in errors])
        right.set_xlabel("programming error, % of Gmax")
        for panel, lines in ((left, of_bits), (right, of_errors)):
            for i, (label, values) in enumerate(lines.items()):
                places = [
                    place for place, value in enumerate(values) if value is not None
                ]
                if len(places) > 1:  # a single point is part of the other panel's lines
                    heights = [values[place] for place in places]
                    panel.plot(
                        places,
                        heights,
                        "o-",
                        markersize=4,
                        color=colour(i + 1),
                        label=label,
                    )
            panel.axhline(found[DIGITAL], linestyle=":", color="black", label="digital")
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:,.0f}")
            panel.legend()

    plot(path, (9.0, 4.0), on)


def _perplexity(value: float) -> str:
    if value < 1000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


if __name__ == "__main__":
    _script.run(main)
