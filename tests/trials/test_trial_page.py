"""Figures of trials in docs/results/pools.md, from the rows of results/trial."""

from pathlib import Path

import numpy as np

from lorafusion_jax.report import over_tasks
from lorafusion_jax.trials import read_lines

_ROOT = Path(__file__).resolve().parents[2]
_RESULTS = _ROOT / "results" / "trial"
_PAGE = " ".join((_ROOT / "docs" / "results" / "pools.md").read_text().split())


def test_names_of_simulated_trials_with_40_rows():
    rows = read_lines(_RESULTS / "coverage.jsonl")
    rows = [row for row in rows if row["rows"] == 40]
    named = [row for row in rows if row["decision"] == "named"]
    above = [row["truth"][row["arm"]] - min(row["truth"].values()) for row in named]
    share = 100 * len(named) / len(rows)
    wrong = 100 * sum(np.array(above) > 0.05) / len(rows)
    assert f"a method for {share:.1f} % of the tasks. For {wrong:.1f} % of" in _PAGE


def test_intervals_and_choices_of_real_trials_with_40_rows():
    hits = []
    for row in read_lines(_RESULTS / "truth.jsonl"):
        truth = row["true_loss"]
        means = {arm: mean for arm, (mean, _, _) in row["contrasts"].items()}
        least = min({"LoRAFusion": 0.0} | means, key=({"LoRAFusion": 0.0} | means).get)
        assert row["arm"] in (None, least)
        if row["rows"] == 40:
            for arm, (mean, low, high) in row["contrasts"].items():
                error = truth[arm] - truth["LoRAFusion"] - mean
                hits.append(abs(error) <= (high - low) / 2)
    assert f"{sum(hits)} of {len(hits)} intervals" in _PAGE


def test_a_lora_of_a_trial_against_that_of_the_value_of_a_pool():
    rows = read_lines(_ROOT / "results" / "pool_value" / "language.jsonl")
    losses = {
        row["task"]: row["test_loss"]
        for row in rows
        if (row["arm"], row["rows"], row["seed"]) == ("LoRA, rank 8", 20, 1)
    }
    rows = read_lines(_RESULTS / "lora.jsonl")
    difference = over_tasks([row["test_loss"] - losses[row["task"]] for row in rows])
    assert len(rows) == 12
    np.testing.assert_allclose(difference, (-0.004, -0.207, 0.198), atol=5e-4)
