"""Differential tests of the crossbar model: drawn configurations, every path against loops in NumPy.

A case is one drawn crossbar with a matrix and inputs, read by one path, and held against `crossbar_oracle` (or
refused by a clear ValueError). Each case's program is compiled once and runs on two matrices and batches of the
same shape, which count as one. Here the draws are the same in every run; `make fuzz-crossbar` draws others for an hour.
"""

import collections
import contextlib
import functools
import tempfile
import traceback
from dataclasses import replace
from typing import Any, NamedTuple

import crossbar_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from crossbar_strategies import build, dtype, inputs, reads, simplest, weights
from hypothesis import Phase, given, note, settings, strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    Correction,
    CrossbarConfig,
    calibrated,
    load_chip,
    matmul,
    probe,
    program,
    save_chip,
    with_corrections,
    with_read_key,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:adc.range='granular' with convert='sum'"
)

# How often each outcome was met: (property, path, outcome) -> cases.
TALLY = collections.Counter()
# What `fuzz_crossbar.py` runs: the functions and what they draw.
PROPERTIES = {}
# Matrices and batches that each program runs on.
DRAWS = 2

# XLA compiles these programs in three fifths of the time without; the fuzzer takes them out.
COMPILER = tiny.emitters(False)


def jit(fn):
    return jax.jit(fn, compiler_options=COMPILER)


class Case(NamedTuple):
    """A path, a crossbar with the choices that it is built from, the key of its chip, a matrix and inputs.

    `seen` are inputs to calibrate with.
    """

    path: str | None
    c: dict[str, Any]
    config: CrossbarConfig
    key: jax.Array
    W: np.ndarray
    x: np.ndarray
    seen: np.ndarray


def case_of(path, c, number=0):
    arrays = weights(c, number), inputs(c, number), inputs(c, number + DRAWS)
    return Case(path, c, build(c), jax.random.key(c["seed"]), *arrays)


def cases(count, **drawn):
    """Make a property a test of two draws and a nightly one of `count`, the same in every run; and one to be fuzzed."""

    def decorate(check):
        name = check.__name__.removeprefix("test_")

        def one(case, **more):
            path, c = case
            note(repr(build(c)))
            with jax.enable_x64(c["float64"]), refusals() as refused:
                check(case_of(path, c), **more)
            TALLY[
                name, path or "chosen", "refused" if refused else "within tolerance"
            ] += 1

        PROPERTIES[name] = one, drawn

        @pytest.mark.parametrize(
            "examples", [2, pytest.param(count, marks=pytest.mark.nightly)]
        )
        def test(examples):
            TALLY.clear()
            settings(max_examples=examples, phases=[Phase.generate])(
                given(**drawn)(one)
            )()
            # A property says nothing about what a path refuses.
            refused = sum(
                number
                for (*_, outcome), number in TALLY.items()
                if outcome == "refused"
            )
            assert refused <= 0.75 * TALLY.total() + 1, (
                f"{refused} of {TALLY.total()} cases are refused"
            )

        test.__doc__ = check.__doc__
        return test

    return decorate


@contextlib.contextmanager
def refusals():
    """Yield a list that gets the ValueError of a block if the package itself raised it, with words of its own."""
    refused = []
    try:
        yield refused
    except ValueError as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if "lorafusion_jax/crossbar" not in last.filename or len(str(error)) < 30:
            raise
        refused.append(error)


def arrays_of(*arrays):
    return [jnp.asarray(array) for array in arrays]


def compiled(case):
    """Return (W, x, seen) -> y, statistics of x, state, with ranges calibrated on `seen` where they come from data."""
    config = case.config
    of_read = jax.random.fold_in(case.key, 1) if config.reads_at_random else None

    @jit
    def run(W, x, seen):
        state = settled(program(W, config, case.key, path=case.path), seen, of_read)
        keyed = with_read_key(state, of_read)
        return *(probe(x, keyed) if ranges(config) else (matmul(x, keyed), None)), state

    return run


def ranges(config):
    """Return how many ranges come from data: first that of the inputs, then that of the sums."""
    of_inputs = config.dac is not None and config.dac.scaling == "calibrated"
    return of_inputs + (config.adc is not None and config.adc.range == "calibrated")


def settled(state, seen, key):
    """Return the state with its ranges from data."""
    for _ in range(ranges(state.config)):
        state = calibrated(state, probe(seen, with_read_key(state, key))[1])
    return state


