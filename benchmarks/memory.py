"""Memory of a training step and of generation: XLA's allocations, compared with bars and `--plan`. Nothing is computed.

    python benchmarks/memory.py [--shape flan-t5-large] [--json]

The real step of one seed is compiled from shapes alone, for a source of 128 tokens and a target of 8, in float32,
bfloat16 and NF4, for batches of 5 and 10, and generation of 32 tokens beside a LoRA for 10 rows. A pool of 20 modules
of rank 16 on q and v. The bars, in GiB, are those of FLAN-T5-large at a batch of 5, also in NF4 and for what seven more
seeds add; they count as XLA does: the program's arguments, temporaries and results.
"""

from typing import Any

import _measure
import jax
import jax.numpy as jnp
from _measure import case
from _model import (
    MODULES,
    RANK,
    SOURCE,
    TARGET,
    Composition,
    Dtype,
    apart,
    arguments,
    config_of,
    held_in,
    lowered,
    shape_parser,
    shapes_of,
)

from lorafusion_jax import Architecture, Frozen, Fusion, FusionRecipe, LoRA, Method
from lorafusion_jax.estimates import (
    Settings,
    Shape,
    held_bytes,
    program_of,
    trained_numbers,
)
from lorafusion_jax.methods import FullFineTuning
from lorafusion_jax.models import GREEDY, targeted
from lorafusion_jax.runs import SeedModels, advance_rows, begin_rows

assert (FusionRecipe.modules, Settings.rank) == (MODULES, RANK)
_COMPOSITIONS: dict[str, Composition] = {"fusion-sum": "sum", "fusion-mix": "mix"}
_METHODS = {
    "fusion-sum": "LoRAFusion",
    "fusion-mix": "LoRAFusion, mix",
    "lora": "LoRA",
    "full": "full fine-tuning",
}
_GIB = 2**30
_REQUIRED = 1.25  # the plan's tests allow a quarter, on small models
# GiB
_PEAK = 5.0
_NF4_PEAK = 2.5
_OF_SEED = 0.3
_SEEDS = 8


def main() -> None:
    parser = shape_parser(__doc__, "flan-t5-large")
    parser.add_argument(
        "--peak", action="store_true", help="only what has a bar in GiB"
    )
    options = parser.parse_args()
    cases = [
        peak
        for name in ("fusion-mix", "fusion-sum")
        for peak in _peaks(name, options.shape)
    ]
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16", "nf4")
    if not options.peak:
        cases += [
            _compared(
                f"{options.shape}, {_METHODS[name]}, {dtype}, batch {rows}",
                *(
                    of(name, options.shape, dtype, rows)
                    for of in (_planned, _allocated)
                ),
            )
            for name in _METHODS
            for dtype in dtypes
            for rows in (5, 10)
            if (name, dtype) != ("full", "nf4")  # which is refused
        ]
        cases += [_generation(options.shape, dtype) for dtype in dtypes]
    _measure.show(cases, as_json=options.json)


def _peaks(name: str, shape: str) -> list[dict[str, Any]]:
    """Return a step's peak in float32 and NF4, and what eight seeds add to one; bars are for FLAN-T5-large."""
    whole = _allocated(name, shape, "float32", 5)
    quantised = _allocated(name, shape, "nf4", 5)
    added = _allocated(name, shape, "float32", 5, seeds=_SEEDS) - whole
    where = f"{shape}, {_METHODS[name]}, batch 5:"
    bars = {
        f"{where} peak of a float32 step / {_PEAK:g} GiB": (whole, _PEAK),
        f"{where} peak of an NF4 step / {_NF4_PEAK:g} GiB": (quantised, _NF4_PEAK),
        f"{where} what {_SEEDS} seeds add to one / {_SEEDS} x {_OF_SEED:g} GiB": (
            added,
            _SEEDS * _OF_SEED,
        ),
    }
    required = 1.0 if shape == "flan-t5-large" else None
    return [
        case(what, b / (g * _GIB), required, gib=b / _GIB, bar_gib=g)
        for what, (b, g) in bars.items()
    ]


