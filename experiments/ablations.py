"""Ablations of fusion, its controls, and the data-free merges of PEFT, on the embedded small pool.

    python experiments/ablations.py                                  # all groups
    python experiments/ablations.py --groups modules controls         # some of them
    python experiments/ablations.py --groups modules --counts 5 20 100 --base BASE --pool POOL --tasks TASK

Every setting is a row of a table next to plain fusion, at fusion's learning rates. Results are rows of
OUT/results.jsonl; interrupted, the same command continues.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import _script
import tyro
from lab.common import ROOT
from lab.matrix import Arm
from lab.methods import ARMS, COEFFICIENTS
from results_page import run_and_report
from small_pool import SmallPoolOptions

from lorafusion_jax.adapters import MergeKind

Group = Literal[
    "modules",
    "examples",
    "granularity",
    "composition",
    "start",
    "bits",
    "pruning",
    "controls",
    "merges",
]

_FUSION = ARMS["LoRAFusion"]
_COEFFICIENTS = ARMS["coefficients only"]
# The svd forms of ties and its like sum dW in full: the same idea, at the price of a decomposition a matrix.
_MERGES: tuple[MergeKind, ...] = (
    "linear",
    "cat",
    "svd",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationOptions(SmallPoolOptions):
    """Options of the ablations.

    Attributes:
      groups: the settings to vary; all by default.
      counts: modules that a seed draws, in the group modules.
      examples: rows to learn from, in the group examples.
      out: folder of results.jsonl and the runs; what is there already is not run again.
    """

    groups: tuple[Group, ...] = get_args(Group)
    counts: tuple[int, ...] = (1, 2, 5, 10, 20, 28)
    examples: tuple[int, ...] = (5, 10, 20, 50, 100)
    out: Path = ROOT / "runs" / "ablations"


def main(arguments: Sequence[str] = ()) -> None:
    options = tyro.cli(AblationOptions, args=list(arguments), description=__doc__)
    for group in options.groups:
        entries = entries_of(group, options)
        print(f"{group}: {len(entries)} settings", file=sys.stderr, flush=True)
        within = dataclasses.replace(options, out=options.out / group)
        run_and_report(within, entries, f"Ablation: {group}", next(iter(entries)))


def entries_of(group: Group, options: AblationOptions) -> Mapping[str, Arm]:
    """Return the settings of a group by the names of their rows, the one to compare with first."""
    if group == "modules":
        return {
            f"{n} modules": _with(_FUSION, modules=n)
            for n in sorted(options.counts, reverse=True)
        }
    if group == "examples":
        pairs = {"LoRAFusion": _FUSION, "LoRA": ARMS["LoRA"]}
        return {
            f"{name}, {n} examples": dataclasses.replace(entry, train_rows=n)
            for n in sorted(options.examples, reverse=True)
            for name, entry in pairs.items()
        }
    if group == "granularity":
        sizes = ("block", "global", "site", "rank")
        entries = {f"{size}, both": _with(_FUSION, granularity=size) for size in sizes}
        return entries | {"coefficients only, block": _COEFFICIENTS} | COEFFICIENTS
    if group == "composition":
        mix = ARMS["LoRAFusion, mix"]
        return {
            "sum, both": _FUSION,
            "mix, both": mix,
            "sum, coefficients": _COEFFICIENTS,
            "mix, coefficients": _with(_COEFFICIENTS, composition="mix"),
            "sum, norm differentiated": _with(_FUSION, differentiate_norm=True),
        }
    if group == "start":
        return {
            f"from {start}": _with(_FUSION, start=start)
            for start in ("uniform", "xavier", "zeros")
        }
    if group == "bits":
        return {
            "float32": _FUSION,
            "int8": dataclasses.replace(_FUSION, load_in="int8"),
            "nf4": dataclasses.replace(_FUSION, load_in="nf4"),
        }
    if group == "pruning":
        return {
            f"{share:.0%} of magnitudes at zero": _with(_FUSION, prune=share)
            for share in (0.0, 0.05, 0.15, 0.3, 0.5)
        }
    if group == "controls":
        return {
            "LoRAFusion": _FUSION,
            "random pool": ARMS["random pool"],
            "shuffled layers": dataclasses.replace(_FUSION, control="shuffled"),
            "coefficients only": _COEFFICIENTS,
            "coefficients only, random pool": dataclasses.replace(
                _COEFFICIENTS, control="random-factors"
            ),
            "coefficients only, shuffled layers": dataclasses.replace(
                _COEFFICIENTS, control="shuffled"
            ),
            # As near to fusion's numbers as a LoRA comes: rank 1, on v alone.
            "LoRA of equal size": _with(ARMS["LoRA"], lora_rank=1, lora_targets=("v",)),
        }
    merges = {
        f"merge, {kind}": Arm(method="merge", recipe={"merge": kind})
        for kind in _MERGES
    }
    return {"uniform mean": ARMS["uniform mean"]} | merges


def _with(entry: Arm, **recipe: object) -> Arm:
    return dataclasses.replace(entry, recipe=entry.recipe | recipe)


if __name__ == "__main__":
    _script.run(main)
