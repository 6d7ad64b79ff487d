"""CrossSim 3.2's parameters as a crossbar configuration.

What CrossSim has and this package lacks raises Inexpressible, so that no golden is ever compared with another model.
"""

import copy
import math
from typing import Any

import jax
import numpy as np

from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    RERAM_MILO_2021,
    Cell,
    CrossbarConfig,
    Device,
    Encoding,
    Geometry,
    Independent,
    Mapping,
    Polynomial,
    Proportional,
    ReadNoise,
    Tile,
    Wire,
)

Params = dict[str, Any]

BALANCED, BITSLICED, OFFSET = 1, 2, 3
CALIBRATED, MAX, GRANULAR = 1, 2, 3


class Inexpressible(Exception):
    """CrossSim can be asked for this, the crossbar model cannot."""


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


def require(met: bool, what: str) -> None:
    if not met:
        raise Inexpressible(what)


def convert(params: dict[str, Any], W: np.ndarray) -> tuple[CrossbarConfig, np.ndarray]:
    """Return the configuration, and the weights [in, out] that CrossSim's cores receive, of W [out, in]."""
    core, xbar = params["core"], params["xbar"]
    weights = clipped(core["mapping"]["weights"], np.asarray(W, float))
    rows, cols = (sizes(core, n, axis) for n, axis in ((W.shape[1], "rows"), (W.shape[0], "cols")))
    encoding, cell, mapping = cells(core, xbar["device"])
    dac, limit = inputs(core["mapping"]["inputs"]["mvm"], xbar["dac"]["mvm"])
    adc = outputs(params, rows, encoding, dac)
    array = xbar["array"]
    require(dac is not None or (adc is None and not array["Icol_max"]), "currents of real-valued inputs have no unit")
    tile = Tile(
        rows=core["rows_max"] or None,
        cols=core["cols_max"] or None,
        partition=strategy(core, W, rows, cols),
        wire=wire(params, rows, encoding),
        current_limit=array["Icol_max"] or None,
    )
    config = CrossbarConfig(
        cell=cell,
        encoding=encoding,
        mapping=mapping,
        tile=tile,
        dac=None if dac is None else DAC(**dac, scaling="fixed", limit=limit),
        adc=adc,
        device=device(xbar["device"]),
    )
    return config, weights.T


def clipped(mapping: dict[str, Any], W: np.ndarray) -> np.ndarray:
    """Return what AnalogCore.set_matrix passes on: its full scale is the largest entry."""
    percentile = mapping["percentile"]
    if percentile is None:
        require(mapping["min"] == -mapping["max"], "one full scale for both signs of weights")
        top = mapping["max"]
    elif percentile < 1:
        top = np.abs(np.percentile(W, [100 * percentile, 100 - 100 * percentile])).max()
    else:
        top = percentile * np.abs(W).max()
    require(np.isclose(top, np.abs(W).max()) or top < np.abs(W).max(), "a full scale beyond the largest weight")
    require(mapping["clipping"] or percentile == 1, "weights beyond the full scale")
    return W.clip(-top, top)


