"""Seeds x learning rates of fusion as one program, and a picture of what the rates do.

    python experiments/seed_sweep.py
    python experiments/seed_sweep.py --seeds 1 2 3 4 --lr-coefficients 0.03 0.1 0.3 --lr-magnitudes 0.01 0.03

Every pair of rates trains with every seed side by side: they are entries of the same array axis, batched on
accelerators, in turn on a CPU. Written to OUT: sweep.json and sweep.png.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _script
import numpy as np
import tyro
from lab.common import ROOT, SMALL, with_spread
from lab.tuning import train_trials

from lorafusion_jax import FuseOptions
from lorafusion_jax.parts import evaluate, prepare
from lorafusion_jax.report import plot, write_text
from lorafusion_jax.trials import ARMS, recipe_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Options of the sweep.

    Attributes:
      base: the base model, a folder, hub id or GGUF file.
      pool: a converted pool, or a folder of PEFT adapters.
      task: a task folder or file.
      seeds: each draws modules, starts and orders of rows.
      lr_coefficients: rates of the coefficients.
      lr_magnitudes: rates of the magnitudes.
      epochs: passes over the training rows.
      out: folder to write to.
    """

    base: str = str(SMALL / "base")
    pool: str = str(SMALL / "adapters")
    task: str = str(SMALL / "tasks" / "rotr_next")
    seeds: tuple[int, ...] = (101, 102, 103)
    lr_coefficients: tuple[float, ...] = (0.03, 0.1, 0.3)
    lr_magnitudes: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    epochs: int = 20
    out: Path = ROOT / "runs" / "seed_sweep"


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(SweepOptions, args=list(arguments), description=__doc__)
    recipe = dataclasses.replace(recipe_of(ARMS["LoRAFusion"]), epochs=options.epochs)
    shared = {"base": options.base, "pool": options.pool, "task": options.task, "recipe": recipe}
    pairs = list(itertools.product(options.lr_coefficients, options.lr_magnitudes))
    began = time.perf_counter()
    trials = [{"lr_coefficients": c, "lr_magnitudes": m} for c, m in pairs]
    run = FuseOptions(seeds=options.seeds, **shared)
    setup, params = train_trials(prepare(run), run, trials)
    found = evaluate(setup, params, batch_size=64)
    assert found.loss is not None
    shape = len(options.lr_coefficients), len(options.lr_magnitudes), len(options.seeds)
    scores, losses = (np.reshape(values, shape) for values in (found.exact_match, found.loss))
    seconds = time.perf_counter() - began
    options.out.mkdir(parents=True, exist_ok=True)
    summary = dataclasses.asdict(options) | {"exact_match": scores.tolist(), "loss": losses.tolist()}
    summary |= {"seconds": seconds, "seed_mode": setup.problem.seed_mode}
    write_text(options.out / "sweep.json", json.dumps(summary, default=str, indent=1) + "\n")
    _plot(scores, options)
    print(_table(scores, options))
    print(f"{scores.size} runs as one program ({setup.problem.seed_mode}) in {seconds:.0f} s; written to {options.out}")


def _table(scores: np.ndarray, options: SweepOptions) -> str:
    """Return exact match, mean and standard deviation over the seeds, as a Markdown table."""
    head = " | ".join(f"magnitudes {rate:g}" for rate in options.lr_magnitudes)
    lines = [f"| exact match, % | {head} |", "|---|" + "---:|" * len(options.lr_magnitudes)]
    for rate, row in zip(options.lr_coefficients, scores, strict=True):
        lines.append(f"| coefficients {rate:g} | {' | '.join(map(with_spread, row))} |")
    return "\n".join(lines)


def _plot(scores: np.ndarray, options: SweepOptions) -> None:
    means = scores.mean(axis=2)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        image = axes.imshow(means, cmap="viridis", aspect="auto")
        axes.grid(visible=False)
        for (i, j), value in np.ndenumerate(means):
            dark = value < (means.min() + means.max()) / 2
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black")
        axes.set_xticks(range(len(options.lr_magnitudes)), [f"{rate:g}" for rate in options.lr_magnitudes])
        axes.set_yticks(range(len(options.lr_coefficients)), [f"{rate:g}" for rate in options.lr_coefficients])
        axes.set(xlabel="learning rate of the magnitudes", ylabel="learning rate of the coefficients")
        figure.colorbar(image, ax=axes).set_label(f"exact match, %, mean of {scores.shape[2]} seeds")
        figure.suptitle(Path(options.task).stem, x=0.01, ha="left", size=12)

    plot(options.out / "sweep.png", (1.1 * means.shape[1] + 2.4, 0.7 * means.shape[0] + 1.6), draw)


if __name__ == "__main__":
    _script.run(main)
