"""What a crossbar computes, in NumPy and float64, loop by loop: the oracle of the differential tests.

Written from the equations of docs/concepts/crossbar.md. It shares the configuration classes with the package and
nothing else; the wires are solved by nodal analysis, ties at an ADC are decided in whole numbers, and noise enters as
the exact mean and variance of every conversion.

Axis letters: K weight slices, J input slices, P polarities (1 once subtracted), R row tiles, C column tiles, B batch.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtr

from lorafusion_jax.crossbar import CrossbarConfig


class Chip(NamedTuple):
    """A programmed matrix.

    Attributes:
      cells: [K, P, R, C, rows, cols] in level units, a unit column last; tiles with fewer rows use the bottom ones.
      flipped: [K, R, C, cols] or None.
      scale: [R, d_out] the weight of one code.
      gain: [K, P, R, C, cols] of each column's ADC, or None.
      offset: of each column's ADC in level units, or None.
    """

    cells: np.ndarray
    flipped: np.ndarray | None
    scale: np.ndarray
    gain: np.ndarray | None = None
    offset: np.ndarray | None = None


class Read(NamedTuple):
    """A product.

    Attributes:
      y: [B, d_out]; with noise its mean.
      slack: [B, d_out] how far conversions within rounding errors of a tie, or of the range's end, may move it.
      variance: [B, d_out] of noise.
      magnitude: [B, d_out] sum of |terms|, which rounding errors are relative to.
      sums: for every weight slice what its ADC converts of the columns in use, in level units.
      clipped: [K, 2] least and largest number of them beyond the range.
      clipped_inputs: [2] least and largest number of inputs beyond the DAC's range.
      lsb: [R, K] level units of a code; None without an ADC.
    """

    y: np.ndarray
    slack: np.ndarray
    variance: np.ndarray
    magnitude: np.ndarray
    sums: list[np.ndarray]
    clipped: np.ndarray
    clipped_inputs: np.ndarray
    lsb: np.ndarray | None


# Codes that voltages, as shares of full scale, become when they are rounded at random.
Drawn = Callable[[np.ndarray], np.ndarray]


# Structure


def parts(size: int, limit: int | None, how: str) -> list[int]:
    if limit is None or size <= limit:
        return [size]
    n = -(-size // limit)
    each = limit if how == "full" else round(size / n)
    if size - (n - 1) * each > limit:
        each = -(-size // n)
    return [each] * (n - 1) + [size - (n - 1) * each]


def grid(shape: tuple[int, int], config: CrossbarConfig) -> tuple[list[int], list[int]]:
    tile = config.tile
    return parts(shape[0], tile.rows, tile.partition), parts(shape[1], tile.cols, tile.partition)


def starts(sizes: Any) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def g_min(config: CrossbarConfig) -> float:
    return 0.0 if config.cell.on_off_ratio is None else 1 / float(config.cell.on_off_ratio)


def tops(config: CrossbarConfig) -> list[int]:
    return [1] if config.cell.bits is None else [2**b - 1 for b in config.cell.bits]


def worths(config: CrossbarConfig) -> list[float]:
    """Weight codes that one level of each weight slice stands for."""
    if config.cell.bits is None:
        return [1.0 if config.encoding.kind == "differential" else 2.0]
    return [2.0**s for s in starts(config.cell.bits)]


def zeros(config: CrossbarConfig) -> list[float]:
    """Level of a weight of zero in offset encoding."""
    if config.cell.bits is None:
        return [0.5]
    shift = 2 ** (config.mapping.weight_bits - 1)
    return [float((shift >> s) % 2**b) for s, b in zip(starts(config.cell.bits), config.cell.bits, strict=True)]


def input_slices(config: CrossbarConfig) -> list[int]:
    """Bits of every input slice."""
    if config.dac is None:
        return [1]
    bits = config.dac.bits - config.dac.signed
    size = config.dac.slice_bits or bits
    return [min(size, bits - s) for s in range(0, bits, size)]


def input_top(config: CrossbarConfig) -> int:
    return 1 if config.dac is None else 2 ** (config.dac.bits - config.dac.signed) - 1


def pulse_top(config: CrossbarConfig) -> int:
    return 1 if config.dac is None else 2 ** input_slices(config)[0] - 1


def separate(config: CrossbarConfig) -> bool:
    return config.adc is not None and config.adc.separate


def signed_sums(config: CrossbarConfig) -> bool:
    signed_inputs = config.dac is None or config.dac.signed
    return signed_inputs or (config.encoding.kind == "differential" and not separate(config))


def integer_sums(config: CrossbarConfig) -> bool:
    """Whether every sum that a perfect chip brings to its ADC is an integer in level units."""
    if config.cell.bits is None or config.dac is None or config.tile.wire or config.device.iv:
        return False
    if config.tile.current_limit is not None or config.device.read_noise is not None:
        return False
    device = config.device
    if device.programming or device.stuck or (device.drift and device.time is not None):
        return False
    if config.adc is not None and not config.adc.gain_error is config.adc.offset_error is config.adc.noise is None:
        return False
    subtracted = config.encoding.kind == "differential" and not separate(config)
    if separate(config) and config.encoding.two_sided:
        return False
    return subtracted or config.cell.on_off_ratio is None


# Programming


def program(W: np.ndarray, config: CrossbarConfig) -> Chip:
    """Return a chip of perfect cells. Weights are divided and rounded in their own dtype, as the package does."""
    rows, cols = grid(W.shape, config)
    M, q = np.abs(W), config.mapping.quantile

    def largest(block: np.ndarray) -> Any:
        top = (np.quantile(block, q) if q < 1 else 0) or block.max()  # a quantile of zero is no full scale
        return W.dtype.type(top if top > 0 else 1)

    full = np.empty_like(W)
    for r0, height in zip(starts(rows), rows, strict=True):
        for c0, width in zip(starts(cols), cols, strict=True):
            here = np.s_[r0 : r0 + height, c0 : c0 + width]
            if config.mapping.scale == "tile":
                full[here] = largest(M[here])
            elif config.mapping.scale == "matrix":
                full[here] = largest(M)
            else:
                full[here] = [largest(M[:, c]) for c in range(c0, c0 + width)]
    bits = config.mapping.weight_bits
    top = 1 if bits is None else 2 ** (bits - 1) - 1
    scale = full / W.dtype.type(top)
    codes = (W / scale).astype(float)
    codes = np.clip(codes if bits is None else np.rint(codes), -top, top)

    K, unit = len(tops(config)), config.encoding.unit_column
    P = 2 if config.encoding.kind == "differential" else 1
    cells = np.zeros((K, P, len(rows), len(cols), max(rows), max(cols) + unit))
    flipped = np.zeros((K, len(rows), len(cols), max(cols)), bool) if config.encoding.flip else None
    for k in range(K):
        for r, (r0, height) in enumerate(zip(starts(rows), rows, strict=True)):
            for c, (c0, width) in enumerate(zip(starts(cols), cols, strict=True)):
                tile = codes[r0 : r0 + height, c0 : c0 + width]
                at = np.s_[max(rows) - height :, :width]
                for p, level in enumerate(_levels(tile, k, config)):
                    cells[(k, p, r, c, *at)] = level
                if flipped is not None:
                    full_scale = height * tops(config)[k]
                    flipped[k, r, c, :width] = 2 * cells[(k, 0, r, c, *at)].sum(0) > full_scale
                    for j in np.flatnonzero(flipped[k, r, c]):
                        cells[k, 0, r, c, max(rows) - height :, j] *= -1
                        cells[k, 0, r, c, max(rows) - height :, j] += tops(config)[k]
                if unit:
                    cells[k, 0, r, c, :, -1] = 1.0 if config.encoding.flip else zeros(config)[k]
    scales = np.stack([scale[r0] for r0 in starts(rows)]).astype(float)
    return Chip(cells, flipped, scales)


def _levels(codes: np.ndarray, k: int, config: CrossbarConfig) -> list[np.ndarray]:
    """Return the levels of each polarity's cells in slice k."""
    if config.cell.bits is None:
        digit = codes if config.encoding.kind == "differential" else (codes + 1) / 2
    else:
        start, bits = starts(config.cell.bits)[k], config.cell.bits[k]
        if config.encoding.kind == "offset":
            digit = (codes.astype(int) + 2 ** (config.mapping.weight_bits - 1) >> start) % 2**bits
        else:
            digit = np.sign(codes) * ((np.abs(codes).astype(int) >> start) % 2**bits)
    if config.encoding.kind == "offset":
        return [digit]
    top = tops(config)[k]
    if config.encoding.two_sided:
        return [(top + digit) / 2, (top - digit) / 2]
    return [np.where(digit > 0, digit, 0), np.where(digit < 0, -digit, 0)]


