"""What a crossbar computes, in NumPy and float64, loop by loop: the oracle of the differential tests.

Written from the equations of docs/concepts/crossbar.md. It shares the configuration classes with the package and
nothing else; the wires are solved by nodal analysis, ties at an ADC are decided in whole numbers, and noise enters as
the exact mean and variance of every conversion.

Axis letters: K weight slices, J input slices, P polarities (1 once subtracted), R row tiles, C column tiles, B batch.

Quantities with an error are stacked: [4, ...] of mean, slack (how far it may be off), variance of noise, and the sum of
|terms|, which rounding errors are relative to.
"""

import dataclasses
import math
from typing import NamedTuple

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
      clipped_inputs: number of inputs beyond the DAC's range.
      lsb: [R, K] level units of a code; None without an ADC.
    """

    y: np.ndarray
    slack: np.ndarray
    variance: np.ndarray
    magnitude: np.ndarray
    sums: list[np.ndarray]
    clipped: np.ndarray
    clipped_inputs: int
    lsb: np.ndarray | None


def scaled(four, factor):
    """Return a quantity with an error times a factor."""
    return np.stack(
        [
            four[0] * factor,
            four[1] * np.abs(factor),
            four[2] * factor**2,
            four[3] * np.abs(factor),
        ]
    )


# Structure


def parts(size, limit, how):
    if limit is None or size <= limit:
        return [size]
    n = -(-size // limit)
    each = limit if how == "full" else round(size / n)
    if size - (n - 1) * each > limit:
        each = -(-size // n)
    return [each] * (n - 1) + [size - (n - 1) * each]


def grid(shape, config):
    tile = config.tile
    return parts(shape[0], tile.rows, tile.partition), parts(
        shape[1], tile.cols, tile.partition
    )


def starts(sizes):
    return [sum(sizes[:i]) for i in range(len(sizes))]


def spans(sizes):
    return [
        slice(start, start + size)
        for start, size in zip(starts(sizes), sizes, strict=True)
    ]


def tiles(rows, cols):
    """Yield the place of every tile in the grid, and its rows and columns of the matrix."""
    for r, of_rows in enumerate(spans(rows)):
        for c, of_cols in enumerate(spans(cols)):
            yield r, c, of_rows, of_cols


def g_min(config):
    return (
        0.0 if config.cell.on_off_ratio is None else 1 / float(config.cell.on_off_ratio)
    )


def tops(config):
    return [1] if config.cell.bits is None else [2**b - 1 for b in config.cell.bits]


def worths(config):
    """Weight codes that one level of each weight slice stands for."""
    if config.cell.bits is None:
        return [1.0 if config.encoding.kind == "differential" else 2.0]
    return [2.0**s for s in starts(config.cell.bits)]


def zeros(config):
    """Level of a weight of zero in offset encoding."""
    if config.cell.bits is None:
        return [0.5]
    shift = 2 ** (config.mapping.weight_bits - 1)
    return [
        float((shift >> s) % 2**b)
        for s, b in zip(starts(config.cell.bits), config.cell.bits, strict=True)
    ]


def input_slices(config):
    """Bits of every input slice."""
    if config.dac is None:
        return [1]
    bits = config.dac.bits - config.dac.signed
    size = config.dac.slice_bits or bits
    return [min(size, bits - s) for s in range(0, bits, size)]


def input_top(config):
    return 1 if config.dac is None else 2 ** (config.dac.bits - config.dac.signed) - 1


def pulse_top(config):
    return 1 if config.dac is None else 2 ** input_slices(config)[0] - 1


def subtracts(config):
    """Whether the polarities are subtracted before they are converted."""
    return config.encoding.kind == "differential" and not (
        config.adc is not None and config.adc.separate
    )


def integer_sums(config):
    """Whether every sum that a perfect chip brings to its ADC is an integer in level units."""
    device = config.device
    adc = config.adc
    if config.cell.bits is None or config.dac is None:
        return False
    if (
        config.tile.wire
        or device.iv
        or config.tile.current_limit is not None
        or device.read_noise is not None
    ):
        return False
    if device.programming or device.stuck or (device.drift and device.time is not None):
        return False
    if adc is not None and not adc.gain_error is adc.offset_error is adc.noise is None:
        return False
    return subtracts(config) or (
        config.cell.on_off_ratio is None and not config.encoding.two_sided
    )


# Programming


def program(W, config):
    """Return a chip of perfect cells. Weights are divided and rounded in their own dtype, as the package does."""
    rows, cols = grid(W.shape, config)
    d_in, d_out = W.shape
    blocks = {
        "matrix": ([d_in], [d_out]),
        "tile": (rows, cols),
        "column": ([d_in], [1] * d_out),
    }
    full = np.empty_like(W)
    quantile = config.mapping.quantile
    for _, _, *here in tiles(*blocks[config.mapping.scale]):
        block = np.abs(W[*here])
        top = (
            np.quantile(block, quantile) if quantile < 1 else 0
        ) or block.max()  # a quantile of zero: no full scale
        full[*here] = top if top > 0 else 1
    bits = config.mapping.weight_bits
    top = 1 if bits is None else 2 ** (bits - 1) - 1
    scale = full / W.dtype.type(top)
    codes = (W / scale).astype(float)
    codes = np.clip(codes if bits is None else np.rint(codes), -top, top)

    K = len(tops(config))
    unit = config.encoding.unit_column
    P = 2 if config.encoding.kind == "differential" else 1
    cells = np.zeros((K, P, len(rows), len(cols), max(rows), max(cols) + unit))
    flipped = (
        np.zeros((K, len(rows), len(cols), max(cols)), bool)
        if config.encoding.flip
        else None
    )
    for r, c, of_rows, of_cols in tiles(rows, cols):
        tile = codes[of_rows, of_cols]
        bottom = max(rows) - len(tile)
        width = tile.shape[1]
        for k, top in enumerate(tops(config)):
            levels = np.stack(_levels(tile, k, config))
            if flipped is not None:
                flipped[k, r, c, :width] = flip = 2 * levels[0].sum(0) > len(tile) * top
                levels = np.where(flip, top - levels, levels)
            cells[k, :, r, c, bottom:, :width] = levels
            if unit:
                cells[k, 0, r, c, :, -1] = (
                    1.0 if config.encoding.flip else zeros(config)[k]
                )
    return Chip(cells, flipped, scale[starts(rows)].astype(float))


def _levels(codes, k, config):
    """Return the levels of each polarity's cells in slice k."""
    offset = config.encoding.kind == "offset"
    if config.cell.bits is None:
        digit = (codes + 1) / 2 if offset else codes
    else:
        start = starts(config.cell.bits)[k]
        bits = config.cell.bits[k]
        shifted = (
            codes + 2 ** (config.mapping.weight_bits - 1) if offset else np.abs(codes)
        )
        digit = (1 if offset else np.sign(codes)) * (
            (shifted.astype(int) >> start) % 2**bits
        )
    if offset:
        return [digit]
    if config.encoding.two_sided:
        top = tops(config)[k]
        return [(top + digit) / 2, (top - digit) / 2]
    return [np.maximum(digit, 0), np.maximum(-digit, 0)]


