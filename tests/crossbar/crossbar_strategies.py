"""Crossbars, weights and inputs as hypothesis draws them: plain choices, and what is built from them.

Choices are dictionaries of numbers, because the run-time type checks of the tests call `random`, which no strategy may.
Every list begins with the simplest choice, to which failures shrink. Arrays are tiny, since XLA's time for a program is
all that a case costs.
"""

import functools

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    Cell,
    CrossbarConfig,
    Device,
    Encoding,
    Mapping,
    ReadNoise,
    Tile,
    Wire,
)

ENCODINGS = {
    "differential": Encoding(),
    "two-sided": Encoding(two_sided=True),
    "offset": Encoding(kind="offset"),
    "unit column": Encoding(kind="offset", unit_column=True),
    "flip": Encoding(kind="offset", unit_column=True, flip=True),
}
CELLS = [
    (2,),
    (1,),
    (2, 2),
    (1, 1),
    (3,),
    (4,),
    (2, 1),
    (3, 3),
    (4, 4),
    (1, 1, 1),
    None,
]


# By name: all choices, the simplest first; repeated where they are wanted more often.
OPTIONS = {
    "encoding": tuple(ENCODINGS),
    "cells": CELLS,
    "spare": [0, 0, 1],  # weight bits less than the cells hold
    "ratio": [None, None, 10.0, 2.5, 100.0],
    "scale": ["matrix", "tile", "column"],
    "weight_quantile": [1.0, 1.0, 0.9, 0.5],
    "rows": [None, 3, 4, 5, 6],
    "cols": [None, 2, 3],
    "partition": ["equal", "full"],
    "bits": [3, 2, 4, 5, 8, None],
    "slice_bits": [1, None, 2, 3],
    "signed": [False, True],
    "scaling": ["row", "fixed"],
    "limit": [1.0, 0.6, 1.7],
    "input_quantile": [0.9995, 0.8],
    "rounding": ["nearest"],
    "adc": ["max", "granular", "given", "calibrated", "max", "given by row", None],
    "adc_bits": [5, 3, 4, 6, 8, 12],
    "table": [False, False, True],  # of bits, whose most is `adc_bits`
    "convert": ["slice", "slice", "sum"],
    "separate": [False, False, True],
    "gain": [None, None, None, 0.05],
    "offset": [None, None, None, None, None, 0.1],
    "clip": [0.5, 1.0, 0.2],  # of the largest sum, where ranges are given
    "whole": [False, True],  # whether given limits are simple fractions
    "nonlinear": [None] * 9 + ["current", "wire", "iv", "iv and wire"],
    "device": [
        None,
        None,
        None,
        "independent",
        "proportional",
        "stuck",
        "drift",
        "range",
    ],
    "noise": [None],
    "adc_noise": [None],
    "d_in": [4, 1, 2, 3, 5, 6, 7, 9, 10, 12],
    "d_out": [2, 1, 3, 4, 5, 8],
    "batch": [3, 1, 2, 4],
    "weights": ["normal", "sparse", "extreme", "zero", "positive", "tiny"],
    "inputs": ["uniform", "full", "sparse", "beyond"],
    "float64": [False, False, False, True],
    "seed": range(2**16),
}


def choices(**fixed):
    """Return choices of a crossbar and of a matrix for it; `fixed` replaces single ones, by values or strategies."""
    named = {name: st.sampled_from(values) for name, values in OPTIONS.items()}
    assert fixed.keys() <= named.keys(), fixed
    for name, value in fixed.items():
        named[name] = value if isinstance(value, st.SearchStrategy) else st.just(value)
    return st.fixed_dictionaries(named)


def simplest(**changes):
    """Return the simplest choices, some of them changed."""
    assert changes.keys() <= OPTIONS.keys(), changes
    return {name: values[0] for name, values in OPTIONS.items()} | changes


