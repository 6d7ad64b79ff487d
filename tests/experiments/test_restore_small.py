"""The table of the small T5 on restored chips, by hand."""

import numpy as np
import restore_small as experiment


def test_matches_are_means_over_tasks_and_their_interval_is_over_chips():
    of_chips = {"a": np.array([20.0, 22.0, 24.0]), "b": np.array([40.0, 42.0, 44.0])}
    matches = {"digital": {"a": np.array([30.0, 34.0]), "b": np.array([50.0, 50.0])}, "scales": of_chips}
    _, digital, scales = experiment.table(matches, {"scales": 0.0092})
    assert digital == ["digital", "-", "32.0", "50.0", "41.0", "-"]
    # The three chips have means of 30, 32 and 34: a standard error of 2 / sqrt(3), and 4.303 of them make half.
    assert scales == ["scales", "0.92", "22.0", "42.0", "32.0", "27.0 to 37.0"]
