"""The command line: `lorafusion SUBCOMMAND --help`."""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_DESCRIPTION = """Fuse a frozen pool of LoRA modules for a new task.

subcommands:
  convert    PEFT adapters -> a pool on disk
  fuse       train coefficients and magnitudes on a task, evaluate by generation
  evaluate   a fused run on a task
  generate   a fused run on new text, from a file or standard input
  export     a fused run -> a PEFT adapter or a merged base model
  crossbar   a fused run on simulated ReRAM arrays: accuracy, errors by site, arrays used
             crossbar program: base and pool -> chips, for `fuse` and `evaluate`
  params     exact trainable counts of every method, without weights
  cost       one new task's writes, energy, time and wear with every method, without weights

`lorafusion SUBCOMMAND --help` says the rest."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand; errors that the user can mend go to stderr in one message, exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        "convert": _convert,
        "fuse": _fuse,
        "evaluate": _evaluate,
        "generate": _generate,
        "export": _export,
        "crossbar": _crossbar,
        "params": _params,
        "cost": _cost,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_DESCRIPTION)
        return
    if arguments[0] not in commands:
        sys.exit(f"lorafusion: no subcommand {arguments[0]!r}: choose one of {', '.join(commands)}")
    run(commands[arguments[0]], arguments[1:])


def run(command: Callable[[list[str]], None], arguments: Sequence[str] | None = None) -> None:
    """Call a command, and turn errors about its input into one message on stderr and exit code 2."""
    try:
        command(list(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def print_results(results: Mapping[str, Any], folder: Path) -> None:
    """Print what a run came to: a line for each seed, mean and spread."""
    print(f"{results['task']}, {results['method']}, {results['trainable']:,} trainable numbers")
    _print_seeds(results["seeds"])
    if results["exact_match_std"] is not None:
        print(f"mean  {results['exact_match']:13.1f}  ± {results['exact_match_std']:.1f}")
    print(f"written to {folder}")


def _convert(arguments: Sequence[str]) -> None:
    from ..io.convert import ConvertOptions, convert

    convert(_parse(ConvertOptions, arguments, "convert"))


def _fuse(arguments: Sequence[str]) -> None:
    from ..io import processes
    from ..runs.options import PRESETS, FuseOptions
    from ..runs.run import fuse, run_path

    preset, arguments = _take_preset(arguments, list(PRESETS))
    recipe = ("recipe", FuseOptions.__annotations__["recipe"], PRESETS[preset])
    with_preset = dataclasses.make_dataclass(
        "FuseOptions",
        [recipe],
        bases=(FuseOptions,),
        namespace={"__doc__": FuseOptions.__doc__},
        frozen=True,
        kw_only=True,
    )
    options = _parse(with_preset, arguments, "fuse")
    results = fuse(options)
    if processes.first():
        print_results(results, run_path(options))


def _evaluate(arguments: Sequence[str]) -> None:
    from ..hardware.evaluate import EvaluateOnChipsOptions, age_table, evaluate_on_chips, results_path
    from ..runs.apply import evaluate_run

    options = _parse(EvaluateOnChipsOptions, arguments, "evaluate")
    if options.crossbar is None:
        options.check_digital()
        _print_seeds(evaluate_run(options))
        return
    print(age_table(evaluate_on_chips(options)))
    print(f"written to {results_path(options)}")


def _generate(arguments: Sequence[str]) -> None:
    from ..runs.apply import GenerateOptions, generate_lines

    for line in generate_lines(_parse(GenerateOptions, arguments, "generate")):
        print(line)


def _export(arguments: Sequence[str]) -> None:
    from ..runs.export import ExportOptions, export

    export(_parse(ExportOptions, arguments, "export"))


def _crossbar(arguments: Sequence[str]) -> None:
    if list(arguments[:1]) == ["program"]:
        _program(arguments[1:])
        return
    from ..hardware.report import CrossbarOptions, evaluate_on_arrays, results_path, site_table

    options = _parse(CrossbarOptions, arguments, "crossbar")
    results = evaluate_on_arrays(options)
    print(site_table(results))
    print("seed  chip     exact match %  loss")
    for chip in ({"chip": "digital", "seeds": results["digital"]}, *results["chips"]):
        for row in chip["seeds"]:
            print(f"{row['seed']:<4}  {chip['chip']:<7}  {row['exact_match']:13.1f}  {_loss(row)}")
    print(f"written to {results_path(options)}")


def _program(arguments: Sequence[str]) -> None:
    from ..hardware.write import ProgramOptions, program_chips, report_table

    options = _parse(ProgramOptions, arguments, "crossbar program")
    print(report_table(program_chips(options)))
    print(f"written to {options.out}")


def _params(arguments: Sequence[str]) -> None:
    from ..estimates.params import ParamsOptions, params

    params(_parse(ParamsOptions, arguments, "params"))


def _cost(arguments: Sequence[str]) -> None:
    from ..estimates.bill.command import cost
    from ..estimates.bill.options import CostOptions

    cost(_parse(CostOptions, arguments, "cost"))


def _parse(options: type, arguments: Sequence[str], name: str) -> Any:
    import tyro

    description = inspect.cleandoc(options.__doc__ or "").partition("\nAttributes:")[0]
    return tyro.cli(options, args=list(arguments), prog=f"lorafusion {name}", description=description)


def _take_preset(arguments: Sequence[str], presets: list[str]) -> tuple[str, list[str]]:
    """Split `--preset NAME` off: it decides what the other options' defaults are."""
    rest = list(arguments)
    for i, argument in enumerate(rest):
        name, equals, value = argument.partition("=")
        if name == "--preset":
            value = value if equals else "".join(rest[i + 1 : i + 2])
            if value not in presets:
                raise ValueError(f"no preset {value!r}: choose one of {', '.join(presets)}")
            del rest[i : i + (1 if equals else 2)]
            return value, rest
    return "default", rest


def _print_seeds(rows: Sequence[dict[str, Any]]) -> None:
    print("seed  exact match %  loss")
    for row in rows:
        print(f"{row['seed']:<4}  {row['exact_match']:13.1f}  {_loss(row)}")


def _loss(row: Mapping[str, Any]) -> str:
    return "-" if row["loss"] is None else f"{row['loss']:.4f}"
