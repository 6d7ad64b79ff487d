"""The configurations of `crossbar/`, as CrossSim's parameters and as arrays."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np


def names(folder: Path) -> list[str]:
    """Return the names of all cases."""
    return [*_read(folder)["cases"]]


def parameters(folder: Path, name: str) -> dict[str, Any]:
    """Return all of CrossSim's parameters in a case."""
    read = _read(folder)
    params = copy.deepcopy(read["default"])
    for path, value in read["cases"][name]["changes"].items():
        *parents, last = path.split(".")
        part = params
        for parent in parents:
            part = part[parent]
        part[last] = value
    for part in (params["xbar"]["adc"], params["xbar"]["dac"], params["core"]["mapping"]["inputs"]):
        part["vmm"] = copy.deepcopy(part["mvm"])  # the transposed product, which no case uses
    return params


def load(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """Return what is told of a case, its parameters, and its arrays with the weights and inputs."""
    case, params = _read(folder)["cases"][name], parameters(folder, name)
    with np.load(folder / "inputs.npz") as inputs, np.load(folder / f"{name}.npz") as found:
        arrays = {key: found[key] for key in found.files}
        width, bits = case["width"], params["core"]["weight_bits"]
        arrays |= {"W": inputs[f"W_{width}"], "x": inputs[f"x_{width}"], "W_eff": inputs[f"W_eff_{width}_{bits}"]}
    return case, params, arrays


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "configurations.json").read_text())