# Reading


def full_scale(x: np.ndarray, config: CrossbarConfig, input_limit: float | None) -> np.ndarray:
    """Return the input [B, 1] that the highest code stands for, in the dtype of `x`."""
    if config.dac is not None and config.dac.scaling != "row":
        limit = config.dac.limit if config.dac.scaling == "fixed" else input_limit
        return np.full((len(x), 1), limit, x.dtype)
    limit = (np.abs(x) if config.dac is None or config.dac.signed else np.maximum(x, 0)).max(1, keepdims=True)
    return np.where(limit > 0, limit, x.dtype.type(1))


def input_codes(x: np.ndarray, full: np.ndarray, config: CrossbarConfig, drawn: Drawn | None) -> np.ndarray:
    """Return the input codes; divided and rounded in the dtype of `x`."""
    if config.dac is None:
        return (x / full).astype(float)
    top = input_top(config)
    if config.dac.rounding == "stochastic":
        n = drawn(x / full)
    else:
        n = np.rint(x / full * x.dtype.type(top)).astype(float)
    return np.clip(n, -top if config.dac.signed else 0, top)


def beyond_dac(x: np.ndarray, full: np.ndarray, config: CrossbarConfig) -> np.ndarray:
    """Return which inputs are clipped."""
    if config.dac is None:
        return np.zeros(x.shape, bool)
    return (np.abs(x) > full) | ((x < 0) & (not config.dac.signed))