def weights(chip, d_in, config):
    """Return the weights as programmed: the outputs of unit inputs where reads and converters are ideal."""
    device = dataclasses.replace(config.device, iv=None, read_noise=None)
    tile = dataclasses.replace(config.tile, wire=None, current_limit=None)
    ideal = {**vars(config), "dac": None, "adc": None, "device": device, "tile": tile}
    return read(
        chip._replace(gain=None, offset=None), np.eye(d_in), CrossbarConfig(**ideal)
    ).y


# Reading


def full_scale(x, config, input_limit):
    """Return the input [B, 1] that the highest code stands for, in the dtype of `x`."""
    if config.dac is not None and config.dac.scaling != "row":
        limit = config.dac.limit if config.dac.scaling == "fixed" else input_limit
        return np.full((len(x), 1), limit, x.dtype)
    limit = (
        np.abs(x) if config.dac is None or config.dac.signed else np.maximum(x, 0)
    ).max(1, keepdims=True)
    return np.where(limit > 0, limit, x.dtype.type(1))


def input_codes(x, full, config, drawn):
    """Return the input codes; divided and rounded in the dtype of `x`.

    `drawn` returns the codes that voltages, as shares of full scale, become when they are rounded at random.
    """
    if config.dac is None:
        return (x / full).astype(float)
    top = input_top(config)
    if config.dac.rounding == "stochastic":
        n = drawn(x / full)
    else:
        n = np.rint(x / full * x.dtype.type(top)).astype(float)
    return np.clip(n, -top if config.dac.signed else 0, top)