def drawn_codes(case):
    """Return what random rounding makes of voltages: an identity matrix, read with the same key, shows the codes."""
    dac = case.config.dac
    if dac is None or dac.rounding == "nearest":
        return None
    top = oracle.input_top(case.config)
    plain = CrossbarConfig(
        cell=crossbar.Cell(bits=None),
        mapping=crossbar.Mapping(weight_bits=None),
        tile=crossbar.Tile(rows=None, cols=None),
        dac=replace(dac, scaling="fixed", limit=1.0),
    )
    key = jax.random.fold_in(case.key, 1)
    read = jit(
        lambda v: matmul(
            v, with_read_key(program(jnp.eye(v.shape[1], dtype=v.dtype), plain), key)
        )
    )

    def drawn(voltages):
        codes = np.rint(top * np.asarray(read(jnp.asarray(voltages)), float))
        exact = np.clip(voltages.astype(float), -1 if dac.signed else 0, 1) * top
        assert (np.abs(codes - exact) < 1 + 1e-5).all(), (
            f"{voltages} as {codes} of {top}"
        )
        return codes

    return drawn


def assert_within(found, wanted, case, what):
    eps = 3e-6 if dtype(case.c) == np.float32 else 1e-12
    if case.config.tile.wire is not None:
        eps = max(eps, 20 * case.config.tile.wire.tolerance)
    error = np.abs(np.asarray(found, float) - wanted.y)
    allowed = (
        wanted.slack * (1 + 1e-6)
        + eps * np.max(wanted.magnitude, axis=0, keepdims=True)
        + 1e-30
    )
    if not (error <= allowed).all():
        at = np.unravel_index(
            np.argmax(np.where(np.isnan(error), np.inf, error) / allowed), error.shape
        )
        raise AssertionError(
            f"{what}: {np.asarray(found)[at]} where the loops give {wanted.y[at]} within {allowed[at]:.3g} "
            f"(output {tuple(map(int, at))}, {np.mean(~(error <= allowed)):.0%} of all)"
        )


def chip_of(state):
    """Return what is random about a chip as it was programmed, from a state of the path `definition`."""

    def array(leaf):
        return None if leaf is None else np.asarray(leaf, float)

    scale = np.broadcast_to(
        np.asarray(state.scale, float), (state.cells.shape[2], state.shape[1])
    )
    flipped = None if state.flipped is None else np.asarray(state.flipped)
    return oracle.Chip(
        np.asarray(state.cells, float),
        flipped,
        scale,
        array(state.gain),
        array(state.offset),
    )


def programmed_chip(case):
    """Return the chip of a case: read back where it is random."""
    config = case.config
    adc = case.config.adc
    if is_perfect(config) and (
        adc is None or adc.gain_error is adc.offset_error is None
    ):
        return oracle.program(case.W, config)
    return chip_of(
        jit(lambda W: program(W, config, case.key, path="definition"))(
            jnp.asarray(case.W)
        )
    )


def is_perfect(config):
    device = config.device
    return not (
        device.programming or device.stuck or (device.drift and device.time is not None)
    )


def same_bits(case):
    """Whether every path must give the same bits: all sums are integers, shifted by powers of two and scaled once."""
    config = case.config
    d_in, d_out = case.W.shape
    if not oracle.integer_sums(config) or config.mapping.scale == "tile":
        return False
    if config.encoding.kind == "offset" and isinstance(
        getattr(config.adc, "bits", 8), tuple
    ):
        return False  # means of sums that are left out
    if config.encoding.kind == "offset" and (
        config.encoding.flip or not config.encoding.unit_column
    ):
        return False
    if config.adc is not None and config.adc.range in ("max", "given"):
        rows, _ = oracle.grid((d_in, d_out), config)
        lsb = oracle.lsbs(config, rows, None)
        shifts = np.log2(lsb / lsb[0, 0])
        if (np.abs(shifts - np.rint(shifts)) > 1e-12).any():
            return False
    largest = sum(
        w * t for w, t in zip(oracle.worths(config), oracle.tops(config), strict=True)
    )
    return largest * oracle.input_top(config) * d_in * 2 < (
        2**24 if dtype(case.c) == np.float32 else 2**53
    )


def limits_of(state):
    return None if state.limits is None else np.asarray(state.limits, float)


# What a converter may do at every read, besides noise.
AT_READ = {
    "scaling": st.sampled_from(["row", "fixed", "row", "fixed", "calibrated"]),
    "rounding": st.sampled_from(["nearest", "nearest", "nearest", "stochastic"]),
}


@cases(
    34,
    case=reads(None, "product", "loop", "lookup", "packed", **AT_READ),
)
def test_every_path_reads_what_the_loops_say(case):
    """Cells, ranges and products of `definition` and of one more path; NaN and infinite inputs on the way."""
    assert_paths([case.path], case.c)