def _compared(what: str, planned: int, allocated: int) -> dict[str, Any]:
    return case(
        f"{what}: the plan's memory / XLA's, the larger over the smaller",
        max(planned / allocated, allocated / planned),
        _REQUIRED,
        1.05,
        planned=planned / _GIB,
        allocated=allocated / _GIB,
    )


def _generation(shape: str, dtype: Dtype) -> dict[str, Any]:
    config = config_of(shape, dtype)
    load_in = held_in(dtype)
    rows = 10
    new = 32
    settings = Settings(seeds=1, load_in=load_in)
    shape_of_answers = Shape(rows, SOURCE, new)
    needed = program_of(config, "lora", settings, "answers", shape_of_answers).bytes
    weights = held_bytes(config, "zero-shot", settings)
    # Each program is given only those that it reads.
    held = weights + 4 * trained_numbers(config, "lora", settings)
    base = apart(Frozen(shapes_of(config, dtype).base))
    state, batch, problem, _ = arguments(
        config, base, _method("lora", config), (rows, SOURCE)
    )
    of_rows = [
        jax.ShapeDtypeStruct(a.shape[1:], a.dtype)
        for a in (batch.input_ids, batch.input_mask, batch.row_mask)
    ]
    whole = jax.ShapeDtypeStruct((), jnp.int32)
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    limits = jax.ShapeDtypeStruct((rows,), jnp.int32)
    models: Any = SeedModels(state.params, problem, number)
    beginning = begin_rows.lower(
        models, *of_rows, limits, None, room=new, sampling=GREEDY
    )
    generation = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), beginning.out_info
    )
    advancing = advance_rows.lower(models, *generation, number, whole, sampling=GREEDY)
    given = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(generation))
    used = max(_used(beginning.compile()), given + _used(advancing.compile()))
    return _compared(
        f"{shape}, LoRA, {dtype}, generation for {rows} rows",
        round(held + needed),
        held + used,
    )


def _planned(name: str, shape: str, dtype: Dtype, rows: int) -> int:
    config = config_of(shape, dtype)
    load_in = held_in(dtype)
    method = name
    settings = Settings(seeds=1, load_in=load_in)
    if name in _COMPOSITIONS:
        method = "fusion"
        recipe = FusionRecipe(composition=_COMPOSITIONS[name])
        settings = Settings(seeds=1, load_in=load_in, recipe=recipe)
    step = program_of(config, method, settings, "step", Shape(rows, SOURCE, TARGET))
    held = held_bytes(config, method, settings)
    # Nothing reads the base where all of it is trained, and XLA does not count it.
    unread = held_bytes(config, "zero-shot", settings) if name == "full" else 0
    return round(held + step.bytes - unread)


def _allocated(
    name: str, shape: str, dtype: Dtype, rows: int, *, seeds: int = 1
) -> int:
    """Return the bytes of arguments, temporaries and results of the compiled step."""
    config = config_of(shape, dtype)
    weights = shapes_of(config, dtype)
    weights = weights if name in _COMPOSITIONS else Frozen(weights.base)
    weights = weights if name == "full" else apart(weights)
    program = lowered(
        config, weights, _method(name, config), rows, seeds=seeds
    ).compile()
    return program.memory_analysis().argument_size_in_bytes + _used(program)


def _used(program: Any) -> int:
    """Return the bytes that a compiled program needs in addition to its arguments."""
    found = program.memory_analysis()
    return (
        found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )


def _method(name: str, config: Architecture) -> Method:
    if name == "full":
        return FullFineTuning()
    if name == "lora":
        return LoRA(sites=tuple(targeted(config, None).items()), rank=RANK)
    return Fusion(composition=_COMPOSITIONS[name])


if __name__ == "__main__":
    main()