# What a path needs of a configuration, for the most part; what it refuses all the same counts as refused.
_CONVERTS = {
    "adc": st.sampled_from(["max", "granular", "given", "max", "calibrated"]),
    "encoding": st.sampled_from([name for name in ENCODINGS if name != "flip"]),
    "offset": st.none(),
    "nonlinear": st.none(),
}
_NARROW = {
    "bits": st.sampled_from([3, 2, 4, 5]),
    "slice_bits": st.sampled_from([1, 2]),
    "convert": st.just("slice"),
}
_INTEGERS = {
    "cells": st.sampled_from(CELLS[:-1]),
    "device": st.none(),
    "gain": st.none(),
    "ratio": st.none(),
}
SUITED = {
    None: {},
    "definition": {},
    "product": {
        "adc": st.sampled_from([None, None, None, "granular"]),
        "nonlinear": st.none(),
    },
    "loop": _CONVERTS,
    "lookup": _CONVERTS | _NARROW,
    "packed": _CONVERTS | _INTEGERS | {"bits": st.sampled_from([3, 2, 4, 5])},
}


def reads(*paths, **fixed):
    """Return one of some paths and choices that suit it; None is the path that programming chooses."""
    return st.sampled_from(paths).flatmap(
        lambda path: st.tuples(st.just(path), choices(**{**SUITED[path], **fixed}))
    )


def build(c):
    """Return the crossbar of some choices; those that do not go together give way to simpler ones."""
    encoding = ENCODINGS[c["encoding"]]
    cells = c["cells"]
    if cells is None and encoding.flip:
        cells = (2,)
    capacity = None if cells is None else sum(cells) + (encoding.kind == "differential")
    if capacity == 1:  # weights have a sign
        cells = (1, 1)
        capacity = 2
    weight_bits = None if capacity is None else max(2, capacity - c["spare"])
    slice_bits = c["slice_bits"]
    if c["bits"] is not None and slice_bits is not None:
        slice_bits = min(slice_bits, c["bits"] - c["signed"])
    dac = c["bits"] and DAC(
        bits=c["bits"],
        slice_bits=slice_bits,
        signed=c["signed"],
        scaling=c["scaling"],
        limit=c["limit"],
        quantile=c["input_quantile"],
        rounding=c["rounding"],
    )
    wire = None
    if c["nonlinear"] in ("wire", "iv and wire"):
        wire = Wire(row_resistance=0.01, column_resistance=0.02, tolerance=1e-6)
    limit = 0.7 if c["nonlinear"] == "current" else None
    tile = Tile(
        rows=c["rows"],
        cols=c["cols"],
        partition=c["partition"],
        wire=wire,
        current_limit=limit,
    )
    device = _device(c)
    ratio = c["ratio"]
    config = CrossbarConfig(
        cell=Cell(bits=cells, on_off_ratio=ratio),
        encoding=encoding,
        mapping=Mapping(
            weight_bits=weight_bits, scale=c["scale"], quantile=c["weight_quantile"]
        ),
        tile=tile,
        dac=dac,
        device=device,
    )
    return CrossbarConfig(**{**vars(config), "adc": _adc(c, config)})


def _device(c):
    parts = {
        None: {},
        "independent": {"programming": crossbar.Independent(0.1)},
        "proportional": {"programming": crossbar.Proportional(0.2)},
        "stuck": {"stuck": crossbar.StuckAt(low=0.2, high=0.1)},
        "drift": {"drift": crossbar.PowerLaw(0.1, 0.05), "time": 100.0},
        "range": {"programming": crossbar.Independent(0.2), "clip": "range"},
    }[c["device"]]
    if c["device"] == "drift" and ENCODINGS[c["encoding"]].kind == "differential":
        parts["compensate"] = c["seed"] % 2 == 0
    iv = crossbar.Sinh(0.4, 0.25) if c["nonlinear"] in ("iv", "iv and wire") else None
    # The oracle knows the distribution of clipped noise, but not what an ADC makes of its sum.
    clip = c["noise"] == "clipped"
    kind = "proportional" if c["noise"] == "proportional" else "independent"
    noise = (
        None
        if c["noise"] is None
        else ReadNoise(0.3, kind, clip=clip and c["adc"] is None)
    )
    return Device(**parts, iv=iv, read_noise=noise)


