"""`lorafusion fuse`: train a fusion, and evaluate it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..columns import plain
from ..io import processes
from ..runs.options import PRESETS, FuseOptions
from ..runs.run import fuse, run_path
from .parsing import parse
from .scores import cells


def main(arguments: Sequence[str]) -> None:
    """Fuse, and print what came of it."""
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
    options = parse(with_preset, arguments, "fuse")
    results = fuse(options)
    if processes.first():
        print(report(results, run_path(options)))


def report(results: Mapping[str, Any], folder: Path) -> str:
    """Return the results of a run: a line for each seed, then mean and spread."""
    lines = cells(results["seeds"])
    if results["exact_match_std"] is not None:
        lines.append(["mean", f"{results['exact_match']:.1f}", f"± {results['exact_match_std']:.1f}"])
    head = f"{results['task']}, {results['method']}, {results['trainable']:,} trainable numbers"
    return f"{head}\n{plain(lines, left=(0, 2))}\nwritten to {folder}"


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
