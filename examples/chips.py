"""Write a base and a pool onto chips, and compare fusions on them: python examples/chips.py

Nobody rewrites a cell after the first step. A fusion that was trained digitally loses accuracy on a chip; training its
digital parameters on that very chip wins a part of it back.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import lorafusion_jax as lf
from lorafusion_jax.hardware import (
    EvaluateOnChipsOptions,
    ProgramOptions,
    evaluate_on_chips,
    write_chips,
)
from lorafusion_jax.runs import OnArrays

EXAMPLES = Path(__file__).parent
SMALL = EXAMPLES / "small"
BASE = str(SMALL / "base")
POOL = str(SMALL / "adapters")


# Small, so that it takes a few minutes on a CPU. The defaults of `lf.FusionRecipe()` give better scores.
RECIPE = lf.FusionRecipe(modules=5, epochs=5)


def main(out: Path, digital: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    # Two independent draws of imperfect arrays, written once for every task. Matrices that a pattern of `digital` names
    # (as in "*.ff.*") stay digital.
    chips = out / "chips.json"
    config = EXAMPLES / "chip.yaml"
    programmed = write_chips(
        ProgramOptions(
            base=BASE,
            pool=POOL,
            crossbar=str(config),
            chips=2,
            keep_digital=digital,
            out=chips,
        )
    )
    print(
        f"{programmed['one_chip']['arrays']:,} arrays, {programmed['one_chip']['cells']:,} cells in each chip"
    )

    task = str(SMALL / "tasks" / "pairswap_numvow")
    options = lf.FuseOptions(
        base=BASE,
        pool=POOL,
        task=task,
        recipe=RECIPE,
        test_rows=50,
        out=out,
        name="digital",
    )
    options = dataclasses.replace(options, **changes)
    scores = {"digital": lf.fuse(options).exact_match}

    # The same numbers on both chips, and a month later, with the mean drift undone digitally.
    on_chips = EvaluateOnChipsOptions(
        run=out / "digital", crossbar=str(chips), ages=("1s", "1month"), compensate="on"
    )
    for row in evaluate_on_chips(on_chips)["rows"]:
        scores[f"digital parameters on chip {row['chip']} after {row['age']}"] = row[
            "exact_match"
        ]

    # Coefficients and magnitudes trained with chip 0 in the forward pass, and evaluated on it.
    arrays = OnArrays(crossbar=str(chips), train_chip="chip", chip=0)
    trained = lf.fuse(dataclasses.replace(options, arrays=arrays, name="chip"))
    scores["trained on chip 0"] = trained.exact_match
    for name, score in scores.items():
        print(f"{score:5.1f} %  {name}")
    return scores


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
