"""`lorafusion lm-eval`: measure a model on benchmarks of lm-evaluation-harness."""

import dataclasses
import json
import sys
from collections.abc import Sequence

from ..lm_eval.options import LmEvalOptions
from ..support.checks import load_optional
from .parsing import parse

GROUPS = {
    "data and base": (
        "run",
        "run_seed",
        "base",
        "pool",
        "adapters",
        "dtype",
        "load_in",
        "max_length",
    ),
    "hardware": (
        "crossbar",
        "chip",
        "chip_key",
        "keep_digital",
        "age",
        "norm",
        "restore",
        "calibration_task",
    ),
}


def main(arguments: Sequence[str]) -> None:
    """Run the harness, which prints its own table; its own options are passed on to it."""
    others: list[str] = []
    options = parse(LmEvalOptions, arguments, "lm-eval", groups=GROUPS, others=others)
    program = load_optional(
        "lm_eval.__main__", extra="lm-eval", needed_by="a benchmark"
    )
    from ..lm_eval import model  # noqa: F401  which registers it

    arguments_given = {
        f.name: value
        for f in dataclasses.fields(options)
        if (value := getattr(options, f.name)) != f.default
    }
    typed = sys.argv
    sys.argv = [
        "lm-eval",
        "run",
        "--model",
        "lorafusion",
        "--model_args",
        json.dumps(arguments_given, default=str),
    ]
    sys.argv += ["--batch_size", "auto", *others]
    try:
        program.cli_evaluate()
    finally:
        sys.argv = typed
