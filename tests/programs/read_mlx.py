"""Merged models in mlx-lm."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import reader
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model


def _read(case):
    model, _ = load_model(Path(case["model"]))
    answers = []
    for prompt in case["prompts"]:
        steps = generate_step(mx.array(prompt), model, max_tokens=case["tokens"])
        answers.append([int(token) for token, _ in steps])

    def logits(prompt, answer):
        return np.array(
            nn.log_softmax(model(mx.array([prompt + answer]))[0, len(prompt) - 1 : -1])
        )

    return answers, reader.logits_of(case, logits)


if __name__ == "__main__":
    reader.main(_read)