def _adc(c, config):
    kind = c["adc"]
    if kind is None:
        return None
    if kind == "granular" and (config.dac is None or config.cell.bits is None):
        kind = "max"
    separate = c["separate"] and config.encoding.kind == "differential"
    signed = (
        config.dac is None
        or config.dac.signed
        or (config.encoding.kind == "differential" and not separate)
    )
    bits = c["adc_bits"]
    rng = np.random.default_rng(c["seed"])
    if c["table"] and c["convert"] == "slice":
        pairs = (len(config.weight_slices), len(config.input_slices))
        table = rng.choice([0, *range(1 + signed, c["adc_bits"] + 1)], pairs)
        table[-1, -1] = c["adc_bits"]
        bits = tuple(map(tuple, table.tolist()))
    adc = functools.partial(
        ADC,
        bits=bits,
        convert=c["convert"],
        separate=separate,
        gain_error=c["gain"],
        offset_error=c["offset"],
        noise=c["adc_noise"],
    )
    if not kind.startswith("given"):
        return adc(range=kind)
    height = min(c["rows"] or c["d_in"], c["d_in"])
    slices = len(config.weight_slices)
    tiles = row_tiles(c, config)
    share = c["clip"] * height * rng.uniform(0.5, 1, (tiles, slices))
    tops = np.ceil(share * 8) / 8 if c["whole"] else share
    limits = tuple(
        tuple((-t if signed else 0.0, t) for t in row) for row in tops.tolist()
    )
    return adc(range="given", limits=limits if kind == "given by row" else limits[0])


def row_tiles(c, config):
    return 1 if config.tile.rows is None else -(-c["d_in"] // config.tile.rows)


def weights(c, number=0):
    """Return the matrix of some choices; `number` tells several of one kind apart."""
    rng = np.random.default_rng((c["seed"], number))
    shape = (c["d_in"], c["d_out"])
    W = rng.normal(size=shape)
    if c["weights"] == "sparse":
        W *= rng.random(shape) < 0.3
    elif c["weights"] == "extreme":
        W = np.where(rng.random(shape) < 0.5, -1.0, 1.0)
    elif c["weights"] == "zero":
        W[:] = 0
    elif c["weights"] == "positive":
        W = np.abs(W)
    elif c["weights"] == "tiny":
        W *= 1e-12
    return W.astype(dtype(c))


def inputs(c, number=0):
    """Return a batch of inputs, none of them negative where the DAC is unsigned."""
    rng = np.random.default_rng((c["seed"], number, 1))
    shape = (c["batch"], c["d_in"])
    x = rng.uniform(-1, 1, shape)
    if c["inputs"] == "sparse":
        x *= rng.random(shape) < 0.4
    elif c["inputs"] == "full":
        x = np.where(rng.random(shape) < 0.2, -1.0, 1.0)
    elif c["inputs"] == "beyond":
        x *= 3
    unsigned = c["bits"] is not None and not c["signed"]
    return (np.abs(x) if unsigned else x).astype(dtype(c))


def dtype(c):
    return np.float64 if c["float64"] else np.float32


def problem(d_in=30, d_out=9, batch=4, *, seed=0):
    """Return normal weights, and inputs that are spread evenly from -1 to 1."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(d_in, d_out))
    x = rng.uniform(-1, 1, (batch, d_in))
    return jnp.asarray(W, jnp.float32), jnp.asarray(x, jnp.float32)


def product(x, weight):
    """Return a digital product, or the read of a chip."""
    return (
        crossbar.matmul(x, weight) if isinstance(weight, crossbar.Chip) else x @ weight
    )


_TRUNCATING = crossbar.Architecture(
    energy=lambda bits, constants: constants["comparison_energy"] * bits,
    time=lambda bits, columns, constants: crossbar.Range.of(1e-9 * columns),
    transfer=lambda sums, lowest, highest: jnp.floor(sums),
    constants={
        "comparison_energy": crossbar.Constant("pJ", 1.0, 2.0, 3.0, "[A]", "made up")
    },
)
crossbar.register_adc("truncating", _TRUNCATING)


def single_slices(architecture, **adc):
    """Return a crossbar whose sums are small integers: one slice of weights and one of inputs."""
    return CrossbarConfig(
        cell=Cell(bits=(3,)),
        mapping=Mapping(weight_bits=4),
        tile=Tile(rows=6, cols=4),
        dac=DAC(bits=4, slice_bits=None, scaling="fixed"),
        adc=ADC(architecture=architecture, **{"bits": 5, "range": "max"} | adc),
    )
