"""The model that benchmarks of lm-evaluation-harness measure: a base, modules of a pool, or a fused run; on chips."""

import dataclasses

import jax

from ..hardware.on_arrays import on_arrays, restored_base
from ..io.pool import open_pool
from ..loading.model import LoadedModel, load_model
from ..loading.spec import LoadOptions
from ..runs.folder import check_answers, load_run, seed_place
from ..runs.options import ChipOptions, FuseOptions, OnArrays, check_digital
from ..runs.setup import Setup, load_setup, of_run, own_task
from ..support.checks import flags_given
from ..support.options import (
    AnyPoolOptions,
    AnyRunOptions,
    ModulesOptions,
    PrecisionOptions,
)
from ..training.method import Params

_OF_BASES = ("pool", "adapters", "dtype", "load_in")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibratedChipOptions(ChipOptions):
    """A simulated chip, or none, and the text that its ADCs are calibrated on.

    Attributes:
      calibration_task: task whose training rows set the ranges of the chip's ADCs, as in `lorafusion fuse`; by default
        the run's own.
    """

    calibration_task: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmEvalOptions(
    PrecisionOptions,
    ModulesOptions,
    AnyPoolOptions,
    AnyRunOptions,
    CalibratedChipOptions,
):
    """Measure a fused run, a base model or an adapter on benchmarks of lm-evaluation-harness.

    All other options are those of `lm-eval run`, which `lm-eval run --help` lists.

    Examples:
      lorafusion lm-eval --run runs/snarks-fusion --tasks arc_easy,hellaswag
      lorafusion lm-eval --base base --pool pool --adapters snarks --tasks arc_easy --limit 100
      lorafusion lm-eval --run runs/snarks-fusion --crossbar isaac --tasks arc_easy

    Attributes:
      adapters: modules of the pool, by name or index: one as it is, several as their mean; by default all.
      run_seed: seed of the run that is measured; by default its first.
      max_length: most tokens of a prompt and its continuation; longer prompts lose their first tokens. By default
        the model's context.
    """

    run_seed: int | None = None
    max_length: int | None = None


def load_measured(options: LmEvalOptions) -> tuple[LoadedModel, Params, str]:
    """Return the model that the options name with the problem of one seed, the seed's parameters, and the base's name.

    Raises:
      ValueError: the options do not name one model, the run lacks the seed or has a method that measures no model, or
        a file cannot be used.
    """
    if (options.run is None) == (options.base is None):
        raise ValueError(
            "expected one model: give a fused run with --run, or a base model with --base"
        )
    if options.crossbar is None:
        check_digital(options, CalibratedChipOptions.__dataclass_fields__)
    if options.run is None and options.run_seed is not None:
        raise ValueError("a base model has no seeds: leave out --run-seed")
    fused = _of_base(options)
    params = None
    config = None
    place = 0
    if options.run is not None:
        if flags := flags_given(options, _OF_BASES):
            raise ValueError(
                f"{flags}: only for a base without a run, since a run has its own: leave it out"
            )
        fused, params, config = load_run(options.run)
        check_answers(options.run, fused)
        place = seed_place(options.run, fused.seeds, options.run_seed)
    if options.crossbar is None:
        loaded = load_model(fused)
    else:
        chip = {
            name: getattr(options, name) for name in ChipOptions.__dataclass_fields__
        }
        arrays = OnArrays(train_chip="chip", **chip)
        task = options.calibration_task or (
            fused.task if isinstance(fused, FuseOptions) else None
        )
        if task is not None:
            fused = FuseOptions(
                **vars(fused) | {"task": task, "test_rows": 1, "arrays": arrays}
            )
            run_task = None
            if options.run and config and options.calibration_task is None:
                run_task = own_task(fused, options.run, config)
            loaded = load_setup(fused, to_train=False, task=run_task)
        elif options.restore is not None and options.pool is None:
            loaded = load_model(fused)
            loaded = loaded.with_layers(unroll=False).with_problem(
                frozen=restored_base(loaded, arrays)
            )
        else:
            raise ValueError(
                "a chip needs text that sets the ranges of its ADCs: name a task with training rows by "
                "--calibration-task, or a restored base by --restore"
            )
    if params is None:
        first_seed = loaded.problem.replace(index=loaded.problem.index[0])
        params = jax.tree.map(lambda p: p[None], first_seed.init(jax.random.key(0)))
    seed_params = jax.tree.map(lambda p: p[place], params)
    if options.run and config:
        loaded = of_run(loaded, fused, options.run, config, seed_params)
    if isinstance(loaded, Setup) and isinstance(
        fused, FuseOptions
    ):  # with all seeds, whose modules share the chip
        loaded = on_arrays(loaded, fused, params).training
    index = loaded.problem.index[place]
    return loaded.with_problem(index=index), seed_params, fused.base


def _of_base(options: LmEvalOptions) -> LoadOptions:
    """Return the options of a base, or of the mean of some modules of its pool."""
    adapters = options.adapters
    if options.base is None or options.pool is None:
        if adapters:
            raise ValueError(
                "--adapters names modules of a pool: give it with --base and --pool"
            )
    elif not adapters:
        adapters = tuple(open_pool(options.pool, options.base).names)
    return LoadOptions(
        base=str(options.base),
        pool=options.pool,
        adapters=adapters,
        method="zero-shot" if options.pool is None else "mean",
        dtype=options.dtype,
        load_in=options.load_in,
    )