def pulses(n: np.ndarray, config: CrossbarConfig) -> np.ndarray:
    """Return the input slices [J, B, d_in]."""
    if config.dac is None:
        return n[None]
    sizes, whole = input_slices(config), np.abs(n).astype(int)
    return np.stack(
        [np.sign(n) * ((whole >> s) % 2**b) for s, b in zip(starts(sizes), sizes, strict=True)],
    )


def lsbs(config: CrossbarConfig, rows: list[int], limits: np.ndarray | None) -> np.ndarray | None:
    """Return the level units of a code, [R, K], exactly where they follow from the configuration.

    `limits` [1 or R, K, 2] are those of the state, for a calibrated range, and for `max` with flipped columns.
    """
    adc = config.adc
    if adc is None:
        return None
    top = code_range(config)[1]
    units = full_current(config)
    if adc.range == "granular":
        return np.ones((len(rows), len(units)))
    if adc.range == "max" and not config.encoding.flip:
        highest = np.asarray(rows, float)[:, None] * np.ones(len(units))
    elif adc.range == "given":
        highest = np.broadcast_to(np.asarray(adc.limits, float)[..., 1], (len(rows), len(units)))
    else:
        highest = np.broadcast_to(np.asarray(limits, float)[..., 1], (len(rows), len(units)))
    steps = highest * units / top
    whole = np.rint(steps)
    if integer_sums(config) and adc.range == "calibrated":
        assert (np.abs(steps - whole) < 1e-4 * steps).all(), f"calibrated steps {steps} are not whole"
        return whole
    return steps


def full_current(config: CrossbarConfig) -> np.ndarray:
    """Return the level units [K] of one cell at Gmax under the largest input that is converted."""
    converted = input_top(config) if config.adc is not None and config.adc.convert == "sum" else pulse_top(config)
    return np.asarray([converted * t / (1 - g_min(config)) for t in tops(config)])