def assert_paths(paths, c):
    """Hold the definition and some paths against the loops.

    Raises:
      ValueError: a path refuses the configuration.
    """
    draws = [case_of("definition", c, number) for number in range(DRAWS)]
    drawn = drawn_codes(draws[0])
    with refusals() as refused:
        run = compiled(draws[0])
        first = [assert_defined(case, run, drawn) for case in draws]
    assert not refused, refused
    exact = same_bits(draws[0])
    config = draws[0].config
    for path in paths:
        run = compiled(draws[0]._replace(path=path))
        for number, (case, (chip, y, limits)) in enumerate(
            zip(draws, first, strict=True)
        ):
            found, statistics, state = run(*arrays_of(case.W, case.x, case.seen))
            what = f"{path or 'chosen ' + state.plan.path}, draw {number}"
            own = limits_of(state)
            if oracle.integer_sums(config) and limits is not None:
                assert_allclose(own, limits, rtol=1e-6, err_msg=f"ADC limits of {what}")
            wanted = oracle.read(
                chip, case.x, config, own, input_limit=state.input_limit, drawn=drawn
            )
            assert_within(found, wanted, case, what)
            if exact:
                assert_array_equal(found, y, what)
            assert_clipped(statistics, wanted, what)
            assert_not_finite(run, case, found, state.input_limit, what)


_TILED = {"d_in": 12, "rows": 6, "d_out": 4}
# Steps of 6 levels.
_TIES = {**_TILED, "encoding": "offset", "cells": (4, 4), "adc_bits": 4}
_FLIPPED = {**_TILED, "encoding": "flip", "weights": "positive", "cells": (1, 1, 1)}
_BY_ROW = {**_TILED, "adc": "given by row", "signed": True, "rows": 5}
_CLIPPED = {**_TILED, "adc": "given", "clip": 0.2, "signed": True}
_LARGEST = {"weights": "extreme", "inputs": "full", "cells": (2, 2, 2, 2), "bits": 8}
_TALL = {**_LARGEST, "adc": "given", "clip": 0.2, "d_out": 70, "batch": 6}
_LIMITED = {**_TILED, "nonlinear": "current", "signed": True}
_WIRED = {**_TILED, "nonlinear": "wire", "signed": True, "rows": 5}
_NONLINEAR = {"nonlinear": "iv and wire", "slice_bits": None, "signed": True}
_RANDOM = {**_TILED, "rounding": "stochastic", "scaling": "calibrated"}
_UNIT_GAINS = {**_TILED, "encoding": "unit column", "ratio": 10.0, "gain": 0.05}
_TABLE = {"table": True, "adc_bits": 6, "bits": 4, "cells": (2, 1)}
_GMIN = {**_TILED, **_TABLE, "encoding": "offset", "ratio": 2.5}
_FLOAT64 = {**_TILED, "float64": True, "inputs": "beyond", "scaling": "fixed"}
_REAL = {"cells": None, "bits": None, "encoding": "unit column", "adc": None}
_SPARSE = {"weights": "sparse", "weight_quantile": 0.5, "scale": "column", "adc": None}
_WORDS = {**_TALL, "d_in": 600, "rows": 300}
_CONVERTING = ["loop", "lookup", "packed"]
# Paths and choices of crossbars that few draws have. The first run in every test, the others take long to compile.
CORNERS = {
    "ties at MAX": (_CONVERTING, _TIES),
    "ties of calibrated steps": ([None], {**_TIES, "adc": "calibrated"}),
    "ranges by row": (_CONVERTING, {**_BY_ROW, "cells": (2, 2), "partition": "full"}),
    "Gmin and a digital offset": (["loop"], _GMIN),
    "bits of pairs of slices": (["lookup", "packed"], {**_TILED, **_TABLE}),
    "two-sided pairs": (["loop"], {**_TILED, "encoding": "two-sided", "signed": True}),
    "gains and offsets": ([], {**_TILED, "gain": 0.05, "offset": 0.1, "signed": True}),
    "flipped columns": ([None], _FLIPPED),
    "clipped conversions": (["loop"], _CLIPPED),
    "currents limited on either side": ([], _LIMITED),
    "wires": ([], {**_WIRED, "partition": "full"}),
    "a quantile that is zero": (["product"], _SPARSE),
    "rounding at random": ([], _RANDOM),
    "one conversion for all pulses": (
        ["loop"],
        {**_TILED, "convert": "sum", "bits": 5},
    ),
    "real cells and inputs": (["product"], _REAL),
    "float64": (["lookup"], _FLOAT64),
}
LONG = {
    "tall arrays": (["lookup"], {**_TALL, "d_in": 80, "rows": 40, "whole": True}),
    "more inputs and columns than a block": (
        ["lookup"],
        {**_TILED, "batch": 260, "d_out": 520},
    ),
    "words of packed slices that are full": (["packed"], _WORDS),
    "Gmin, a unit column, gains": (["lookup"], _UNIT_GAINS),
    "flipped columns, Gmin, calibrated": (
        [None],
        {**_FLIPPED, **_TABLE, "ratio": 10.0, "adc": "calibrated"},
    ),
    "nonlinear cells and wires": ([], _NONLINEAR),
}


@pytest.mark.parametrize(
    "name", [*CORNERS, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)]
)
def test_corners_are_read_as_the_loops_say(name):
    paths, changes = {**CORNERS, **LONG}[name]
    with jax.enable_x64("float64" in changes):
        assert_paths(paths, simplest(**changes))


