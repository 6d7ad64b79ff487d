"""Benchmarks of SmolLM2 on simulated arrays: scores of three local tasks against the bits and the energy of the ADCs.

    python experiments/benchmarks_on_arrays.py --tasks function_vectors/dataset_files
    python experiments/benchmarks_on_arrays.py --tasks function_vectors/dataset_files --bits 8 6 --rows 4 --out runs/few

The tasks are made of the function-vector data sets, in the format of lm-evaluation-harness: the right one of four
answers after four examples (multiple choice), the same answer in words (cloze), and the perplexity of lists of pairs.
All seven projections of every layer are in the arrays of examples/smollm2/chip.yaml, whose ADCs are calibrated on
prompts that are not measured. The energy is the bill's, of reading one token: arrays, converters and attention.
Written to OUT: the tasks, a line of rows.jsonl for each number of bits, and scores.csv. Interrupted, the same command
continues with the next number of bits.
"""

import dataclasses
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import _script
import tyro
from lab import lm_eval_tasks
from lab.common import ROOT, append_line, read_lines, write_csv
from lab.smollm2 import EXAMPLES, base

from lorafusion_jax import CrossbarConfig, read_config
from lorafusion_jax.crossbar import load_config, save_config
from lorafusion_jax.estimates.bill import CostOptions, bills
from lorafusion_jax.runs.run import environment
from lorafusion_jax.tasks import find_task, load_task
from lorafusion_jax.text_tables import markdown

SHOTS, CHOICES, PAIRS = 4, 4, 8
CALIBRATION = 16  # prompts
# Names of the harness's metrics, and of the columns that show them.
METRICS = {
    ("pairs_choice", "acc"): "multiple choice, % right",
    ("pairs_cloze", "acc"): "cloze, % right",
    ("pairs_cloze", "perplexity"): "cloze, perplexity",
    ("pairs_text", "word_perplexity"): "text, perplexity per word",
}

Bits = int | Literal["digital"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      tasks: folder of the function-vector data sets, also in subfolders.
      names: data sets that the tasks are made of.
      bits: of the ADC, in the order in which they are measured; `digital` is without arrays.
      rows: number of questions and of texts from each data set.
      out: folder of results; numbers of bits that have a row there are not measured again.
    """

    tasks: Path
    names: tuple[str, ...] = ("country-capital", "present-past", "english-french", "person-sport")
    bits: tuple[Bits, ...] = ("digital", 8, 6, 7, 5, 4)
    rows: int = 8
    out: Path = ROOT / "runs" / "benchmarks_on_arrays"


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, and print the table."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    options.out.mkdir(parents=True, exist_ok=True)
    common = {"names": [*options.names], "rows": options.rows}
    file = options.out / "rows.jsonl"
    rows = read_lines(file)
    if any(row[key] != value for row in rows for key, value in common.items()):
        raise ValueError(f"{file} holds other rows than {common}: give another --out")
    write_tasks(options)
    for bits in options.bits:
        if bits not in {row["bits"] for row in rows}:
            rows.append(common | measured(bits, options.out) | environment())
            append_line(file, rows[-1])
    lines = table([row for row in rows if row["bits"] in options.bits])
    write_csv(options.out / "scores.csv", lines)
    print(f"{markdown(lines)}\nwritten to {options.out}")


def write_tasks(options: Options) -> None:
    """Write the three tasks, and prompts to calibrate on."""
    folder, drawn = options.out / "tasks", random.Random(0)
    (folder / "calibration").mkdir(parents=True, exist_ok=True)
    choices, clozes, texts, others = [], [], [], []
    for name in options.names:
        task = load_task(find_task(options.tasks, name), train_rows=CALIBRATION)
        pairs = [(example.input, example.target) for example in task.test]
        shown = [f"{asked} -> {answer}" for asked, answer in pairs[:SHOTS]]
        prompts = {asked: "\n".join([*shown, f"{asked} ->"]) for asked, _ in pairs[SHOTS:]}
        for asked, answer in pairs[SHOTS:][: options.rows]:
            wrong = drawn.sample(sorted({other for _, other in pairs} - {answer}), CHOICES - 1)
            answers = drawn.sample([answer, *wrong], CHOICES)
            choices.append({"question": prompts[asked], "choices": answers, "answer": answers.index(answer)})
            clozes.append({"prompt": prompts[asked], "target": answer})
            texts.append("\n".join(f"{a} -> {b}" for a, b in drawn.sample(pairs, PAIRS)))
        for example in task.train[: CALIBRATION // len(options.names)]:
            prompt = "\n".join([*shown, f"{example.input} ->"])
            others.append({"input": prompt, "target": example.target})
    lm_eval_tasks.multiple_choice(folder, "pairs_choice", choices)
    lm_eval_tasks.cloze(folder, "pairs_cloze", clozes)
    lm_eval_tasks.perplexity(folder, "pairs_text", texts)
    for part, of_part in (("train", others), ("test", others[:1])):
        (folder / "calibration" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_part))


def measured(bits: Bits, out: Path) -> dict[str, Any]:
    """Return the scores of all tasks on arrays with such ADCs, and the energy of a token."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    from lorafusion_jax.harness.model import HarnessLM

    began, energy = time.process_time(), None
    chip: dict[str, Any] = {}
    if bits != "digital":
        config = load_config(EXAMPLES / "chip.yaml")
        assert config.adc is not None
        config = dataclasses.replace(config, adc=dataclasses.replace(config.adc, bits=bits))
        file = out / f"adc_{bits}.yaml"
        save_config(config, file)
        chip = {"crossbar": str(file), "calibration_task": str(out / "tasks" / "calibration")}
        energy = token_energy(config)
    model = HarnessLM(base=str(base()), batch_size=8, **chip)
    manager = TaskManager(include_path=str(out / "tasks"), include_defaults=False)
    measure: Any = evaluator.simple_evaluate
    found = measure(model=model, tasks=[*manager.all_tasks], task_manager=manager, bootstrap_iters=1000)
    return {
        "bits": bits,
        "results": found["results"],
        "mj_per_token": energy,
        "cpu_seconds": time.process_time() - began,
    }


def token_energy(config: CrossbarConfig) -> list[float]:
    """Return low, typical and high energy of reading one token with the base alone, in mJ."""
    options = CostOptions(source=64, target=1)
    of_base = bills(read_config(base()), config, options)["full fine-tuning"]  # whose numbers are in the base's arrays
    return [1e3 * joules for joules in dataclasses.astuple(of_base.source.total)]


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a line for each number of bits, ± standard errors over rows of a task."""
    lines = [["ADC", "mJ per token (low / typical / high)", *METRICS.values()]]
    for row in sorted(rows, key=lambda row: 99 if row["bits"] == "digital" else row["bits"]):
        energy = row["mj_per_token"]
        cells = ["-" if energy is None else " / ".join(f"{mj:.3g}" for mj in energy)]
        for (task, metric), title in METRICS.items():
            value = row["results"][task][f"{metric},none"]
            error = row["results"][task].get(f"{metric}_stderr,none")
            percent = 100 if "%" in title else 1
            spread = f" ± {percent * error:.3g}" if isinstance(error, float) else ""
            cells.append(f"{percent * value:.4g}{spread}")
        lines.append([row["bits"] if row["bits"] == "digital" else f"{row['bits']} bits", *cells])
    return lines


if __name__ == "__main__":
    _script.run(main)
