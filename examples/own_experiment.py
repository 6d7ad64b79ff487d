"""An experiment of your own, from rows to a table: python examples/own_experiment.py

For more than a few runs, use `lf.trials.ResultRows` or `lf.trials.run_jobs`: only what is missing runs.
"""

import tempfile
from pathlib import Path
from typing import Any

import lorafusion_jax as lf

SMALL = Path(__file__).parent / "small"


def main(
    out: Path,
    methods: tuple[str, ...] = ("zero-shot", "magnitudes", "fusion", "lora"),
    **options: Any,
) -> str:
    lines = [["method", "trained parameters", "exact match, %", "loss"]]
    for method in methods:
        pool = str(SMALL / "adapters") if lf.METHODS[method].pool else None
        shared: dict[str, Any] = {
            "base": str(SMALL / "base"),
            "task": str(SMALL / "tasks" / "pairswap_numvow"),
        } | options
        results = lf.fuse(
            lf.FuseOptions(pool=pool, method=method, out=out, name=method, **shared)
        )
        losses = [seed["loss"] for seed in results.seeds if seed["loss"] is not None]
        loss = sum(losses) / len(losses)
        lines.append(
            [
                method,
                f"{results.trainable:,}",
                f"{results.exact_match:.1f}",
                f"{loss:.2f}",
            ]
        )
    return lf.report.as_markdown(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(main(Path(folder), recipe=lf.Recipe(epochs=20), seeds=(1, 2)))