def assert_defined(case, run, drawn):
    """Hold the definition against the loops; return its chip, its product and its ADC's limits."""
    config = case.config
    what = "definition"
    y, statistics, state = run(*arrays_of(case.W, case.x, case.seen))
    chip = chip_of(state)
    limits = limits_of(state)
    input_limit = state.input_limit
    if is_perfect(config):
        assert_same_cells(chip, oracle.program(case.W, config), config)
    wanted = oracle.read(
        chip, case.x, config, limits, input_limit=input_limit, drawn=drawn
    )
    assert_within(y, wanted, case, what)
    assert_clipped(statistics, wanted, what)
    if config.dac is not None and config.dac.scaling == "calibrated":
        reach = reach_of(case.seen, config.dac.quantile) or 2 ** (-1 / 64)
        assert (
            reach * (1 - 1e-5) <= input_limit <= reach * 2 ** (1 / 64) * (1 + 1e-5)
        ), f"{input_limit} covers {reach}"
    seen = oracle.read(
        chip, case.seen, config, limits, input_limit=input_limit, drawn=drawn
    )
    assert_range(seen, config, case.W.shape)
    assert_not_finite(run, case, y, input_limit, what)
    return chip, y, limits


def reach_of(values, quantile):
    """Return the quantile of the sizes of the values that are not zero, which have no part in ranges; 0 without any."""
    sizes = np.abs(values[values != 0])
    return (
        float(np.quantile(sizes, quantile, method="inverted_cdf"))
        if sizes.size
        else 0.0
    )


def assert_same_cells(found, wanted, config):
    exact = config.cell.bits is not None
    assert_allclose(
        found.cells,
        wanted.cells,
        rtol=0,
        atol=1e-12 if exact else 1e-6,
        err_msg="cells",
    )
    # A quantile is interpolated in float32.
    assert_allclose(found.scale, wanted.scale, rtol=2e-6, err_msg="scale")
    if wanted.flipped is not None:
        assert_array_equal(found.flipped, wanted.flipped, "flipped columns")


def assert_clipped(statistics, wanted, what):
    if statistics is None:
        return
    low, high = wanted.clipped.T
    count = np.asarray(statistics.clipped)
    assert (low <= count).all() and (count <= high).all(), (
        f"{what}: {count} clipped, by loops {low} to {high}"
    )
    assert statistics.clipped_inputs == wanted.clipped_inputs, what


def assert_range(seen, config, shape):
    """`max` clips no sum of perfect cells; calibrated steps are those with the least error, or cover the quantile."""
    adc = config.adc
    if adc is None or seen.lsb is None:
        return
    mismatched = adc.gain_error is not None or adc.offset_error is not None
    linear = config.device.iv is None and config.tile.wire is None
    if adc.range == "max" and is_perfect(config) and not mismatched and linear:
        assert not seen.clipped[:, 0].any(), (
            f"the range `max` clips {seen.clipped[:, 0]} of the conversions"
        )
    if adc.range != "calibrated":
        return
    bounds = max(oracle.grid(shape, config)[0]) * oracle.full_current(config)
    top = oracle.code_range(config)[1]
    sums = [np.abs(s) for s in seen.sums]
    if oracle.integer_sums(config):
        for k, (s, bound) in enumerate(zip(sums, bounds, strict=True)):
            steps = 2.0 ** np.arange(24)[:, None]
            errors = np.sum((steps * np.clip(np.rint(s / steps), 0, top) - s) ** 2, 1)
            error = errors[np.flatnonzero(steps == seen.lsb[0, k])[0]]
            if (
                bound < 4000
            ):  # beyond, the histogram has fewer bins than there are integers
                assert error <= errors.min() * (1 + 1e-4) + 1e-9, (
                    f"slice {k}: a step of {seen.lsb[0, k]}: {errors}"
                )
        return
    if any(s.max() > bound for s, bound in zip(sums, bounds, strict=True)):
        return
    reach = [reach_of(s, adc.quantile) for s in sums]
    reach = [
        one or max(reach) for one in reach
    ]  # a slice that met only zeros gets the range of the widest
    covered = seen.lsb[0] * top
    slack = bounds / 2000 + 1e-6
    assert (covered >= np.multiply(reach, 0.995) - slack).all(), (
        f"{covered} covers less than {reach}"
    )
    assert (covered <= 2.01 * np.add(reach, slack)).all(), (
        f"{covered} is more than twice {reach}"
    )
    powers = np.log2(covered / covered.max())
    assert_allclose(
        powers, np.rint(powers), atol=1e-3, err_msg="ranges are powers of two apart"
    )


