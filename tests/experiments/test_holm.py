"""Holm's correction, against his stepwise rule."""

import numpy as np
import pytest
from lab.holm import holm


def test_holm_rejects_as_his_stepwise_rule_does():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.7]) == [1.0, 1.0] and holm([]) == []
    rng = np.random.default_rng(3)
    for _ in range(100):
        p = rng.beta(0.5, 3, size=6)
        # From the smallest p on, each is compared with 5 % over the number of tests left, until one is not below it.
        below = np.sort(p) <= 0.05 / np.arange(6, 0, -1)
        rejected = np.argsort(p)[: np.argmin(below) if not below.all() else 6]
        assert set(np.flatnonzero(np.array(holm([*p])) <= 0.05)) == set(rejected)
