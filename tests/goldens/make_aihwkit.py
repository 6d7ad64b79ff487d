"""Make `aihwkit/` again with aihwkit (IBM's Analog Hardware Acceleration Kit).

    python tests/goldens/make_aihwkit.py --out /tmp/aihwkit

The weights and inputs of `aihwkit/torch_inference_8b.npz` are taken as they are.
"""

import json
from pathlib import Path

import numpy as np
import seeded
import torch
from aihwkit.inference import (
    GlobalDriftCompensation,
    PCMLikeNoiseModel,
    ReRamCMONoiseModel,
    ReRamWan2022NoiseModel,
    SinglePairConductanceConverter,
)
from aihwkit.nn import AnalogLinear, AnalogLinearMapped
from aihwkit.simulator.configs import (
    BoundManagementType,
    NoiseManagementType,
    TorchInferenceRPUConfig,
)

NAME = "torch_inference_8b.npz"
HOUR = 3600.0
DAY = 86_400.0
YEAR = 365 * 86_400.0
DRAWS = 40  # chips of every technology and age
READS = 200  # of one input by the default configuration


def config():
    """Return tiles of at most 128 inputs, converters of 8 bits (254 steps from -1 to 1, -10 to 10), and no noise."""
    found = TorchInferenceRPUConfig()
    found.pre_post.input_range.enable = False
    found.mapping.weight_scaling_omega = 1.0
    found.mapping.max_input_size = found.mapping.max_output_size = 128
    found.forward.inp_res = found.forward.out_res = 1 / 254
    found.forward.inp_bound = 1.0
    found.forward.out_bound = 10.0
    found.forward.out_noise = 0.0
    found.forward.bound_management = BoundManagementType.NONE
    found.forward.noise_management = NoiseManagementType.NONE
    return found


def layer_of(W, kind, config):
    """Return a layer that holds the weights, for inference."""
    layer = kind(W.shape[1], W.shape[0], bias=False, rpu_config=config).eval()
    layer.set_weights(torch.from_numpy(W))
    return layer


def technologies():
    """Return noise models in pairs of cells, and their ages.

    ReRAM of CMO is by default one cell for each weight; its read noise, which this package's model lacks, is left out.
    """
    cmo = ReRamCMONoiseModel(
        g_max=88.19, g_min=9.0, acceptance_range=2, read_noise_scale=0.0
    )
    cmo.g_converter = SinglePairConductanceConverter(g_max=88.19, g_min=9.0)
    return {
        "pcm": (PCMLikeNoiseModel(), (HOUR, DAY, YEAR)),
        "reram": (ReRamWan2022NoiseModel(g_max=40.0), (1.0, DAY, 2 * DAY)),
        "cmo": (cmo, (HOUR, DAY, YEAR)),
    }


def drifted(W):
    """Return the factor of global drift compensation, and relative errors of the weights without and with it.

    Means over chips, and the standard deviation of the factor. Both cells of a pair drift; `drift_analog_weights` takes
    their difference first, and scales it by the largest programmed weight.
    """
    weights = torch.from_numpy(W)
    readout = GlobalDriftCompensation().readout
    found = {}
    for name, (noise, ages) in technologies().items():
        rows = {age: [] for age in ages}
        for seed in range(DRAWS):
            torch.manual_seed(1000 + seed)  # the weights are those of a small seed
            fresh = readout(
                noise.apply_programming_noise(weights)[0].T
            )  # outputs of one-hot inputs
            for age in ages:
                held = noise.apply_noise(weights, age)
                factor = fresh / readout(held.T)
                errors = [
                    (torch.linalg.norm(each - weights) / torch.linalg.norm(weights))
                    for each in (held, factor * held)
                ]
                rows[age].append([factor, *errors])
        found[name] = {}
        for age, of_age in rows.items():
            factor, error, compensated = np.mean(of_age, axis=0)
            spread = np.std(of_age, axis=0)[0]
            means = {
                "factor": factor,
                "spread": spread,
                "error": error,
                "compensated": compensated,
            }
            found[name][f"{age:g}"] = {
                key: float(f"{value:.6g}") for key, value in means.items()
            }
    return found


def by_default(W, x):
    """Return products of `InferenceRPUConfig()` without its output noise, and the noise of many reads of one input.

    Its converters have absolute bounds: the weights are divided by their largest.
    """
    W = W / np.abs(W).max()
    quiet = TorchInferenceRPUConfig()
    quiet.forward.out_noise = 0.0
    x = torch.from_numpy(x)
    with torch.no_grad():
        y = layer_of(W, AnalogLinear, quiet)(x).numpy()
        noisy = layer_of(W, AnalogLinear, TorchInferenceRPUConfig())(
            x[:1].repeat(READS, 1)
        ).numpy()
    return {"y": y, "spread": np.std(noisy - y[:1], axis=0)}


def main():
    """Write the products, the scales of the tiles, and what drift compensation does."""
    out = seeded.target(seeded.HERE / "aihwkit")
    with np.load(seeded.HERE / "aihwkit" / NAME) as arrays:
        W = arrays["W"]
        x = arrays["x"]
    layer = layer_of(W, AnalogLinearMapped, config())
    with torch.no_grad():
        y = layer(torch.from_numpy(x)).numpy()
    scale = np.array(
        [float(tile.get_mapping_scales().max()) for tile in layer.analog_tiles()],
        np.float32,
    )
    np.savez_compressed(out / NAME, W=W, x=x, y=y, scale=scale)
    np.savez_compressed(out / "default.npz", **by_default(W, x))
    Path(out / "drift.json").write_text(json.dumps(drifted(W), indent=1) + "\n")


if __name__ == "__main__":
    main()
