"""Train four seeds on a mesh of four devices: python examples/sweep_on_a_mesh.py

Seeds exchange nothing, so each device trains seeds of its own, in one program. The devices here are cores of a CPU that
XLA is told to take for four; on a host of four GPUs leave out the flag.
"""

import os
import tempfile
from pathlib import Path

# XLA reads the flag when JAX starts its backend, so set it before the first use of JAX.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import lorafusion_jax as lf

SMALL = Path(__file__).parent / "small"


def main(
    out: Path, recipe: lf.Recipe = lf.PRESETS["default"], test_rows: int | None = None
) -> lf.runs.RunResults:
    options = lf.FuseOptions(
        base=str(SMALL / "base"),
        pool=str(SMALL / "adapters"),  # a folder of PEFT adapters, or a converted pool
        task=str(SMALL / "tasks" / "sort_next2"),
        seeds=(1, 2, 3, 4),  # a multiple of the mesh's axis `seed`
        mesh="seed=4",  # `seed=2,model=2` also splits the matrices
        recipe=recipe,
        test_rows=test_rows,
        out=out,
        name="mesh",
    )
    results = lf.fuse(options)
    for seed in results.seeds:
        print(
            f"seed {seed['seed']}: {seed['exact_match']:.1f} %, loss {seed['loss']:.3f}"
        )
    print(f"mean: {results.exact_match:.1f} %")

    # A run can be read again, on any number of devices; trained parameters have an axis of seeds.
    _, params, config = lf.load_run(out / "mesh")
    print(
        f"coefficients: {params['coefficients'].shape}; seed 1 fuses {', '.join(config['modules'][0][:3])}, ..."
    )
    return results


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
