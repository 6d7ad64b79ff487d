"""What the scripts of all programs do with the cases of a job; it runs in an environment of the program's own."""

import json
import sys
from pathlib import Path

import numpy as np


def main(read):
    """Write the answers of every case and, where a program has them, the logits of all tokens of the first answers."""
    file = Path(sys.argv[1])
    job = json.loads(file.read_text())
    found = {name: read(job | case) for name, case in job["cases"].items()}
    file.with_name("answers.json").write_text(
        json.dumps({name: answers for name, (answers, _) in found.items()})
    )
    logits = {name: array for name, (_, array) in found.items() if array is not None}
    np.savez(file.with_name("logits.npz"), **logits)


def logits_of(case, of_prompt_and_answer):
    """The logits [prompt, token of our answer, vocabulary] of the first prompts; what a program lacks is NaN."""
    found = np.full((10, case["tokens"], case["vocabulary"]), np.nan)
    for row, prompt, answer in zip(
        found, case["prompts"], case["answers"], strict=False
    ):
        row[: len(answer)] = of_prompt_and_answer(prompt, answer)
    return found
