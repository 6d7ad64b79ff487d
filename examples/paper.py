"""Run the paper's experiment from the adapters to exported results: python examples/paper.py --data data_bbh

Each step is a command, which the script prints before it runs it: convert LoraHub's 196 adapters of FLAN-T5-large,
plan, run LoRAFusion and its baselines on BIG-Bench Hard, write the report, and export an adapter for each task. This
needs a GPU with 80 GB. After an interruption, run the script again: it does not repeat finished steps.
docs/guides/paper.md explains the steps.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
LORAFUSION = (sys.executable, "-m", "lorafusion_jax.cli")
MATRIX = (sys.executable, str(ROOT / "experiments" / "bbh.py"))


def run(*command: str) -> None:
    print("$", shlex.join(command), flush=True)
    subprocess.run(command, check=True)


def main(
    data: Path,
    base: str = "google/flan-t5-large",
    adapters: tuple[str, ...] = (),
    out: Path = Path("runs/paper"),
    tasks: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5),
    options: tuple[str, ...] = ("--eval-batch", "8"),
) -> None:
    """Run the experiment.

    Args:
      data: LoraHub's folder data_bbh.
      base: folder or hub id of the base model.
      adapters: folders or hub ids of the adapters; by default LoraHub's 196.
      out: folder of the pool, the runs, the report and the exported adapters.
      tasks: names of tasks; by default all 27.
      seeds: seeds of every method.
      options: further options of experiments/bbh.py.
    """
    pool = out / "pool"
    if not pool.exists():
        sources = (
            ("--adapters", *adapters) if adapters else ("--adapters-file", "lorahub")
        )
        run(*LORAFUSION, "convert", "--base", base, *sources, "--out", str(pool))
    matrix = [
        *MATRIX,
        "--base",
        base,
        "--pool",
        str(pool),
        "--data",
        str(data),
        "--out",
        str(out),
        *options,
    ]
    matrix += ["--seeds", *map(str, seeds), *(("--tasks", *tasks) if tasks else ())]
    run(*matrix, "--plan")
    run(*matrix)
    for folder in sorted((out / "runs").glob("*-LoRAFusion-95+5-*")):
        task = folder.name.partition("-LoRAFusion-")[0]
        adapter = out / "adapters" / task
        if not adapter.exists():
            export = (
                "--run",
                str(folder),
                "--seed",
                str(seeds[0]),
                "--out",
                str(adapter),
            )
            run(*LORAFUSION, "export", *export)
    print(f"The report is {out / 'report' / 'report.html'}")


if __name__ == "__main__":
    tyro.cli(main)
