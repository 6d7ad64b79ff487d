"""Made-up results: methods of known strength on tasks of known difficulty, five seeds, right or wrong per test row."""

import hashlib

import numpy as np

METHODS = {  # name -> (strength, trainable parameters); without any to train, one seed says all
    "zero-shot": (0.08, 0),
    "few-shot prompt": (0.14, 0),
    "constant answer": (0.12, 0),
    "uniform mean": (0.15, 0),
    "best single module": (0.22, 0),
    "LoraHub": (0.20, 20),
    "fusion mix": (0.42, 1232),
    "fusion sum": (0.45, 1232),
    "coefficients only": (0.33, 80),
    "magnitudes only": (0.30, 1152),
    "random pool": (0.31, 1232),
    "LoRA": (0.40, 36864),
    "DoRA": (0.41, 38016),
    "VeRA": (0.36, 3456),
    "full fine-tuning": (0.39, 1_183_104),
}
TASKS = (
    "swapends_prev",
    "double_digit",
    "pairswap_numvow",
    "sort_next2",
    "reverse_last",
    "upper_dash",
)


def made_up(
    *,
    shots="95+5",
    tasks=TASKS,
    methods=tuple(METHODS),
    seeds=(1, 2, 3, 4, 5),
    items=60,
    options=True,
    start=0,
):
    """Return rows as an experiment writes them."""
    rng = np.random.default_rng(start)
    difficulty = {
        task: rng.normal(0, 0.08, items) + rng.normal(0, 0.05) for task in tasks
    }
    rows = []
    for method in methods:
        strength, trainable = METHODS[method]
        for seed in seeds if trainable else seeds[:1]:
            luck = rng.normal(0, 0.03)
            for task in tasks:
                chance = np.clip(strength + difficulty[task] + luck, 0, 1)
                correct = rng.random(items) < chance
                option = correct | (rng.random(items) < 0.3)
                rows.append(
                    row(
                        task,
                        method,
                        seed,
                        correct,
                        option if options else None,
                        shots,
                        trainable,
                    )
                )
    return rows


def row(task, method, seed, correct, option=None, shots="95+5", trainable=0):
    steps = 200 if trainable else 0
    marks = [
        None if found is None else "".join("01"[int(c)] for c in found)
        for found in (correct, option)
    ]
    percents = [
        None if found is None else 100 * float(np.mean(found))
        for found in (correct, option)
    ]
    return {
        "task": task,
        "method": method,
        "shots": shots,
        "seed": seed,
        "exact_match": percents[0],
        "option_accuracy": percents[1],
        "loss": 0.5 if trainable else None,
        "correct": marks[0],
        "option_correct": marks[1],
        "trainable": trainable,
        "steps": steps,
        "forward_rows": 10 * steps,
        "backward_rows": 9 * steps,
        "seconds": 0.01 * steps,
        "config": {
            "method": method,
            "recipe": {"lr": 0.02 if "fusion" in method else 0.002, "epochs": 20},
        },
        "data_sha256": hashlib.sha256(task.encode()).hexdigest(),
        "versions": {"python": "3.11.9", "jax": "0.10.2", "numpy": "2.3.0"},
        "device": "cpu",
        "cores": 2,
    }
