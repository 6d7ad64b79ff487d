"""Make `mlx/` again with mlx-lm, in an environment of its own.

python tests/goldens/make_mlx.py --out /tmp/mlx
"""

import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import seeded
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model, save_config

# As mlx-lm writes them, less the fields of its training.
ADAPTERS = {
    "lora": {
        "fine_tune_type": "lora",
        "num_layers": 1,
        "lora_parameters": {"rank": 2, "dropout": 0.0, "scale": 5.0},
    },
    "dora": {
        "fine_tune_type": "dora",
        "num_layers": -1,
        "lora_parameters": {
            **{"rank": 3, "dropout": 0.0, "scale": 1.5},
            "keys": ["self_attn.q_proj", "mlp.down_proj"],
        },
    },
}
ROWS = [[2, 17, 90, 255, 31, 4, 8, 1]]


def main(out):
    """Write an adapter of each kind, and the logits of the base with it."""
    logits = {}
    with tempfile.TemporaryDirectory() as folder:
        base = seeded.unfold(Path(folder)) / "fusion/llama/base"
        for name, fields in ADAPTERS.items():
            model, _ = load_model(base)
            model.freeze()
            dora = fields["fine_tune_type"] == "dora"
            linear_to_lora_layers(
                model, fields["num_layers"], fields["lora_parameters"], use_dora=dora
            )
            weights = {}
            for key, array in tree_flatten(model.trainable_parameters()):
                values = seeded.normal(f"mlx/{name}/{key}", array.shape, 0.1)
                weights[key] = (
                    mx.array(values)
                    if array.ndim == 2
                    else array * (1 + mx.array(values))
                )
            (out / name).mkdir(exist_ok=True)
            mx.save_safetensors(str(out / name / "adapters.safetensors"), weights)
            save_config(
                fields | {"model": "llama-4bit"}, out / name / "adapter_config.json"
            )
            model = load_adapters(load_model(base)[0], out / name)
            logits[name] = np.array(model(mx.array(ROWS)))
    np.savez_compressed(out / "logits.npz", rows=np.array(ROWS), **logits)


if __name__ == "__main__":
    main(seeded.target(seeded.HERE / "mlx"))