def pulses(n, config):
    """Return the input slices [J, B, d_in]."""
    if config.dac is None:
        return n[None]
    sizes = input_slices(config)
    whole = np.abs(n).astype(int)
    return np.stack(
        [
            np.sign(n) * ((whole >> s) % 2**b)
            for s, b in zip(starts(sizes), sizes, strict=True)
        ]
    )


def lsbs(config, rows, limits):
    """Return the level units of a code, [R, K], exactly where they follow from the configuration.

    `limits` [1 or R, K, 2] are those of the state, for a calibrated range, and for `max` with flipped columns.
    """
    adc = config.adc
    if adc is None:
        return None
    units = full_current(config)
    if adc.range == "granular":
        return np.ones((len(rows), len(units)))
    if adc.range == "max" and not config.encoding.flip:
        highest = np.asarray(rows, float)[:, None]
    else:
        highest = np.asarray(adc.limits if adc.range == "given" else limits, float)[
            ..., 1
        ]
    steps = np.broadcast_to(
        highest * units / code_range(config)[1], (len(rows), len(units))
    )
    if integer_sums(config) and adc.range == "calibrated":
        whole = np.rint(steps)
        assert (np.abs(steps - whole) < 1e-4 * steps).all(), (
            f"calibrated steps {steps} are not whole"
        )
        return whole
    return steps


def full_current(config):
    """Return the level units [K] of one cell at Gmax under the largest input that is converted."""
    converted = (
        input_top(config)
        if config.adc is not None and config.adc.convert == "sum"
        else pulse_top(config)
    )
    return np.asarray([converted * t / (1 - g_min(config)) for t in tops(config)])


def full_bits(config):
    bits = config.adc.bits
    return bits if isinstance(bits, int) else max(8, np.max(bits))