def assert_not_finite(run, case, y, input_limit, what):
    """NaN makes the outputs of its row NaN and no others; a DAC with one range clips infinity, else it is like NaN."""
    config = case.config

    def replaced(value):
        changed = case.x.copy()
        changed[0, case.x.shape[1] // 2] = value
        return np.asarray(run(*arrays_of(case.W, changed, case.seen))[0])

    for value in (np.nan, np.inf):
        found = replaced(value)
        assert_array_equal(
            found[1:], np.asarray(y)[1:], f"{what}: rows beside one with {value}"
        )
        if np.isinf(value) and config.dac is not None and config.dac.scaling != "row":
            assert_array_equal(found, replaced(float(input_limit)), f"{what}: {value}")
        else:
            assert not np.isfinite(found[0]).any(), (
                f"{what}: {value} at the input gives {found[0]}"
            )


NOISE = {
    "noise": st.sampled_from(["proportional", "independent"]),
    "adc_bits": st.sampled_from([7, 4, 5, 8]),
    "table": st.just(False),
    "nonlinear": st.none(),
    "ratio": st.sampled_from([10.0, None, 2.5]),
    "batch": st.sampled_from([2, 1]),
    "float64": st.just(False),
    "adc": st.sampled_from(["max", "granular", "given"]),
}
# Noise of the conversions, alone or with that of the cells.
OF_ADC = {
    **NOISE,
    "noise": st.sampled_from([None, None, "proportional"]),
    "adc_noise": st.sampled_from([0.1, 0.5]),
    "adc": st.sampled_from(["max", "granular", "given", "calibrated"]),
    "scaling": AT_READ["scaling"],
}
# Integer cells, whose variances are not where Gmin counts.
PAIRS = {
    "encoding": st.just("differential"),
    "device": st.none(),
    "gain": st.none(),
    "separate": st.just(False),
    "cells": st.sampled_from([(2,), (2, 2), (3,)]),
    "bits": st.sampled_from([3, 4]),
}


@cases(
    15,
    case=reads("packed", **{**OF_ADC, **PAIRS})
    | reads("loop", None, **OF_ADC)
    | reads(
        "definition",
        **{
            **OF_ADC,
            "noise": None,
            "nonlinear": st.sampled_from([None, "current", "iv"]),
        },
    )
    | reads("packed", **{**NOISE, **PAIRS})
    | reads("loop", **NOISE)
    | reads("product", **{**NOISE, "adc": None})
    | reads("definition", **{**NOISE, "nonlinear": st.sampled_from([None, "iv"])})
    | reads("definition", **{**NOISE, "noise": "clipped", "adc": None}),
)
def test_noise_has_the_mean_and_variance_of_its_conversions(case):
    """Those of normal sums after rounding and clipping, exactly, over 5,000 reads with keys of their own.

    The noise is that of cells, that of ADCs, or both.
    """
    y, limits, input_limit = many_reads(case)
    wanted = oracle.read(
        programmed_chip(case), case.x, case.config, limits, input_limit=input_limit
    )
    assert_moments(y, wanted, case)


def many_reads(case):
    """Return 5,000 reads of one chip [n, B, d_out] with keys of their own, its ADCs' limits and its DAC's."""

    @jit
    def run(W, x, seen):
        state = settled(
            program(W, case.config, case.key, path=case.path), seen, case.key
        )
        y = jax.vmap(lambda key: matmul(x, with_read_key(state, key)))(
            jax.random.split(case.key, 5000)
        )
        return y, state.limits, state.input_limit

    y, limits, input_limit = run(*arrays_of(case.W, case.x, case.seen))
    return np.asarray(y, float), limits, input_limit


ROUNDING = {
    "rounding": "stochastic",
    "scaling": AT_READ["scaling"],
    "bits": st.sampled_from([3, 2, 4, 5]),
    "adc": None,
    "nonlinear": None,
    "float64": False,
}


@cases(6, case=reads("product", "definition", **ROUNDING))
def test_stochastic_rounding_of_inputs_is_right_on_average(case):
    """Without an ADC, over 5,000 reads: the mean loses nothing to rounding, and each input has variance f (1 - f)."""
    y, _, input_limit = many_reads(case)
    chip = programmed_chip(case)
    x = case.x
    config = case.config
    full = oracle.full_scale(x, config, input_limit).astype(float)
    real = oracle.weights(chip, len(case.W), config)
    top = oracle.input_top(config)
    low = -1 if config.dac.signed else 0
    codes = np.clip(x / full, low, 1) * top
    share = codes - np.floor(codes)
    by = full / top
    nearest = replace(config, dac=replace(config.dac, rounding="nearest"))
    plain = oracle.read(chip, x, nearest, input_limit=input_limit)
    wanted = plain._replace(
        y=codes @ real * by, variance=(share * (1 - share)) @ real**2 * by**2
    )
    assert_moments(y, wanted, case)


def assert_moments(y, wanted, case):
    """Compare draws [n, B, d_out] with means and variances, within 5.5 and 6 standard errors."""
    n = len(y)
    error = y - wanted.y
    rounding = wanted.slack + 1e-5 * wanted.magnitude + 1e-30
    rare = (
        4 * np.abs(error).max(0) / n
    )  # one draw too many of a code that is seldom met
    allowed = 5.5 * np.sqrt(wanted.variance / n) + rare + rounding
    bias = np.abs(error.mean(0))
    assert (bias <= allowed).all(), f"means are off by {bias}, allowed {allowed}"
    square = np.sum(error**2, axis=2)
    expected = np.sum(wanted.variance, axis=1)
    allowed = (
        6 * square.std(0) / np.sqrt(n)
        + 4 * square.max(0) / n
        + 0.01 * expected
        + np.sum(rounding**2, axis=1)
    )
    if (
        case.config.adc is not None
    ):  # 10 draws of a code, about a step apart, that is so rare that none may have it
        step = wanted.magnitude / 2 ** (case.config.adc.bits - 1)
        allowed = allowed + np.minimum(expected, 10 / n * np.sum(step**2, axis=1))
    found = square.mean(0)
    assert (np.abs(found - expected) <= allowed).all(), (
        f"variances {found}, expected {expected} +- {allowed}"
    )


# What transformations and replaced values make of a read


def directions(case):
    """Return the weights of the outputs in the sum whose gradient is taken."""
    return np.random.default_rng(case.c["seed"]).normal(
        size=(len(case.x), case.W.shape[1])
    )


@cases(
    16,
    case=reads(
        "loop",
        "lookup",
        "definition",
        float64=True,
        adc=st.sampled_from(["max", "granular", "given"]),
    )
    | reads("product", float64=True),
    negative=st.booleans(),
)
def test_gradients_are_those_of_the_programmed_weights(case, negative):
    """dx = dy W', dW = x' dy, with W' as programmed and x' as the DAC clips it, which also stops dx."""
    config = case.config
    C = directions(case)
    case = case._replace(x=inputs({**case.c, "signed": case.c["signed"] or negative}))

    def loss(W, x):
        y = matmul(x, program(W, config, case.key, path=case.path))
        return jnp.sum(C * y), y

    (d_W, d_x), y = jit(jax.grad(loss, (0, 1), has_aux=True))(
        *arrays_of(case.W, case.x)
    )
    chip = programmed_chip(case)
    if config.adc is None or config.adc.range != "max" or not config.encoding.flip:
        assert_within(y, oracle.read(chip, case.x, config), case, "clipped")
    most = (
        config.dac.limit
        if config.dac is not None and config.dac.scaling == "fixed"
        else np.inf
    )
    clipped = np.clip(
        case.x, 0 if config.dac is not None and not config.dac.signed else -most, most
    )
    for name, found, wanted in (
        (
            "dx",
            d_x,
            np.where(
                clipped == case.x, C @ oracle.weights(chip, len(case.W), config).T, 0
            ),
        ),
        ("dW", d_W, clipped.T @ C),
    ):
        assert_allclose(
            found,
            wanted,
            rtol=0,
            atol=1e-9 * np.abs(wanted).max() + 1e-12,
            err_msg=name,
        )


GIVEN = {
    "table": st.just(False),
    "adc": st.sampled_from(["given", "given by row"]),
    "nonlinear": st.none(),
    "float64": st.just(True),
}


@cases(
    8,
    case=reads(
        "loop",
        "lookup",
        "packed",
        "definition",
        adc=st.sampled_from(["max", "granular", "given"]),
    )
    | reads("product"),
    parts=st.sets(st.sampled_from(["scale", "offset", "low rank"]), min_size=1),
)
def test_a_corrected_chip_reads_what_numpy_corrects(case, parts):
    """y = s * read(x) + o + x U V of the loops' read, from a chip that was saved and loaded."""
    d_in, d_out = case.W.shape
    rng = np.random.default_rng(case.c["seed"])
    shapes = {"scale": d_out, "offset": d_out, "U": (d_in, 2), "V": (2, d_out)}
    drawn = {
        part: rng.normal(size=shape).astype(case.W.dtype)
        for part, shape in shapes.items()
    }
    given = [
        part
        for part in drawn
        if part in parts or (part in "UV" and "low rank" in parts)
    ]
    chip = jit(lambda W: program(W, case.config, case.key, path=case.path))(
        jnp.asarray(case.W)
    )
    corrections = {
        chip.name: Correction(**{part: jnp.asarray(drawn[part]) for part in given})
    }
    with tempfile.TemporaryDirectory() as folder:
        save_chip(with_corrections(chip, corrections), f"{folder}/chip.safetensors")
        loaded = load_chip(f"{folder}/chip.safetensors", case.config)
    s = drawn["scale"] if "scale" in given else np.float64(1)
    o = drawn["offset"] if "offset" in given else np.float64(0)
    U = drawn["U"] if "U" in given else np.float64(0)
    V = drawn["V"] if "V" in given else np.float64(0)
    low_rank = (
        (case.x @ U @ V, np.abs(case.x) @ np.abs(U) @ np.abs(V))
        if "U" in given
        else (0, 0)
    )
    plain = oracle.read(programmed_chip(case), case.x, case.config, limits_of(loaded))
    magnitude = np.abs(s) * plain.magnitude + np.abs(o) + low_rank[1]
    wanted = plain._replace(
        y=s * plain.y + o + low_rank[0],
        slack=np.abs(s) * plain.slack,
        magnitude=magnitude,
    )
    assert_within(jit(matmul)(jnp.asarray(case.x), loaded), wanted, case, "corrected")


@cases(
    7,
    case=reads(
        "loop",
        "definition",
        "lookup",
        "packed",
        **GIVEN,
        whole=False,
    )
    | reads(
        None, **GIVEN, whole=False, device=None, gain=None, offset=None, ratio=None
    ),
    in_state=st.booleans(),
)
def test_adc_limits_are_read_and_learned_wherever_they_are_given(case, in_state):
    """Other limits than those programmed with, in the state or the configuration.

    The read is that of the new limits; its gradient is that of clipping in the loops.
    """
    new = build({**case.c, "seed": case.c["seed"] + 1})
    # Where it can be, the range before is one that loses nothing, whose plan is one product.
    lossless = in_state and case.path is None and oracle.integer_sums(new)
    bits = 14 if lossless else max(new.adc.bits, 4 + case.c["seed"] % 10)
    before = replace(
        new.adc, range="granular" if lossless else "max", limits=None, bits=bits
    )
    old = replace(new, adc=before)
    new = replace(new, adc=replace(new.adc, bits=bits))
    case, C = case._replace(config=new), directions(case)
    limits = np.asarray(new.adc.limits)

    def read(limits, W, x):
        if in_state:
            state = program(W, old, case.key, path=case.path)
            state = replace(state, limits=limits if limits.ndim == 3 else limits[None])
        else:
            config = replace(new, adc=replace(new.adc, limits=limits))
            state = program(W, config, case.key, path=case.path)
        return matmul(x, state)

    def loss(limits, W, x):
        y = read(limits, W, x)
        return jnp.sum(C * y), y

    traced = arrays_of(limits, case.W, case.x)
    gradient, y = jit(jax.grad(loss, has_aux=True))(*traced)
    if (
        lossless and np.isnan(y).all()
    ):  # what a trace can do about limits that one product cannot have
        read(*traced)
    chip = programmed_chip(case)
    assert_within(y, oracle.read(chip, case.x, new), case, "other limits")

    def smooth(tops):
        moved = np.stack([limits[..., 0], tops], -1).tolist()
        config = replace(new, adc=replace(new.adc, limits=moved))
        return float(np.sum(C * oracle.read(chip, case.x, config, rounds=False).y))

    wanted = np.zeros(limits.shape[:-1])
    step = 1e-6
    tops = limits[..., 1]
    for at in np.ndindex(wanted.shape):
        move = np.zeros(wanted.shape)
        move[at] = step
        wanted[at] = (smooth(tops + move) - smooth(tops - move)) / (2 * step)
    found = np.asarray(gradient).sum(-1)
    assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max() + 1e-8)


