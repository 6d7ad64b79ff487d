"""`lorafusion generate`: answers of runs, mixtures or a base to new text; `lorafusion lm-eval`: their benchmarks."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..lm_eval.options import CalibratedChipOptions, LmEvalOptions, load_measured
from ..runs.options import check_digital
from ..runs.predict import GenerateOptions, generate_lines, stream_lines
from ..serving.predict import generate_rows
from ..support.checks import load_optional
from ..support.options import AnyPoolOptions
from ..support.text import one_line
from ..training.problem import Problem
from .parsing import parse, part_of

_BREAKS = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateCommand(GenerateOptions, AnyPoolOptions, CalibratedChipOptions):
    """Let fused runs, weighted sums of modules, or a base model as it is, answer new text: one line in, one answer out.

    Examples:
      echo "pairswap then numvow : a b c d" | lorafusion generate --run runs/pairswap_numvow-fusion
      lorafusion generate --runs runs/snarks-fusion runs/hyperbaton-fusion --file rows.jsonl
      echo '{"mixture": {"sort_dash": 0.7}, "input": "a b"}' | lorafusion generate --base base --pool pool
      lorafusion generate --base HuggingFaceTB/SmolLM2-135M-Instruct --chat --stream
      lorafusion generate --base base --crossbar noisy_chips.json --restore restored --file lines.txt

    Attributes:
      runs: folders of several runs on one base and pool, instead of --run, which answer in batches of mixed tasks.
        Each line is then a JSON object such as {"run": "snarks-fusion", "input": "some text"}, or with a mixture as
        with `pool`; the base model answers a line without either.
      pool: pool of the base, without runs: each line is a JSON object such as {"mixture": {"sort_dash": 0.7}, "input":
        "some text"}, with the weights of `lorafusion merge`.
      prompt: template of the model's input with a pool, with {input} or other columns.
      json: print each answer as a JSON string; by default only its line breaks are escaped.
    """

    runs: tuple[Path, ...] = ()
    pool: str | None = None
    prompt: str | None = None
    json: bool = False


def generate_command(arguments: Sequence[str]) -> None:
    """Print an answer to each line of text."""
    command = parse(GenerateCommand, arguments, "generate")
    if command.runs or command.pool:
        options = dataclasses.replace(command, json=False)
        answers = generate_rows(
            **part_of(options, generate_rows, "--runs" if command.runs else "--pool")
        )
    else:
        if command.prompt is not None:
            raise ValueError(
                "--prompt is the template of a base with a pool: give --pool, or leave it out"
            )
        answers = (stream_lines if command.stream else generate_lines)(
            command, _on_chip(command)
        )
    quote = '"' if command.json else ""
    shown = one_line if sys.stdout.isatty() else _without_breaks
    if command.json:
        shown = _in_json
    for answer in answers:
        print(quote, end="")
        for piece in [answer] if isinstance(answer, str) else answer:
            print(shown(piece), end="", flush=command.stream)
        print(quote)


def _in_json(text: str) -> str:
    return json.dumps(text)[1:-1]


def _without_breaks(text: str) -> str:
    """Return a text with escapes for all that ends a line anywhere; another program gets the others as they are."""
    return _BREAKS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _on_chip(command: GenerateCommand) -> Callable[[], Problem] | None:
    """Return a function that loads the model of a command on a chip; None for a digital one."""
    chip_fields = CalibratedChipOptions.__dataclass_fields__
    if command.crossbar is None:
        check_digital(command, chip_fields)
        return None
    chip = {name: getattr(command, name) for name in chip_fields}
    options = LmEvalOptions(
        run=command.run, run_seed=command.seed, base=command.base, **chip
    )
    return lambda: load_measured(options)[0].problem


def lm_eval_command(arguments: Sequence[str]) -> None:
    """Run the harness, which prints its own table; its own options are passed on to it."""
    others: list[str] = []
    options = parse(LmEvalOptions, arguments, "lm-eval", others=others)
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
