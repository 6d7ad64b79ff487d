"""`lorafusion generate`: print the answers of fused runs, or of a base model, to new text."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..files import printable
from ..harness.options import CalibratedChipOptions, HarnessOptions, load_measured
from ..runs.options import check_digital
from ..runs.predict import GenerateOptions, generate_lines, stream_lines
from ..serving.predict import generate_rows
from ..training.problem import Problem
from .parsing import parse, part_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateCommand(GenerateOptions, CalibratedChipOptions):
    """Let a fused run, several of them, or a base model as it is, answer new text: one line in, one answer out.

    Examples:
      echo "double then digit : a b c" | lorafusion generate --run runs/double_digit-fusion
      lorafusion generate --runs runs/snarks-fusion runs/hyperbaton-fusion --file rows.jsonl
      lorafusion generate --base HuggingFaceTB/SmolLM2-135M-Instruct --chat --stream
      lorafusion generate --base base --crossbar chips/noisy --restore restored-scales --file lines.txt

    Attributes:
      runs: folders of several runs on one base and pool, instead of --run, which answer in batches of mixed tasks.
        Each line is then a JSON object such as {"run": "snarks-fusion", "input": "some text"}; the base model answers
        a line without a run.
    """

    runs: tuple[Path, ...] = ()


GROUPS = {
    "data and base": ("run", "runs", "base", "chat", "file", "seed"),
    "generation": (
        "max_new_tokens", "stream", "temperature", "top_k", "top_p", "sampling_seed", "eval_batch",
    ),
    "hardware": ("crossbar", "chip", "chip_key", "keep_digital", "age", "norm", "restore", "calibration_task"),
}  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Print an answer to each line of text."""
    command = parse(GenerateCommand, arguments, "generate", groups=GROUPS)
    shown = printable if sys.stdout.isatty() else str  # another program gets the text as it is
    if command.runs:
        for line in generate_rows(**part_of(command, generate_rows, "--runs")):
            print(shown(line))
        return
    load = _on_chip(command)
    if command.stream:
        for answer in stream_lines(command, load):
            for piece in answer:
                print(shown(piece), end="", flush=True)
            print()
        return
    for line in generate_lines(command, load):
        print(shown(line))


def _on_chip(command: GenerateCommand) -> Callable[[], Problem] | None:
    """Return a function that loads the model of a command on a chip; None for a digital one."""
    of_chips = CalibratedChipOptions.__dataclass_fields__
    if command.crossbar is None:
        check_digital(command, of_chips)
        return None
    chip = {name: getattr(command, name) for name in of_chips}
    options = HarnessOptions(run=command.run, run_seed=command.seed, base=command.base, **chip)
    return lambda: load_measured(options).loaded.problem