def sizes(core: dict[str, Any], size: int, axis: str) -> tuple[int, ...]:
    """Return the parts of an axis (analog_core.py): CrossSim calls inputs columns where this package says rows."""
    limit = core[f"{axis}_max"]
    parts = (size - 1) // limit + 1 if limit else 1
    if size % parts == 0:
        return (size // parts,) * parts
    # A matrix is (out, in): the strategy for its columns cuts an array's rows.
    name = "col" if axis == "rows" else "row"
    equal = core["mapping"]["weights"][f"{name}_partition_strategy"] == 2
    each = round(size / parts) if equal else limit
    return (each,) * (parts - 1) + (size - (parts - 1) * each,)


def strategy(core: dict[str, Any], W: np.ndarray, rows: tuple[int, ...], cols: tuple[int, ...]) -> Any:
    for how in ("equal", "full"):
        tile = Tile(rows=core["rows_max"] or None, cols=core["cols_max"] or None, partition=how)
        geometry = Geometry.of(W.T.shape, CrossbarConfig(tile=tile))
        if (geometry.rows, geometry.cols) == (rows, cols):
            return how
    raise Inexpressible(f"arrays of {rows} rows and {cols} columns")


def cells(core: dict[str, Any], device: dict[str, Any]) -> tuple[Encoding, Cell, Mapping]:
    style, bits, unit = core["style"], device["cell_bits"], core["offset"]["style"] == 2
    ratio = None if device["infinite_on_off_ratio"] else device["Rmax"] / device["Rmin"]
    if style == BITSLICED:
        total, slices = core["weight_bits"], core["bit_sliced"]["num_slices"]
        balanced = core["bit_sliced"]["style"] == BALANCED
        per_slice = math.ceil((total - (balanced and total % slices > 0)) / slices)
        require(bits in (0, per_slice), "cells with other levels than their slice")
        require(balanced or not unit or per_slice * slices == total, "a unit column that does not hold the zero")
        encoding = Encoding() if balanced else Encoding(kind="offset", unit_column=unit)
        return encoding, Cell(bits=(per_slice,) * slices, on_off_ratio=ratio), Mapping(weight_bits=total)
    if style == BALANCED:
        two_sided = core["balanced"]["style"] == 2
        require(not (two_sided and bits), "two-sided cells without a level for zero")
        encoding, weight_bits = Encoding(two_sided=two_sided), bits + 1
    else:
        # CrossSim leaves the lowest level unused: 2^(b-1) levels about it, as in offset encoding of b-bit weights.
        encoding, weight_bits = Encoding(kind="offset", unit_column=unit), bits
    cell = Cell(bits=(bits,) if bits else None, on_off_ratio=ratio)
    return encoding, cell, Mapping(weight_bits=weight_bits if bits else None)


def gain(params: dict[str, Any]) -> float:
    """Return by how much CrossSim's outputs differ: its unsliced offset core scales by more levels than it uses."""
    bits = params["xbar"]["device"]["cell_bits"]
    return (2**bits - 2) / (2**bits - 1) if params["core"]["style"] == OFFSET and bits else 1.0


def inputs(mapping: dict[str, Any], dac: dict[str, Any]) -> tuple[dict[str, Any] | None, float]:
    require(mapping["percentile"] is None, "input ranges from each call's inputs")
    if not dac["bits"]:
        return None, 1.0
    signed = dac["signed"]
    require(dac["model"] == ("SignMagnitudeDAC" if signed else "QuantizerDAC"), f"{dac['model']}, signed: {signed}")
    require(mapping["min"] == (-mapping["max"] if signed else 0), "inputs about another point than zero")
    magnitude = dac["bits"] - signed
    require(not dac["input_bitslicing"] or dac["slice_size"] <= magnitude, "slices of more bits than the input")
    slice_bits = dac["slice_size"] if dac["input_bitslicing"] else None
    return {"bits": dac["bits"], "slice_bits": slice_bits, "signed": signed}, mapping["max"]


def outputs(
    params: dict[str, Any], rows: tuple[int, ...], encoding: Encoding, dac: dict[str, Any] | None
) -> ADC | None:
    core, adc = params["core"], params["xbar"]["adc"]["mvm"]
    if not adc["bits"]:
        return None
    require(dac is not None, "an ADC's range for real-valued inputs")
    require(adc["model"] in ("QuantizerADC", "SignMagnitudeADC") and not adc["stochastic_rounding"], adc["model"])
    limits = [adc_limits(params, height) for height in (rows if len(set(rows)) > 1 else rows[:1])]
    separate = encoding.kind == "differential" and not core["balanced"]["subtract_current_in_xbar"]
    bits, low, high = adc["bits"], *np.moveaxis(np.asarray(limits), 2, 0)
    if not (params["xbar"]["dac"]["mvm"]["signed"] or (encoding.kind == "differential" and not separate)):
        if adc["model"] == "SignMagnitudeADC":  # half of its codes, for sums that are never negative
            bits, low = bits - 1, np.zeros_like(low)
        require(bool((low == 0).all()), "an ADC with negative codes for sums that are never negative")
    else:
        require(adc["model"] == "SignMagnitudeADC", "an even number of levels about zero")
    given = np.stack([low, high], axis=-1)
    return ADC(
        bits=bits,
        range="given",
        limits=given[0] if len(given) == 1 else given,
        separate=separate,
        convert="slice" if adc["adc_per_ibit"] else "sum",
    )


def adc_limits(params: dict[str, Any], rows: int) -> list[list[float]]:
    """Return each slice's range for an array of `rows` (iadc.py)."""
    core, adc, dac = params["core"], params["xbar"]["adc"]["mvm"], params["xbar"]["dac"]["mvm"]
    sliced, option = core["style"] == BITSLICED, adc["adc_range_option"]
    slices = core["bit_sliced"]["num_slices"] if sliced else 1
    if option == CALIBRATED:
        return [list(pair) for pair in adc["calibrated_range"]] if sliced else [list(adc["calibrated_range"])]
    magnitude = 2.0 ** (dac["bits"] - dac["signed"])
    correction = magnitude / (magnitude - 1)
    balanced = (core["bit_sliced"]["style"] if sliced else core["style"]) == BALANCED
    subtracted = balanced and (sliced or core["balanced"]["subtract_current_in_xbar"])
    signed = dac["signed"] or subtracted
    codes = 2 ** (adc["bits"] - 1) - 1 if signed else 2 ** adc["bits"] - 1
    if sliced:
        total = core["weight_bits"]
        p = math.ceil((total - (balanced and total % slices > 0)) / slices)
    if option == GRANULAR:
        step = correction * (1 / (2**p - 1) if sliced else 2.0 ** -core["weight_bits"])
        top = step * codes
    elif sliced and not balanced:
        share = (2 ** adc["bits"] - (2 if signed else 1)) / 2 ** adc["bits"]
        top = 2.0 ** round(math.log2(rows)) * 2**p / (2**p - 1) * share * correction
    else:
        top = float(rows)
    return [[-top if signed else 0.0, top]] * slices


def wire(params: dict[str, Any], rows: tuple[int, ...], encoding: Encoding) -> Wire | None:
    p, device, solver = params["xbar"]["array"]["parasitics"], params["xbar"]["device"], params["simulation"]
    if not p["enable"] or not (p["Rp_row"] or p["Rp_col"]):
        return None
    require(p["current_from_input"], "currents from a supply line")
    require(not params["core"]["balanced"]["interleaved_posneg"], "positive and negative cells on one column")
    require(not (p["Rp_row_terminal"] or p["Rp_col_terminal"]), "resistance of the terminals")
    require(not encoding.unit_column, "a unit column next to the drivers")
    require(len(set(rows)) == 1 or device["infinite_on_off_ratio"], "arrays of unequal height whose cells all conduct")
    return Wire(
        row_resistance=p["Rp_row"] / device["Rmin"],
        column_resistance=p["Rp_col"] / device["Rmin"],
        tolerance=solver["Verr_th_mvm"],
        iterations=solver["Niters_max_parasitics"],
        relaxation=solver["relaxation_gamma"],
    )


def device(params: dict[str, Any]) -> Device:
    require(not params["drift_error"]["enable"] and not params["nonlinear_IV"]["enable"], "drift or nonlinear cells")
    read = params["read_noise"]
    noise = None
    if read["enable"] and read["model"] != "IdealDevice":
        kinds = {"NormalIndependentDevice": "independent", "NormalProportionalDevice": "proportional"}
        require(read["model"] in kinds, f"read noise of {read['model']}")
        noise = ReadNoise(read["magnitude"], kinds[read["model"]], clip=True)
    clip = "range" if params["clip_conductance"] else "positive"
    return Device(programming=programming(params), read_noise=noise, clip=clip)


def programming(params: dict[str, Any]) -> Any:
    """Return the model that a device's name stands for (generic_device.py and devices/custom)."""
    error = params["programming_error"]
    sigma, siemens = error["magnitude"], 1e6 / params["Rmin"]  # Gmax in uS
    models = {
        "IdealDevice": None,
        "NormalIndependentDevice": Independent(sigma),
        "NormalProportionalDevice": Proportional(sigma),
        "UniformIndependentDevice": lambda G, key, _: G + sigma * jax.random.uniform(key, G.shape, G.dtype, -0.5, 0.5),
        "PCMJoshi": Polynomial(((0.28638599 / siemens, 0.07585724, -0.00178767 * siemens),)),
        "RRAMMilo": RERAM_MILO_2021,
        "RRAMWan": Polynomial(((1.053 / siemens, 0.2374, -1.167e-2 * siemens, 1.536e-4 * siemens**2),)),
    }
    if not error["enable"]:
        return None
    require(error["model"] in models, f"programming error of {error['model']}")
    return models[error["model"]]