def _wire(v):
    return crossbar.Wire(row_resistance=v, column_resistance=v, tolerance=1e-6)


def _limits(v, of):
    return (
        np.asarray(of.limits) * v
        if isinstance(v, float)
        else jnp.asarray(of.limits, v.dtype) * v
    )


# By name: values that are swept, the part of the configuration that holds them, and its fields of a value and the part.
SWEPT = {
    "ratio": ([2.5, 8.0, 50.0], "cell", lambda v, of: {"on_off_ratio": v}),
    "programming": (
        [0.05, 0.1, 0.3],
        "device",
        lambda v, of: {"programming": crossbar.Proportional(v)},
    ),
    "time": (
        [2.0, 100.0, 1e4],
        "device",
        lambda v, of: {"drift": crossbar.PowerLaw(0.1, 0.02), "time": v},
    ),
    "offset": ([0.0, 0.05, 0.5], "adc", lambda v, of: {"offset_error": v}),
    "gain": ([0.0, 0.02, 0.2], "adc", lambda v, of: {"gain_error": v}),
    "limits": ([0.5, 0.9, 1.3], "adc", lambda v, of: {"limits": _limits(v, of)}),
    "current": ([0.3, 0.9, 2.0], "tile", lambda v, of: {"current_limit": v}),
    "wire": ([0.0, 0.01, 0.03], "tile", lambda v, of: {"wire": _wire(v)}),
    "limit": ([0.4, 0.8, 1.5], "dac", lambda v, of: {"scaling": "fixed", "limit": v}),
}


