"""Make `aihwkit/` again with aihwkit 1.2 (IBM's Analog Hardware Acceleration Kit).

    python tests/goldens/make_aihwkit.py --out /tmp/aihwkit

The weights and inputs of `aihwkit/torch_inference_8b.npz` are taken as they are.
"""

import numpy as np
import seeded
import torch
from aihwkit.nn import AnalogLinearMapped
from aihwkit.simulator.configs import BoundManagementType, NoiseManagementType, TorchInferenceRPUConfig

NAME = "torch_inference_8b.npz"


def config() -> TorchInferenceRPUConfig:
    """Return tiles of at most 128 inputs, converters of 8 bits (254 steps from -1 to 1, -10 to 10), and no noise."""
    found = TorchInferenceRPUConfig()
    found.pre_post.input_range.enable = False
    found.mapping.weight_scaling_omega = 1.0
    found.mapping.max_input_size = found.mapping.max_output_size = 128
    found.forward.inp_res = found.forward.out_res = 1 / 254
    found.forward.inp_bound, found.forward.out_bound = 1.0, 10.0
    found.forward.out_noise = 0.0
    found.forward.bound_management = BoundManagementType.NONE
    found.forward.noise_management = NoiseManagementType.NONE
    return found


def main() -> None:
    """Write the product and the scales of the tiles."""
    out = seeded.target(seeded.HERE / "aihwkit")
    with np.load(seeded.HERE / "aihwkit" / NAME) as arrays:
        W, x = arrays["W"], arrays["x"]
    layer = AnalogLinearMapped(W.shape[1], W.shape[0], bias=False, rpu_config=config()).eval()
    layer.set_weights(torch.from_numpy(W))
    with torch.no_grad():
        y = layer(torch.from_numpy(x)).numpy()
    scale = np.array([float(tile.get_mapping_scales().max()) for tile in layer.analog_tiles()], np.float32)
    np.savez_compressed(out / NAME, W=W, x=x, y=y, scale=scale)


if __name__ == "__main__":
    main()
