"""The fusion step, optimiser included, against its floor, taking turns in one process.

    python benchmarks/fusion_step.py --shape flan-t5-small --cores 1 [--json]
    python benchmarks/fusion_step.py --shape flan-t5-large --basis 32

Floor: forward and backward to activations only of the same base on the same batch, without adapters or fusion, layers
unrolled or scanned: in each round the faster one. With --basis the sum is also measured in a shared basis. The
reference protocol's steps: batch 5, 128 source and 8 target tokens, 20 modules of rank 16 on q and v, random weights.
Ratios are medians over rounds of turns.
"""

from typing import Any

import _measure
import jax
import numpy as np
from _measure import case, features, in_turns, of_turns, product_rates
from _model import (
    BATCH,
    MODULES,
    RANK,
    SOURCE,
    TARGET,
    Dtype,
    Floor,
    Step,
    config_of,
    frozen,
    in_basis,
    shape_parser,
    unrolled,
)

from lorafusion_jax import FusionRecipe
from lorafusion_jax.estimates import Settings, Shape, program_of

_DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "nf4")
# (required, ambition) by composition and structure; a sum's depend on the shape, for want of others those of small.
_MIX = {"unrolled": (1.15, 1.08), "scanned": (1.22, 1.08)}
_SUM = {"flan-t5-small": 1.40, "flan-t5-large": 1.20}
_BASIS = {"flan-t5-large": 1.10}
# A decoder's, more where a processor has tiles (AMX).
_DECODER_MIX = 1.15
_DECODER_MIX_AMX = 1.25


