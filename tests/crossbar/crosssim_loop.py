"""CrossSim 3.2's product in NumPy, loop by loop, in its own units: conductances of Gmax, inputs in [-1, 1].

The oracle of configurations for which there is no golden. Written from analog_core.py, bitsliced_core.py,
balanced_core.py, offset_core.py, quantizer_adc.py, quantizer_dac.py, iadc.py and NonInterleaved_InputSource.py,
without noise; in float64 throughout, where CrossSim casts unsliced balanced cells to float32.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

Params = dict[str, Any]


def parameters(**changes: Any) -> Params:
    """Return what a product depends on; `core__rows_max=64` changes params["core"]["rows_max"]."""
    off = {"enable": False, "model": "IdealDevice", "magnitude": 0.0}
    params: Params = {
        "core": {
            "style": 2,
            "rows_max": 128,
            "cols_max": 0,
            "weight_bits": 8,
            "balanced": {"style": 1, "interleaved_posneg": False, "subtract_current_in_xbar": True},
            "bit_sliced": {"style": 1, "num_slices": 4},
            "offset": {"style": 1},
            "mapping": {
                "weights": {
                    "clipping": True,
                    "min": None,
                    "max": None,
                    "percentile": 1.0,
                    "row_partition_strategy": 2,
                    "col_partition_strategy": 2,
                },
                "inputs": {"mvm": {"clipping": False, "min": -1.0, "max": 1.0, "percentile": None}},
            },
        },
        "simulation": {"Niters_max_parasitics": 100, "Verr_th_mvm": 1e-3, "relaxation_gamma": 1.0},
        "xbar": {
            "device": {
                "cell_bits": 0,
                "Rmin": 1000.0,
                "Rmax": 10000.0,
                "time": 0,
                "infinite_on_off_ratio": True,
                "clip_conductance": False,
                "read_noise": dict(off),
                "programming_error": dict(off),
                "drift_error": dict(off),
                "nonlinear_IV": dict(off),
            },
            "array": {
                "Icol_max": 0,
                "parasitics": {
                    "enable": False,
                    "Rp_row": 0.0,
                    "Rp_col": 0.0,
                    "Rp_row_terminal": 0.0,
                    "Rp_col_terminal": 0.0,
                    "current_from_input": True,
                },
            },
            "adc": {
                "mvm": {
                    "model": "IdealADC",
                    "bits": 0,
                    "signed": True,
                    "stochastic_rounding": False,
                    "adc_per_ibit": True,
                    "calibrated_range": [],
                    "adc_range_option": 1,
                }
            },
            "dac": {
                "mvm": {
                    "model": "SignMagnitudeDAC",
                    "bits": 8,
                    "input_bitslicing": True,
                    "signed": True,
                    "slice_size": 1,
                }
            },
        },
    }
    return changed(params, **changes)


def changed(params: Params, **changes: Any) -> Params:
    params = copy.deepcopy(params)
    for path, value in changes.items():
        *nodes, leaf = path.split("__")
        at = params
        for node in nodes:
            at = at[node]
        assert leaf in at, path
        at[leaf] = value
    return params


def matmat(params: Params, W: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return what CrossSim makes of W @ x."""
    core, mapping = params["core"], params["core"]["mapping"]["weights"]
    if mapping["percentile"] is None:
        top = mapping["max"]
    elif mapping["percentile"] < 1:
        share = 100 * mapping["percentile"]
        top = max(abs(np.percentile(W, share)), abs(np.percentile(W, 100 - share)))
    else:
        top = np.abs(W).max() * mapping["percentile"]
    W = W.clip(-top, top)
    limits = core["mapping"]["inputs"]["mvm"]
    dac = params["xbar"]["dac"]["mvm"]
    v = convert_input(x * (2 if dac["signed"] else 1) / (limits["max"] - limits["min"]), dac)
    y = np.zeros((W.shape[0], x.shape[1]))
    run = {1: balanced, 2: bit_sliced, 3: offset}[core["style"]]
    for out in parts(W.shape[0], core["cols_max"], mapping["row_partition_strategy"]):
        for into in parts(W.shape[1], core["rows_max"], mapping["col_partition_strategy"]):
            y[out] += run(params, W[out, into] / top, v[into]) * top
    return y * (limits["max"] - limits["min"]) / (2 if dac["signed"] else 1)