@cases(
    14,
    case=reads(
        "loop",
        "definition",
        None,
        "lookup",
        adc=st.sampled_from(["max", "given", None]),
        device=st.sampled_from([None, "independent"]),
    ),
    leaf=st.sampled_from([*SWEPT]),
)
def test_a_sweep_is_a_loop(case, leaf):
    """vmap over one value of the configuration, jitted, against the loops at the first and the last value."""
    part = getattr(case.config, SWEPT[leaf][1])
    if part is None or leaf == "limits" and part.limits is None:
        leaf = "ratio"
        part = case.config.cell
    values, name, fields = SWEPT[leaf]

    def changed(value):
        return replace(case.config, **{name: replace(part, **fields(value, part))})

    def read(value, W, x):
        return matmul(x, program(W, changed(value), case.key, path=case.path))

    y = jit(jax.vmap(read, (0, None, None)))(
        jnp.asarray(values, dtype(case.c)), *arrays_of(case.W, case.x)
    )
    for at in (0, -1):
        one = case._replace(config=changed(values[at]))
        limits = None
        if (
            one.config.encoding.flip
            and one.config.adc is not None
            and one.config.adc.range == "max"
        ):
            programmed = jit(
                functools.partial(
                    program, config=one.config, key=one.key, path="definition"
                )
            )
            state = programmed(jnp.asarray(case.W))
            limits = limits_of(state)
        wanted = oracle.read(programmed_chip(one), case.x, one.config, limits)
        assert_within(y[at], wanted, one, f"{leaf} = {values[at]}")