def main() -> None:
    parser = shape_parser(__doc__, "flan-t5-small")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        nargs="+",
        default=["float32"],
        help="of weights and activations",
    )
    parser.add_argument(
        "--pool",
        type=int,
        default=MODULES,
        help="modules in memory; 20 of them are fused",
    )
    parser.add_argument(
        "--basis", type=int, help="directions of a shared basis, in float32"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[1],
        help="that share a program, also against one",
    )
    parser.add_argument(
        "--cores", type=int, default=1, help="that the process is pinned to"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bars", action="store_true", help="only what has a bar")
    options = parser.parse_args()
    if options.pool < MODULES:
        parser.error(
            f"--pool {options.pool}: {MODULES} modules are fused, so give at least as many"
        )
    if min(*options.seeds, options.rounds, options.cores) < 1:
        parser.error("--seeds, --rounds and --cores count from 1")
    _measure.launch(options.cores)
    rates = product_rates(options.dtype)
    cases = [] if 1 not in options.seeds else _single(options)
    cases += [
        _seeds(options, dtype, count)
        for dtype in options.dtype
        for count in options.seeds
        if count > 1
    ]
    _measure.show(cases, as_json=options.json, rates=rates)


def _single(options: Any) -> list[dict[str, Any]]:
    """Measure one seed's steps, in all precisions, together."""
    runs: dict[str, Any] = {}
    dtypes: list[Dtype] = ["float32"] if options.bars else options.dtype
    for dtype in dtypes:
        config = config_of(options.shape, dtype)
        weights = _weights(options, dtype)
        structures = {"unrolled": unrolled(config), "scanned": config}
        runs |= {
            f"{dtype} floor {structure}": Floor(built, weights)
            for structure, built in structures.items()
        }
        for composition in ("mix",) if dtype == "nf4" else ("mix", "sum"):
            for structure, built in structures.items():
                runs[f"{dtype} {composition} {structure}"] = Step(
                    built, weights, composition
                )
        if dtype == "float32" and options.basis is not None:
            directions = in_basis(config, weights, options.basis)
            for structure, built in structures.items():
                runs[f"{dtype} basis {structure}"] = Step(built, directions, "sum")
    seconds = in_turns(runs, options.rounds)
    where = _where(options)
    cases = []
    for name, took in seconds.items():
        dtype, kind, structure = name.split()
        if kind != "floor":
            lowest = np.minimum(
                seconds[f"{dtype} floor unrolled"], seconds[f"{dtype} floor scanned"]
            )
            cases.append(
                _against_floor(options, where, dtype, kind, structure, took, lowest)
            )
    for dtype in dtypes:
        computed_from: dict[str, Any] = {}
        for structure in ("unrolled", "scanned"):
            computed_from[f"{structure}_seconds"] = _median(
                seconds[f"{dtype} floor {structure}"]
            )
            computed_from[f"{structure}_temporaries_gib"] = (
                runs[f"{dtype} floor {structure}"].temporaries / 2**30
            )
        ratio = of_turns(
            seconds[f"{dtype} floor unrolled"], seconds[f"{dtype} floor scanned"]
        )
        cases.append(
            case(
                f"{where} {dtype} floor: unrolled / scanned",
                ratio,
                None,
                **computed_from,
            )
        )
    return cases


def _against_floor(
    options: Any,
    where: str,
    dtype: str,
    composition: str,
    structure: str,
    took: np.ndarray,
    lowest: np.ndarray,
) -> dict[str, Any]:
    required = None
    ambition = None
    if config_of(options.shape).causal:
        if dtype == "float32" and options.pool == MODULES and composition == "mix":
            required = (
                _DECODER_MIX_AMX
                if any("amx" in feature for feature in features())
                else _DECODER_MIX
            )
    elif (
        dtype == "float32" and options.pool == MODULES and options.shape != "small-pool"
    ):
        required, ambition = (
            _MIX[structure]
            if composition == "mix"
            else (_SUM.get(options.shape, 1.40), None)
        )
    what = composition
    if composition == "basis":
        what = f"sum in a basis of {options.basis}"
        required = _BASIS.get(options.shape)
        ambition = None
    return case(
        f"{where} {dtype} step / floor: {what}, {structure}",
        of_turns(took, lowest),
        required,
        ambition,
        seconds=_median(took),
        floor_seconds=_median(lowest),
        operations=_operations(options, composition, structure),
        rounds=len(took),
    )


def _seeds(options: Any, dtype: Dtype, count: int) -> dict[str, Any]:
    config = config_of(options.shape, dtype)
    weights = _weights(options, dtype)
    runs = {
        "one": Step(config, weights, "mix"),
        "all": Step(config, weights, "mix", seeds=count),
    }
    seconds = in_turns(runs, options.rounds)
    bar = 0.6 if count == 8 else None
    if runs["all"].problem.seed_mode == "sequential":
        bar = 1.0
    return case(
        f"{_where(options)} {dtype} {count} seeds in one program / {count} single steps: mix, scanned",
        of_turns(seconds["all"], count * seconds["one"]),
        bar,
        path=runs["all"].problem.seed_mode,
        seconds=_median(seconds["all"]),
        single_seconds=_median(seconds["one"]),
        rounds=options.rounds,
    )


def _weights(options: Any, dtype: Dtype) -> Any:
    config = config_of(options.shape, dtype)
    return jax.block_until_ready(frozen(config, dtype, options.pool))


def _operations(options: Any, composition: Any, structure: str) -> float:
    """Return the counted operations of the step over those of its floor."""
    config = (
        unrolled(config_of(options.shape))
        if structure == "unrolled"
        else config_of(options.shape)
    )
    batch = Shape(BATCH, SOURCE, TARGET)
    in_basis = composition == "basis"
    recipe = FusionRecipe(
        modules=MODULES,
        composition="sum" if in_basis else composition,
        basis=options.basis if in_basis else None,
    )
    settings = Settings(recipe=recipe, rank=RANK, pool=options.pool, seeds=1)
    step = program_of(config, "fusion", settings, "step", batch)
    # A scale of the columns has no products.
    base = program_of(unrolled(config), "magnitudes", Settings(seeds=1), "step", batch)
    return step.flops / base.flops


def _where(options: Any) -> str:
    pool = "" if options.pool == MODULES else f" pool of {options.pool}"
    return f"{options.shape}{pool}, {options.cores} core{'s' if options.cores > 1 else ''},"


def _median(seconds: np.ndarray) -> float:
    return float(np.median(seconds))


if __name__ == "__main__":
    main()