def code_range(config: CrossbarConfig) -> tuple[int, int]:
    bits = config.adc.bits
    return (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if signed_sums(config) else (0, 2**bits - 1)


def read(
    chip: Chip,
    x: np.ndarray,
    config: CrossbarConfig,
    limits: np.ndarray | None = None,
    *,
    input_limit: float | None = None,
    drawn: Drawn | None = None,
    rounds: bool = True,
) -> Read:
    """Return what the chip makes of `x`, each vector read again at half the voltage while a sum has too high a code.

    Where rounding errors decide whether one is, both answers are allowed. `input_limit` is that of a calibrated DAC.
    Without `rounds` the ADC only clips: the function whose gradient its limits get.
    """
    full = full_scale(x, config, input_limit)
    again = 0 if config.adc is None else config.adc.retries
    at = np.ones(len(x), bool)  # vectors that may be read at this voltage
    found = []
    for halvings in range(again + 1):
        scale = full * x.dtype.type(2**halvings)
        n = input_codes(x, scale, config, drawn)
        four, clipped, sums, lsb = _once(chip, n, x.dtype, config, limits, rounds=rounds)
        four *= (scale.astype(float) / input_top(config)) ** np.asarray([1, 1, 2, 1])[:, None, None]
        inputs = beyond_dac(x, scale, config).sum(1)
        stops = at & (clipped[:, 2].sum(0) == 0) if halvings < again else at
        found.append((stops, four, clipped, inputs))
        at = at & (clipped[:, 3].sum(0) > 0)
        if halvings == 0:
            first = sums, lsb
        if not at.any():
            break
    stops, four, clipped, inputs = (np.stack(parts) for parts in zip(*found, strict=True))
    y, slack, variance, magnitude = np.moveaxis(four, 1, 0)
    low = np.where(stops[..., None], y - slack, np.inf).min(0)
    high = np.where(stops[..., None], y + slack, -np.inf).max(0)
    return Read(
        (low + high) / 2,
        (high - low) / 2,
        np.where(stops[..., None], variance, 0).max(0),
        np.where(stops[..., None], magnitude, 0).max(0),
        first[0],
        np.stack(_bounds(stops[:, None], clipped[:, :, 0], clipped[:, :, 1]), axis=1),
        np.stack(_bounds(stops, inputs, inputs)),
        first[1],
    )


def _bounds(stops: np.ndarray, least: np.ndarray, most: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.where(stops, least, np.inf).min(0).sum(-1), np.where(stops, most, 0).max(0).sum(-1)


def _once(
    chip: Chip, n: np.ndarray, dtype: np.dtype, config: CrossbarConfig, limits: np.ndarray | None, *, rounds: bool
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], np.ndarray | None]:
    """Return y, slack, variance and magnitude of input codes; clipped conversions, sums and steps.

    Clipped are [K, 4, B]: least and largest number of sums beyond the range, and of those beyond its highest code.
    """
    rows, cols = grid((n.shape[1], chip.scale.shape[1]), config)
    lsb = lsbs(config, rows, limits)
    sizes = input_slices(config)
    together = config.adc is not None and config.adc.convert == "sum"
    weight = 2.0 ** np.asarray(starts(sizes))[:, None, None]
    eps = 3e-6 if dtype == np.float32 else 1e-11
    if config.tile.wire is not None:
        eps = max(eps, 20 * float(config.tile.wire.tolerance))
    out = np.zeros((4, len(n), chip.scale.shape[1]))  # y, slack, variance, magnitude
    K, unit = len(tops(config)), config.encoding.unit_column
    seen: list[list[np.ndarray]] = [[] for _ in range(K)]
    clipped = np.zeros((K, 4, len(n)))
    for r, (r0, height) in enumerate(zip(starts(rows), rows, strict=True)):
        u = np.zeros((len(sizes), len(n), max(rows)))
        u[:, :, max(rows) - height :] = pulses(n[:, r0 : r0 + height], config)
        ones = n[:, r0 : r0 + height].sum(1)[:, None]
        for c, (c0, width) in enumerate(zip(starts(cols), cols, strict=True)):
            for k in range(K):
                used = np.r_[:width, -1] if unit else np.r_[:width]
                S, V, size = column_sums(u, chip.cells[k, :, r, c], k, config)  # [P, J, B, cols]
                weights = weight
                if together:
                    S, V, size = (
                        np.sum(weight**power * a, 1, keepdims=True) for power, a in ((1, S), (2, V), (1, size))
                    )
                    weights = np.ones((1, 1, 1))
                if chip.gain is not None:
                    gain = chip.gain[k, :, r, c][:, None, None]
                    S, V, size = S * gain, V * gain**2, size * np.abs(gain)
                if chip.offset is not None:
                    shift = chip.offset[k, :, r, c][:, None, None]
                    S, size = S + shift, size + np.abs(shift)
                if config.adc is not None and config.adc.noise is not None:
                    V = V + (float(config.adc.noise) * full_current(config)[k]) ** 2
                seen[k].append(S[..., used].reshape(-1))
                step = 1.0
                if lsb is None:
                    total = np.stack([S, np.zeros_like(S), V, size])
                else:
                    step = lsb[r, k]
                    total, beyond = convert(S / step, V / step**2, eps * size / step, config, rounds=rounds)
                    clipped[k] += beyond[..., used].sum((1, 2, 4))
                powers = (1, 1, 2, 1)  # of the factor that each of the four is multiplied by
                total = np.stack(
                    [np.sum((weights * step) ** p * t, 1) for p, t in zip(powers, total, strict=True)]
                )  # [4, P, B, cols]
                value = _recombine(total, ones, k, None if chip.flipped is None else chip.flipped[k, r, c], config)
                factor = worths(config)[k] * chip.scale[r, c0 : c0 + width]
                for i, p in enumerate(powers):
                    out[i][:, c0 : c0 + width] += (
                        np.abs(factor) ** p * np.sign(factor) ** (i == 0) * value[i][:, :width]
                    )
    return out, clipped, [np.concatenate(s) for s in seen], lsb


def column_sums(
    u: np.ndarray, cells: np.ndarray, k: int, config: CrossbarConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return sums, variances and sums of magnitudes [P, J, B, cols] of one array of each polarity."""
    low, top, pulse = g_min(config), tops(config)[k], pulse_top(config)
    G, v = low + cells / top * (1 - low), u / pulse
    drive = v if config.device.iv is None else _sinh(config.device.iv, v)
    noise, spread = config.device.read_noise, np.zeros_like(G)
    if noise is not None:
        spread = float(noise.sigma) * (G if noise.kind == "proportional" else np.ones_like(G))
        if noise.clip:
            G, spread = _rectified(G, spread)
    if config.tile.wire is None:
        current = np.einsum("jbr,prc->pjbc", drive, G)
    else:
        current = np.stack([nodal(v, one, config) for one in G])
    if config.tile.current_limit is not None:
        most = float(config.tile.current_limit)
        current = np.clip(current, -most, most)
    level = pulse * top / (1 - low)
    S = current * level
    V = np.einsum("jbr,prc->pjbc", drive**2, spread**2) * level**2
    size = np.einsum("jbr,prc->pjbc", np.abs(drive), G) * level
    if config.encoding.kind == "differential" and not separate(config):
        return (S[0] - S[1])[None], V.sum(0)[None], size.sum(0)[None]
    return S, V, size


def _sinh(iv: Any, v: np.ndarray) -> np.ndarray:
    a = float(iv.read_voltage) / float(iv.scale)
    return np.sinh(a * v) / np.sinh(a)


def _rectified(mean: np.ndarray, deviation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation of max(N(mean, deviation), 0)."""
    safe = np.where(deviation > 0, deviation, 1)
    z = mean / safe
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    first = mean * ndtr(z) + safe * density
    second = (mean**2 + safe**2) * ndtr(z) + mean * safe * density
    found = np.sqrt(np.maximum(second - first**2, 0))
    return np.where(deviation > 0, first, np.maximum(mean, 0)), np.where(deviation > 0, found, 0)


def nodal(v: np.ndarray, G: np.ndarray, config: CrossbarConfig) -> np.ndarray:
    """Return the column currents [J, B, cols] of one array with resistive wires, by Newton's method on its cells.

    Every word line is a ladder from its driver at the left, every bit line one to its amplifier at the bottom:
    a cell's voltage is the source's less the drops of all currents through the segments that it shares.
    """
    rows, cols = G.shape
    wire, count = config.tile.wire, rows * cols
    drop = np.zeros((count, count))
    for a in range(count):
        for b in range(count):
            if a // cols == b // cols:  # segments of the word line up to the nearer of both cells
                drop[a, b] += float(wire.row_resistance) * (min(a % cols, b % cols) + 1)
            if a % cols == b % cols:  # segments of the bit line below the lower of both cells
                drop[a, b] += float(wire.column_resistance) * (rows - max(a // cols, b // cols))
    out = np.zeros((*v.shape[:-1], cols))
    iv = config.device.iv
    a = None if iv is None else float(iv.read_voltage) / float(iv.scale)
    for at in np.ndindex(*v.shape[:-1]):
        source = np.repeat(v[at], cols)
        V = source.copy()
        for _ in range(50):
            current = G.reshape(-1) * (V if a is None else np.sinh(a * V) / np.sinh(a))
            slope = G.reshape(-1) * (1.0 if a is None else a * np.cosh(a * V) / np.sinh(a))
            error = V + drop @ current - source
            if np.abs(error).max() < 1e-13:
                break
            V = V - np.linalg.solve(np.eye(count) + drop * slope, error)
        out[at] = current.reshape(rows, cols).sum(0)
    return out


def convert(
    t: np.ndarray, V: np.ndarray, eps: np.ndarray, config: CrossbarConfig, *, rounds: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return [4, ...] mean code, slack, variance and magnitude of sums `t` in codes, and [4, ...] which are clipped.

    `V` are the variances of the sums, and `eps` how far rounding errors may have moved them.
    """
    low, high = code_range(config)
    above = [(t + e > high + 0.5) | ((low < 0) & (t - e < low - 0.5)) for e in (-eps, eps)]
    clipped = [(t + e > high + 0.5) | (t - e < low - 0.5) for e in (-eps, eps)]
    beyond = np.stack([*clipped, *above]).astype(float)
    if not rounds:
        code = np.clip(t, low, high)
        return np.stack([code, np.zeros_like(t), np.zeros_like(t), np.abs(code)]), beyond
    nearest = np.floor(t) + 0.5
    if exact_ties(config):
        t, eps = np.where(np.abs(t - nearest) < 1e-9 * np.maximum(1, np.abs(t)), nearest, t), 0.0
    codes = np.stack([np.clip(np.rint(t + e), low, high) for e in (-eps, eps)])
    code, slack = codes.mean(0), np.abs(codes[1] - codes[0]) / 2
    variance = np.zeros_like(t)
    noisy = V > 0
    if noisy.any():  # the mean of a code that exceeds c with probability P(c): low + sum P(c); likewise its square
        c = np.arange(low, high)
        above = ndtr((t[noisy][:, None] - c - 0.5) / np.sqrt(V[noisy])[:, None])
        mean = low + above.sum(1)
        square = low**2 + ((2 * c + 1) * above).sum(1)
        code[noisy], variance[noisy], slack[noisy] = mean, np.maximum(square - mean**2, 0), 0
    return np.stack([code, slack, variance, np.abs(code)]), beyond


def exact_ties(config: CrossbarConfig) -> bool:
    """Whether a tie has one answer: integer sums, and steps that are exact in the arithmetic of the package."""
    adc = config.adc
    if not integer_sums(config):
        return False
    if adc.range in ("granular", "calibrated"):
        return True
    if adc.range == "max":
        return config.cell.on_off_ratio is None and not config.encoding.flip
    limits = np.asarray(adc.limits, float)[..., 1]
    return config.cell.on_off_ratio is None and bool((limits * 64 == np.rint(limits * 64)).all())


def _recombine(
    total: np.ndarray, ones: np.ndarray, k: int, flipped: np.ndarray | None, config: CrossbarConfig
) -> np.ndarray:
    """Return [4, B, cols] of what the columns stand for, offsets taken off."""
    if config.encoding.kind == "differential":
        if total.shape[1] == 1:
            return total[:, 0]
        return np.stack([total[0, 0] - total[0, 1], *(total[1:, 0] + total[1:, 1])])
    low, top, zero = g_min(config), tops(config)[k], zeros(config)[k]
    kappa = low / (1 - low) * top
    total = total[:, 0]
    if not config.encoding.unit_column:
        shift = (kappa + zero) * ones
        return np.stack([total[0] - shift, total[1], total[2], total[3] + np.abs(shift)])
    values, unit = total[..., :-1], total[..., -1:]
    if flipped is None:
        return np.stack([values[0] - unit[0], *(values[1:] + unit[1:])])
    # A flipped column stands for top sum(u) - S, and the unit column of ones measures sum(u) (1 + kappa).
    share = np.where(flipped, top + kappa - zero, -kappa - zero) / (1 + kappa)
    y = np.where(flipped, -1, 1) * values[0] + share * unit[0]
    slack, magnitude = (values[i] + np.abs(share) * unit[i] for i in (1, 3))
    return np.stack([y, slack, values[2] + share**2 * unit[2], magnitude])


def weights(chip: Chip, d_in: int, config: CrossbarConfig) -> np.ndarray:
    """Return the weights as programmed: what the outputs of unit inputs are if every converter is ideal."""
    rows, cols = grid((d_in, chip.scale.shape[1]), config)
    W = np.zeros((d_in, chip.scale.shape[1]))
    for r, (r0, height) in enumerate(zip(starts(rows), rows, strict=True)):
        for c, (c0, width) in enumerate(zip(starts(cols), cols, strict=True)):
            for k in range(len(chip.cells)):
                g = chip.cells[k, :, r, c, max(rows) - height :]
                top, zero = tops(config)[k], zeros(config)[k]
                if config.encoding.kind == "differential":
                    level = g[0] - g[1]
                elif not config.encoding.unit_column:
                    level = g[0] - zero
                else:
                    low = g_min(config)
                    kappa = low / (1 - low) * top
                    columns = np.stack([g[0] + kappa] * 4)
                    flipped = None if chip.flipped is None else chip.flipped[k, r, c]
                    level = _recombine(columns[:, None], np.ones((height, 1)), k, flipped, config)[0]
                W[r0 : r0 + height, c0 : c0 + width] += (
                    worths(config)[k] * chip.scale[r, c0 : c0 + width] * level[:, :width]
                )
    return W