def _drifts(*values):
    return {"drift": crossbar.PowerLaw(*values), "time": 30.0}


# By name: where the slope is taken, and the device with that value.
_DEVICES = {
    "sigma": (0.1, lambda v: {"programming": crossbar.Independent(v)}),
    "scale": (
        1.0,
        lambda v: {
            "programming": replace(crossbar.RERAM_WAN_2022, scale=v),
            "time": 30.0,
        },
    ),
    "ratio": (5.0, lambda v: {"programming": crossbar.Independent(0.1)}),
    "time": (30.0, lambda v: {"drift": crossbar.PowerLaw(0.1, 0.02), "time": v}),
    "exponent": (
        -0.0155,
        lambda v: _drifts(crossbar.LogLinear(0.05, v, 0.0, 1.0), 0.02),
    ),
    "spread": (0.02, lambda v: _drifts(0.1, v)),
    "start": (3.0, lambda v: _drifts(0.1, 0.02, v)),
    "flicker": (0.01, lambda v: _drifts(0.1, 0.02, 3.0, crossbar.Flicker(v))),
    "relaxation": (
        0.02,
        lambda v: {"drift": crossbar.Relaxation(-v / 2, v, v / 2), "time": 30.0},
    ),
    "read noise": (
        0.1,
        lambda v: {"read_noise": crossbar.ReadNoise(v, "proportional")},
    ),
    "limit": (0.55, lambda v: {}),
}


@cases(
    8,
    case=reads(
        "product",
        "definition",
        adc=None,
        float64=True,
        nonlinear=None,
        device=None,
        weights="normal",
    ),
    leaf=st.sampled_from([*_DEVICES]),
)
def test_gradients_of_physical_values_are_slopes(case, leaf):
    """Finite differences of the reparameterised draws; a DAC's limit has LSQ's, by the loops' weights; or refused.

    What moves the cells passes straight through rounded inputs, as the weights do: theirs are not rounded here.
    """
    c = case.c
    if leaf == "limit":
        c = {**c, "scaling": "fixed", "bits": c["bits"] or 4}
    elif leaf != "read noise":
        c = {**c, "bits": None}
    _, _, base, key, W, x, _ = case_of(case.path, c)
    at, device = _DEVICES[leaf]
    C = directions(case)

    def loss(value, W, x):
        config = replace(base, device=crossbar.Device(**device(value)))
        if leaf == "ratio":
            config = replace(config, cell=replace(config.cell, on_off_ratio=value))
        if leaf == "limit":
            config = replace(config, dac=replace(config.dac, limit=value))
        state = program(W, config, key, path=case.path)
        return jnp.sum(C * matmul(x, with_read_key(state, jax.random.fold_in(key, 1))))

    y, slope = jit(jax.value_and_grad(loss))(jnp.asarray(at), *arrays_of(W, x))
    if leaf == "limit":
        low = -at if base.dac.signed else 0.0
        d_x = C @ oracle.weights(oracle.program(W, base), len(W), base).T
        top = 2.0**base.dac.magnitude_bits - 1
        rounded = np.clip(np.rint(x / at * top) / top, low / at, 1)
        wanted = np.sum(d_x * (rounded - np.where((x >= low) & (x <= at), x / at, 0)))
    else:
        run = jit(loss)
        ends = [
            run(jnp.asarray(at * f), *arrays_of(W, x)) for f in (1 - 1e-6, 1 + 1e-6)
        ]
        wanted = (ends[1] - ends[0]) / (2e-6 * at)
    size = abs(float(y) / at) + np.abs(C).sum() * np.abs(W).max()
    assert_allclose(slope, wanted, rtol=1e-4, atol=1e-6 * size, err_msg=leaf)