def code_range(config):
    bits = full_bits(config)
    signed = config.dac is None or config.dac.signed or subtracts(config)
    return (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def read(chip, x, config, limits=None, *, input_limit=None, drawn=None, rounds=True):
    """Return what the chip makes of `x`. `input_limit` is that of a calibrated DAC.

    Without `rounds` the ADC only clips: the function whose gradient its limits get.
    """
    scale = full_scale(x, config, input_limit)
    n = input_codes(x, scale, config, drawn)
    four, clipped, sums, lsb = _once(chip, n, x.dtype, config, limits, rounds=rounds)
    beyond = 0
    if config.dac is not None:
        beyond = int(((np.abs(x) > scale) | ((x < 0) & (not config.dac.signed))).sum())
    return Read(
        *scaled(four, scale.astype(float) / input_top(config)),
        sums,
        clipped,
        beyond,
        lsb,
    )


def _once(chip, n, dtype, config, limits, *, rounds):
    """Return the product of input codes with its error, clipped conversions [K, 2], sums and steps."""
    rows, cols = grid((n.shape[1], chip.scale.shape[1]), config)
    lsb = lsbs(config, rows, limits)
    sizes = input_slices(config)
    adc = config.adc
    of_slice = 2.0 ** np.asarray(starts(sizes))[:, None, None]
    eps = 3e-6 if dtype == np.float32 else 1e-11
    if config.tile.wire is not None:
        eps = max(eps, 20 * float(config.tile.wire.tolerance))
    out = np.zeros((4, len(n), chip.scale.shape[1]))
    K = len(tops(config))
    seen = [[] for _ in range(K)]
    clipped = np.zeros((K, 2))
    for r, c, of_rows, of_cols in tiles(rows, cols):
        u = np.zeros((len(sizes), len(n), max(rows)))
        u[:, :, max(rows) - rows[r] :] = pulses(n[:, of_rows], config)
        used = np.r_[: cols[c], -1] if config.encoding.unit_column else np.r_[: cols[c]]
        for k in range(K):
            # [4, P, J, B, cols]
            total = column_sums(u, chip.cells[k, :, r, c], k, config)
            weight = of_slice
            if adc is not None and adc.convert == "sum":
                total = scaled(total, weight).sum(2, keepdims=True)
                weight = 1.0
            if chip.gain is not None:
                total = scaled(total, chip.gain[k, :, r, c][:, None, None])
            if chip.offset is not None:
                shift = chip.offset[k, :, r, c][:, None, None]
                total[0] += shift
                total[3] += np.abs(shift)
            if adc is not None and adc.noise is not None:
                total[2] += (float(adc.noise) * full_current(config)[k]) ** 2
            seen[k].append(total[0][..., used].reshape(-1))
            if lsb is not None:
                total, beyond = convert(
                    scaled(total, 1 / lsb[r, k]), eps, config, k, rounds=rounds
                )
                clipped[k] += beyond[..., used].sum((1, 2, 3, 4))
                total = scaled(total, lsb[r, k])
            if adc is not None and isinstance(adc.bits, tuple):
                dropped = np.equal(adc.bits[k], 0)
                total[:, :, dropped] = 0
                if config.encoding.kind == "offset":
                    levels = np.full(total.shape[-1], tops(config)[k] / 2)
                    if config.encoding.unit_column:
                        levels[-1] = 1 if config.encoding.flip else zeros(config)[k]
                    levels += g_min(config) / (1 - g_min(config)) * tops(config)[k]
                    mean = u[dropped].sum(2)[:, :, None] * levels
                    total[0][:, dropped] = mean
                    total[3][:, dropped] = np.abs(mean)
            total = scaled(total, weight).sum(2)
            flipped = None if chip.flipped is None else chip.flipped[k, r, c]
            value = _recombine(
                total, n[:, of_rows].sum(1)[:, None], k, flipped, config
            )[..., : cols[c]]
            out[:, :, of_cols] += scaled(
                value, worths(config)[k] * chip.scale[r, of_cols]
            )
    return out, clipped, [np.concatenate(s) for s in seen], lsb


def column_sums(u, cells, k, config):
    """Return the sums [4, P, J, B, cols] of one array of each polarity."""
    low = g_min(config)
    top = tops(config)[k]
    pulse = pulse_top(config)
    G = low + cells / top * (1 - low)
    v = u / pulse
    drive = v if config.device.iv is None else _sinh(config.device.iv, v)
    noise = config.device.read_noise
    spread = np.zeros_like(G)
    if noise is not None:
        spread = float(noise.sigma) * (
            G if noise.kind == "proportional" else np.ones_like(G)
        )
        if noise.clip:
            G, spread = _rectified(G, spread)
    if config.tile.wire is None:
        current = np.einsum("jbr,prc->pjbc", drive, G)
    else:
        current = np.stack([nodal(v, one, config) for one in G])
    if config.tile.current_limit is not None:
        most = float(config.tile.current_limit)
        current = np.clip(current, -most, most)
    variance = np.einsum("jbr,prc->pjbc", drive**2, spread**2)
    size = np.einsum("jbr,prc->pjbc", np.abs(drive), G)
    four = scaled(
        np.stack([current, np.zeros_like(current), variance, size]),
        pulse * top / (1 - low),
    )
    return (four[:, 0] + scaled(four[:, 1], -1))[:, None] if subtracts(config) else four


def _sinh(iv, v):
    a = float(iv.read_voltage) / float(iv.scale)
    return np.sinh(a * v) / np.sinh(a)


def _rectified(mean, deviation):
    """Return mean and deviation of max(N(mean, deviation), 0)."""
    safe = np.where(deviation > 0, deviation, 1)
    z = mean / safe
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    first = mean * ndtr(z) + safe * density
    second = (mean**2 + safe**2) * ndtr(z) + mean * safe * density
    found = np.sqrt(np.maximum(second - first**2, 0))
    return np.where(deviation > 0, first, np.maximum(mean, 0)), np.where(
        deviation > 0, found, 0
    )


def nodal(v, G, config):
    """Return the column currents [..., cols] of one array with resistive wires, by Newton's method on its cells.

    Every word line is a ladder from its driver at the left, every bit line one to its amplifier at the bottom:
    a cell's voltage is the source's less the drops of all currents through the segments that it shares.
    """
    rows, cols = G.shape
    r, c = np.divmod(np.arange(rows * cols), cols)
    # Segments of the word line up to the nearer of two cells, and of the bit line below the lower of both.
    drop = (
        float(config.tile.wire.row_resistance)
        * (r[:, None] == r)
        * (np.minimum(c[:, None], c) + 1)
    )
    drop += (
        float(config.tile.wire.column_resistance)
        * (c[:, None] == c)
        * (rows - np.maximum(r[:, None], r))
    )
    out = np.zeros((*v.shape[:-1], cols))
    iv = config.device.iv
    g = G.reshape(-1)
    a = None if iv is None else float(iv.read_voltage) / float(iv.scale)
    for at in np.ndindex(*v.shape[:-1]):
        source = np.repeat(v[at], cols)
        V = source.copy()
        for _ in range(50):
            current = g * (V if a is None else np.sinh(a * V) / np.sinh(a))
            slope = g * (1.0 if a is None else a * np.cosh(a * V) / np.sinh(a))
            error = V + drop @ current - source
            if np.abs(error).max() < 1e-13:
                break
            V = V - np.linalg.solve(np.eye(len(g)) + drop * slope, error)
        out[at] = current.reshape(rows, cols).sum(0)
    return out


def convert(four, eps, config, k, *, rounds):
    """Return the codes of sums of slice k in units of a code, [4, P, J, ...], and [2, ...] which sums are clipped.

    `eps` is how far rounding errors may have moved a sum, relative to its magnitude.
    """
    t, _, V, magnitude = four
    low, high = code_range(config)
    merged = np.ones(1)
    if isinstance(config.adc.bits, tuple):  # only the upper bits of a code are known
        merged = 2.0 ** (full_bits(config) - np.asarray(config.adc.bits[k]))

    def stopped(code):
        steps = merged[:, None, None]
        return np.floor(code / steps) * steps + (steps - 1) / 2

    eps = eps * magnitude
    clipped = [(t + e > high + 0.5) | (t - e < low - 0.5) for e in (-eps, eps)]
    beyond = np.stack(clipped).astype(float)
    if not rounds:
        code = np.clip(t, low, high)
        return np.stack(
            [code, np.zeros_like(t), np.zeros_like(t), np.abs(code)]
        ), beyond
    nearest = np.floor(t) + 0.5
    if exact_ties(config):
        t = np.where(np.abs(t - nearest) < 1e-9 * np.maximum(1, np.abs(t)), nearest, t)
        eps = 0.0
    codes = np.stack([stopped(np.clip(np.rint(t + e), low, high)) for e in (-eps, eps)])
    code = codes.mean(0)
    slack = np.abs(codes[1] - codes[0]) / 2
    variance = np.zeros_like(t)
    noisy = V > 0
    if noisy.any():  # the mean of a code that exceeds c with probability P(c): low + sum P(c); likewise its square
        c = np.arange(low, high)
        above = ndtr((t[noisy][:, None] - c - 0.5) / np.sqrt(V[noisy])[:, None])
        mean = low + above.sum(1)
        square = low**2 + ((2 * c + 1) * above).sum(1)
        code[noisy] = mean
        variance[noisy] = np.maximum(square - mean**2, 0)
        slack[noisy] = 0
    return np.stack([code, slack, variance, np.abs(code)]), beyond


def exact_ties(config):
    """Whether a tie has one answer: integer sums, and steps that are exact in the arithmetic of the package."""
    adc = config.adc
    if not integer_sums(config):
        return False
    if adc.range in ("granular", "calibrated"):
        return True
    if config.cell.on_off_ratio is not None:
        return False
    limits = 64 * np.asarray(adc.limits if adc.range == "given" else 0, float)
    return (
        not config.encoding.flip
        if adc.range == "max"
        else bool((limits == np.rint(limits)).all())
    )


def _recombine(total, ones, k, flipped, config):
    """Return what the columns [4, P, B, cols] stand for, offsets taken off."""
    if total.shape[1] == 2:
        return total[:, 0] + scaled(total[:, 1], -1)
    total = total[:, 0]
    if config.encoding.kind == "differential":
        return total
    top = tops(config)[k]
    zero = zeros(config)[k]
    kappa = g_min(config) / (1 - g_min(config)) * top
    if not config.encoding.unit_column:
        shift = (kappa + zero) * ones
        return total + np.stack([-shift, 0 * shift, 0 * shift, np.abs(shift)])
    values = total[..., :-1]
    unit = total[..., -1:]
    if flipped is None:
        return values + scaled(unit, -1)
    # A flipped column stands for top sum(u) - S, and the unit column of ones measures sum(u) (1 + kappa).
    share = np.where(flipped, top + kappa - zero, -kappa - zero) / (1 + kappa)
    return scaled(values, np.where(flipped, -1, 1)) + scaled(unit, share)
