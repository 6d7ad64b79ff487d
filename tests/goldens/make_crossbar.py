"""Make `crossbar/` again with a checkout of CrossSim 3.2.

    PYTHONPATH=path/to/cross-sim python tests/goldens/make_crossbar.py --out /tmp/crossbar

The weights and inputs of `crossbar/inputs.npz` and the parameters of `crossbar/configurations.json` are taken as they
are; outputs, conductances, input slices, effective weights and limits of converters are computed.
"""

import json
from typing import Any

import crossbar_cases
import numpy as np
import seeded
from simulator import AnalogCore, CrossSimParameters

FOLDER = seeded.HERE / "crossbar"


def deterministic(params: dict[str, Any], W: np.ndarray, x: np.ndarray) -> tuple[dict[str, np.ndarray], dict]:
    """Return the arrays of a case without noise, and what the configurations tell of it."""
    core = AnalogCore(W.astype(np.float64), params=CrossSimParameters(**params))
    first = core.cores[0][0]  # the first row tile
    rows = int(core.NcolsVec[0])
    found = {"y": core.matmat(x.astype(np.float64)), "W_eff": core.get_matrix().astype(np.float32)}
    for number, arrays in enumerate(first.core_slices):
        names = ("p", "n") if len(arrays) == 2 else ("o",)
        for name, array in zip(names, arrays, strict=True):
            found[f"G_s{number}_{name}"] = np.asarray(array._read_matrix(), np.float32)
    if params["xbar"]["dac"]["mvm"]["input_bitslicing"]:
        slices = first.dac.mvm.convert_sliced(x[:rows, 0].astype(np.float64))
        found["x_slices_tile0_col0"] = np.stack([np.asarray(part) for part in slices])
    limits = None
    if params["xbar"]["adc"]["mvm"]["bits"] > 0:
        limits = [[float(adc.mvm.min), float(adc.mvm.max)] for adc in first.adcs]
    return found, {"tile_input_sizes": [int(size) for size in core.NcolsVec], "adc_limits": limits}


def noisy(params: dict[str, Any], W: np.ndarray, x: np.ndarray, y: np.ndarray, draws: int) -> dict[str, np.ndarray]:
    """Return mean and standard deviation of the error of many chips, every one programmed anew."""
    errors = []
    for seed in range(draws):
        np.random.seed(seed)  # noqa: NPY002, CrossSim draws from NumPy's global state
        errors.append(AnalogCore(W.astype(np.float64), params=CrossSimParameters(**params)).matmat(x) - y)
    return {"err_mean": np.mean(errors, axis=0, dtype=float), "err_std": np.std(errors, axis=0, dtype=float)}


def main() -> None:
    """Write all cases to a folder."""
    out = seeded.target(FOLDER)
    configurations = json.loads((FOLDER / "configurations.json").read_text())
    inputs = dict(np.load(FOLDER / "inputs.npz"))
    without_noise = None
    for name in crossbar_cases.names(FOLDER):
        case, params, arrays = crossbar_cases.load(FOLDER, name)
        if "draws" in case:  # the same configuration without noise comes first
            assert without_noise is not None
            found = noisy(params, arrays["W"], arrays["x"], without_noise, case["draws"])
            found = {key: array.astype(np.float32) for key, array in found.items()}
        else:
            found, told = deterministic(params, arrays["W"], arrays["x"])
            configurations["cases"][name] |= told
            inputs[f"W_eff_{case['width']}_{params['core']['weight_bits']}"] = found.pop("W_eff")
            if not case["changes"]:
                without_noise = found["y"]
        np.savez_compressed(out / f"{name}.npz", **found)
    np.savez_compressed(out / "inputs.npz", **inputs)
    (out / "configurations.json").write_text(json.dumps(configurations, indent=1) + "\n")


if __name__ == "__main__":
    main()
