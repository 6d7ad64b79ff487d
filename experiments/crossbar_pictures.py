"""The pictures of docs/concepts/crossbar_pictures.md, and their numbers: python experiments/crossbar_pictures.py

Weights and inputs are standard normal, the error is |y - x W| / |x W| over a batch, every seed is fixed. Five
minutes on two busy cores.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import _script
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    Cell,
    CrossbarConfig,
    Device,
    Independent,
    PowerLaw,
    Proportional,
    ReadNoise,
    input_codes,
    pulses,
)
from lorafusion_jax.report import plot

BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
GREY = "#777777"
CHIPS = 8
CELL = Cell(bits=(2, 2, 2, 2))
# 8-bit weights in four 2-bit slices, 8-bit inputs, 8-bit ADC, calibrated
BASE = CrossbarConfig(cell=CELL, adc=ADC())


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/crossbar_pictures"))
    out = parser.parse_args(arguments).out
    for name, size, draw in (
        ("tile", (11.0, 7.2), tile),
        ("adc", (6.4, 4.2), adc),
        ("noise", (9.6, 7.2), noise),
    ):
        plot(out / f"crossbar_{name}.png", size, draw)
        print(f"{out}/crossbar_{name}.png", flush=True)


def tile(figure: Any) -> None:
    """One 12 x 10 matrix: its codes, its slices in the positive and the negative array, one input, its conversions."""
    weights = _normal(0, (12, 10))
    config = CrossbarConfig(cell=CELL, adc=ADC(bits=6, range="granular"))
    state = crossbar.program(weights, config, path="definition")
    x = _normal(1, (1, 12))
    codes = input_codes(x, jnp.max(jnp.abs(x)), state.geometry, config)
    sent = np.asarray(pulses(codes[0], state.geometry))  # [J, rows]
    cells = np.asarray(state.cells)[:, :, 0, 0]  # [K, P, rows, cols]
    sums = np.einsum("jr,kpro,p->kjo", sent, cells, [1, -1])

    axes = figure.subplots(3, 5, width_ratios=[1.15, 1, 1, 1, 1])
    _heat(axes[0, 0], np.asarray(state.codes), "RdBu", 127, "weight codes q")
    _heat(axes[1, 0], sent.T, "PuOr", 1, "one input, bit by bit")
    axes[0, 0].set_ylabel("row")
    axes[1, 0].set(ylabel="row", xlabel="input slice 0 to 6")
    top = int(np.abs(sums).max())
    for k in range(4):
        _heat(
            axes[0, 1 + k],
            cells[k, 0],
            "Blues",
            3,
            f"weight slice {k}, worth {4**k}",
            low=0,
        )
        _heat(axes[1, 1 + k], cells[k, 1], "Reds", 3, "", low=0)
        _heat(axes[2, 1 + k], sums[k], "PRGn", top, "")
        axes[2, 1 + k].set_xlabel("column")
    for row, label in enumerate(
        (
            "positive array",
            "negative array",
            "column sums to the ADC\n(input slice 0 to 6)",
        )
    ):
        axes[row, 1].set_ylabel(label)
    error = float(
        jnp.linalg.norm(crossbar.matmul(x, state) - x @ weights)
        / jnp.linalg.norm(x @ weights)
    )
    text = "codes are shifted and added\nover input slices j and\nweight slices k:\n\n"
    text += "$\\sum_{k,j}\\, 4^k\\, 2^j\\, code_{k,j}$"
    axes[2, 0].axis("off")
    axes[2, 0].text(
        0.5, 0.5, text, ha="center", va="center", transform=axes[2, 0].transAxes
    )
    print(f"tile: error {error:.4f}, largest |sum| {top}")


def adc(figure: Any) -> None:
    """Error against ADC bits, for the three ways to choose its range."""
    bits = list(range(4, 12))
    axis = figure.subplots()
    ranges: list[tuple[Literal["max", "granular", "calibrated"], str, str]] = [
        ("max", ORANGE, "s"),
        ("granular", GREEN, "^"),
        ("calibrated", BLUE, "o"),
    ]
    for range_, colour, marker in ranges:
        errors = [
            _error(dataclasses.replace(BASE, adc=ADC(bits=b, range=range_)))
            for b in bits
        ]
        _say(f"adc {range_}", bits, errors)
        axis.semilogy(bits, errors, marker=marker, color=colour, label=range_)
    floor = _error(dataclasses.replace(BASE, adc=None))
    _say("adc none", ["-"], [floor])
    axis.axhline(floor, color=GREY, linestyle=":", linewidth=1.2)
    axis.text(
        4,
        floor * 0.94,
        "no ADC: 8-bit weights and inputs",
        color=GREY,
        va="top",
        fontsize=9,
    )
    axis.set(
        xlabel="bits of the ADC",
        ylabel="relative error of x W",
        xticks=bits,
        ylim=(floor * 0.75, 1.1),
    )
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(title="range")


def noise(figure: Any) -> None:
    """Error against programming error, read noise, time and wire resistance."""
    axes = figure.subplots(2, 2)
    percent = np.array([0, 0.5, 1, 2, 3, 5, 7.5, 10])
    sigmas = jnp.asarray(percent / 100, jnp.float32)
    for kind, model, colour in (
        ("of Gmax", Independent, BLUE),
        ("of the cell's G", Proportional, ORANGE),
    ):
        errors = _chips(lambda s, m=model: Device(programming=m(s)), sigmas)
        _curve(axes[0, 0], f"programming, {kind}", percent, errors, colour, kind)
    axes[0, 0].set(title="programming error", xlabel="standard deviation, %")
    relative = functools.partial(ReadNoise, kind="proportional")
    for kind, model, colour in (
        ("of Gmax", ReadNoise, BLUE),
        ("of the cell's G", relative, ORANGE),
    ):
        errors = _chips(lambda s, m=model: Device(read_noise=m(s)), sigmas)
        _curve(axes[0, 1], f"read, {kind}", percent, errors, colour, kind)
    axes[0, 1].set(title="read noise", xlabel="standard deviation, %")
    seconds = jnp.array([1.0, 60.0, 3600.0, 86_400.0, 604_800.0, 2.6e6, 3.15e7])
    drift = PowerLaw(exponent=0.05, spread=0.01)
    for kind, compensate, colour in (
        ("as it is", False, ORANGE),
        ("compensated", True, BLUE),
    ):
        errors = _chips(
            lambda t, c=compensate: Device(drift=drift, time=t, compensate=c), seconds
        )
        _curve(axes[1, 0], f"drift, {kind}", np.asarray(seconds), errors, colour, kind)
    axes[1, 0].set(
        title="drift, exponent 0.05 ± 0.01",
        xlabel="time since programming",
        xscale="log",
    )
    axes[1, 0].set_xticks(
        [1, 60, 3600, 86_400, 2.6e6, 3.15e7],
        ["1 s", "min", "hour", "day", "month", "year"],
    )
    axes[1, 0].minorticks_off()
    ratios = jnp.array([0.0, 1e-6, 1e-5, 3e-5, 1e-4, 3e-4])
    for rows, colour in ((32, GREEN), (64, BLUE), (128, ORANGE)):
        errors = _wires(rows, ratios)
        _curve(
            axes[1, 1],
            f"wires, {rows} rows",
            100 * np.asarray(ratios),
            errors[:, None],
            colour,
            f"{rows} x {rows}",
        )
    axes[1, 1].set(title="IR drop", xlabel="wire resistance of a cell, % of Rmin")
    for axis in axes.flat:
        axis.set_ylabel("relative error of x W")
        axis.set_ylim(bottom=0)
        axis.legend()


def _chips(device: Callable[[Array], Device], values: Array) -> np.ndarray:
    """Return the errors [values, chips] of chips whose ADCs are calibrated on the batch, without read noise."""
    weights = _normal(0, (512, 128))
    x = _normal(1, (64, 512))
    exact = jnp.dot(x, weights, precision="highest")

    @jax.jit
    def error(value: Array, key: Array) -> Array:
        config = dataclasses.replace(BASE, device=device(value))
        quiet = dataclasses.replace(
            config, device=dataclasses.replace(config.device, read_noise=None)
        )
        chip = crossbar.program(weights, quiet, key)
        limits = crossbar.calibrated(chip, crossbar.probe(x, chip)[1]).limits
        chip = dataclasses.replace(
            crossbar.program(weights, config, key), limits=limits
        )
        y = crossbar.matmul(x, crossbar.with_read_key(chip, jax.random.fold_in(key, 0)))
        return jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)

    keys = jax.random.split(jax.random.key(2), CHIPS)
    return np.asarray(
        jax.lax.map(lambda v: jax.lax.map(lambda k: error(v, k), keys), values)
    )


def _wires(rows: int, ratios: Array) -> np.ndarray:
    """Return the errors of one matrix on arrays of rows x rows, without an ADC, for wires of each resistance."""
    weights = _normal(0, (128, 128))
    x = _normal(1, (4, 128))
    exact = jnp.dot(x, weights, precision="highest")

    @jax.jit
    def error(ratio: Array) -> Array:
        wire = crossbar.Wire(row_resistance=ratio, column_resistance=ratio)
        config = CrossbarConfig(
            cell=CELL, tile=crossbar.Tile(rows=rows, cols=rows, wire=wire)
        )
        y = crossbar.matmul(x, crossbar.program(weights, config))
        return jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)

    return np.stack([error(ratio) for ratio in ratios])


def _error(config: CrossbarConfig) -> float:
    weights = _normal(0, (512, 128))
    x = _normal(1, (64, 512))
    state = crossbar.program(weights, config)
    state = crossbar.calibrated(state, crossbar.probe(x, state)[1])
    exact = jnp.dot(x, weights, precision="highest")
    return float(
        jnp.linalg.norm(crossbar.matmul(x, state) - exact) / jnp.linalg.norm(exact)
    )


def _normal(seed: int, shape: tuple[int, ...]) -> Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _heat(
    axis: Any,
    values: np.ndarray,
    colours: str,
    top: int,
    title: str,
    *,
    low: int | None = None,
) -> None:
    low = -top if low is None else low
    image = axis.imshow(
        values, cmap=colours, vmin=low, vmax=top, aspect="auto", interpolation="nearest"
    )
    axis.set_title(title, fontsize=10)
    axis.set(xticks=[], yticks=[])
    bar = axis.figure.colorbar(
        image, ax=axis, fraction=0.05, pad=0.03, ticks=sorted({low, 0, top})
    )
    bar.ax.tick_params(labelsize=8)


def _curve(
    axis: Any, what: str, at: np.ndarray, errors: np.ndarray, colour: str, label: str
) -> None:
    """Draw the median over chips and the band from the best to the worst."""
    median = np.median(errors, axis=1)
    _say(what, at, median)
    axis.plot(at, median, color=colour, marker="o", markersize=3.5, label=label)
    axis.fill_between(
        at, errors.min(axis=1), errors.max(axis=1), color=colour, alpha=0.2, linewidth=0
    )


def _say(
    what: str, at: Sequence[Any] | np.ndarray, errors: Sequence[float] | np.ndarray
) -> None:
    print(
        f"{what}: " + ", ".join(f"{a} {e:.4f}" for a, e in zip(at, errors, strict=True))
    )


if __name__ == "__main__":
    _script.run(main)