def parts(size: int, limit: int, strategy: int) -> list[slice]:
    n = -(-size // limit) if limit else 1
    each = size // n if size % n == 0 else (limit if strategy == 1 else int(np.round(size / n)))
    starts = [each * i for i in range(n)]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], size], strict=True)]


def convert_input(v: np.ndarray, dac: Params) -> np.ndarray:
    if not dac["bits"]:
        return v
    low = -1 if dac["model"] == "SignMagnitudeDAC" else 0
    steps = 2 ** dac["bits"] - 1 + low
    return np.rint((v.clip(low, 1) - low) * steps / (1 - low)) / steps * (1 - low) + low


def bit_sliced(params: Params, w: np.ndarray, v: np.ndarray) -> np.ndarray:
    core = params["core"]
    total, slices = core["weight_bits"], core["bit_sliced"]["num_slices"]
    one_sided, unit = core["bit_sliced"]["style"] == 1, core["offset"]["style"] == 2
    p = total // slices if total % slices == 0 else -(-(total - one_sided) // slices)
    codes = np.rint(w * (2 ** (total - 1) - 1) + (0 if one_sided else 2 ** (total - 1)))
    rest, sign = np.abs(codes), np.sign(codes)
    g_min = off_conductance(params)
    y = 0.0
    for i in range(slices):
        digit = rest if i == slices - 1 else rest % 2**p
        rest = (rest - digit) / 2**p
        d = digit / (2**p - 1)
        if one_sided:
            (column,) = read(params, [d * (sign >= 0), d * (sign < 0)], v, i, g_min)
        else:
            top_digit = (2**p // 2) / (2**p - 1) if i == slices - 1 else 0.0
            rows = np.vstack([np.full((1, d.shape[1]), top_digit), d]) if unit else d
            (column,) = read(params, [rows], v, i, g_min)
            if unit:
                column = (column[1:] - column[0]) / (1 - g_min)
            else:
                column = (column - g_min * v.sum(0)) / (1 - g_min)
        y = y + 2.0 ** (i * p) * (2**p - 1) * (column / (1 - g_min) if one_sided else column)
    if not one_sided and not unit:
        y = y - 2 ** (total - 1) * v.sum(0)
    return y / (2 ** (total - 1) - 1)


def balanced(params: Params, w: np.ndarray, v: np.ndarray) -> np.ndarray:
    g_min, one_sided = off_conductance(params), params["core"]["balanced"]["style"] == 1
    pair = [w * (w > 0), -w * (w < 0)] if one_sided else [(1 + w) / 2, (1 - w) / 2]
    (column,) = read(params, [targets(params, d) for d in pair], v, 0, g_min)
    return column / (1 - g_min)


def offset(params: Params, w: np.ndarray, v: np.ndarray) -> np.ndarray:
    bits, g_min, unit = (
        params["xbar"]["device"]["cell_bits"],
        off_conductance(params),
        params["core"]["offset"]["style"] == 2,
    )
    lowest = 1 / (2**bits - 1) if bits else 0.0  # this level stays unused
    w = np.vstack([np.zeros((1, w.shape[1])), w]) if unit else w
    (column,) = read(params, [targets(params, lowest + (1 - lowest) * (w + 1) / 2)], v, 0, g_min)
    if unit:
        column = column[1:] - column[0]
    else:
        column = column - (g_min + (1 - g_min) * (lowest + (1 - lowest) / 2)) * v.sum(0)
    return 2 * column / (1 - g_min)


def targets(params: Params, d: np.ndarray) -> np.ndarray:
    levels = 2 ** params["xbar"]["device"]["cell_bits"] - 1
    return np.rint(d * levels) / levels if levels else d


def off_conductance(params: Params) -> float:
    device = params["xbar"]["device"]
    return 0.0 if device["infinite_on_off_ratio"] else device["Rmin"] / device["Rmax"]


def read(params: Params, cells: list[np.ndarray], v: np.ndarray, i: int, g_min: float) -> list[np.ndarray]:
    """Return the columns of slice i, converted, added over input slices and subtracted."""
    adc, dac, most = params["xbar"]["adc"]["mvm"], params["xbar"]["dac"]["mvm"], params["xbar"]["array"]["Icol_max"]
    separate = len(cells) == 2 and not params["core"]["balanced"]["subtract_current_in_xbar"]
    to_code = quantiser(params, v.shape[0], i) if adc["bits"] else lambda current: current

    def columns(v: np.ndarray) -> list[np.ndarray]:
        sums = [currents(params, g_min + d * (1 - g_min), v) for d in cells]
        sums = [s.clip(-most, most) for s in sums] if most else sums
        return sums if separate or len(sums) == 1 else [sums[0] - sums[1]]

    if not dac["input_bitslicing"]:
        total = [to_code(c) for c in columns(v)]
    else:
        size, magnitude = dac["slice_size"], dac["bits"] - dac["signed"]
        n, total = np.rint(np.abs(v) * (2**magnitude - 1)).astype(int), None
        for k in range(-(-magnitude // size)):
            worth = 2 ** (size * k) * (2**size - 1) / (2**magnitude - 1)
            found = columns(np.sign(v) * ((n >> size * k) % 2**size) / (2**size - 1))
            found = [worth * (to_code(c) if adc["adc_per_ibit"] else c) for c in found]
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        assert total is not None
        if not adc["adc_per_ibit"]:
            total = [to_code(c) for c in total]
    return [total[0] - total[1]] if separate else total


def quantiser(params: Params, rows: int, i: int) -> Callable[[np.ndarray], np.ndarray]:
    core, adc, dac = params["core"], params["xbar"]["adc"]["mvm"], params["xbar"]["dac"]["mvm"]
    sliced, bits = core["style"] == 2, adc["bits"]
    positive = not dac["signed"] and (
        core["bit_sliced"]["style"] == 3
        if sliced
        else core["style"] == 3 or not core["balanced"]["subtract_current_in_xbar"]
    )
    full = 2.0 ** (dac["bits"] - dac["signed"])
    if sliced:
        total, slices, one_sided = (
            core["weight_bits"],
            core["bit_sliced"]["num_slices"],
            core["bit_sliced"]["style"] == 1,
        )
        p = total // slices if total % slices == 0 else -(-(total - one_sided) // slices)
    if adc["adc_range_option"] == 1:
        low, high = adc["calibrated_range"][i] if sliced else adc["calibrated_range"]
    else:
        if adc["adc_range_option"] == 3:
            level = 1 / (2**p - 1) if sliced else 2.0 ** -core["weight_bits"]
            high = level * full / (full - 1) * (2**bits - 1 if positive else 2 ** (bits - 1) - 1)
        elif sliced and core["bit_sliced"]["style"] == 3:
            high = 2 ** np.round(np.log2(rows)) * 2**p / (2**p - 1) * full / (full - 1)
            high *= (2**bits - 1) / 2**bits if positive else (2**bits - 2) / 2**bits
        else:
            high = rows
        low = 0 if positive else -high
    steps = 2**bits - (2 if adc["model"] == "SignMagnitudeADC" else 1)

    def convert(current: np.ndarray) -> np.ndarray:
        level = (current.clip(low, high) - low) * steps / (high - low)
        tie = np.abs(level - np.floor(level) - 0.5)
        assert tie.min() > 1e-9, "a tie in floating point has no one answer: choose another range"
        return np.rint(level) * (high - low) / steps + low

    return convert


def currents(params: Params, G: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the column currents of G (out, in), relaxed until wires and cells agree on the voltages."""
    p, solver, r_min = params["xbar"]["array"]["parasitics"], params["simulation"], params["xbar"]["device"]["Rmin"]
    if not p["enable"]:
        return G @ v
    y = np.zeros((G.shape[0], v.shape[1]))
    for b in range(v.shape[1]):
        applied = np.tile(v[:, b], (G.shape[0], 1))
        V = applied.copy()
        for _ in range(solver["Niters_max_parasitics"]):
            current = G * V
            down = np.cumsum(current, 1)
            along = np.cumsum(current[::-1], 0)[::-1]
            drop = p["Rp_col"] / r_min * np.cumsum(down[:, ::-1], 1)[:, ::-1] + p["Rp_row"] / r_min * np.cumsum(
                along, 0
            )
            error = applied - drop - V
            if np.abs(error).max() < solver["Verr_th_mvm"]:
                break
            V += solver["relaxation_gamma"] * error
        else:
            raise AssertionError("did not converge")
        y[:, b] = (G * V).sum(1)
    return y
