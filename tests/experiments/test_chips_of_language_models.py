"""Language models on noisy chips: rows of a small Llama on texts made up here."""

import chips_of_language_models as experiment
import numpy as np
import pytest
import small_llama
from refusals import refused

from lorafusion_jax.trials import read_lines

_WORDS = "the cold bold gold is old and the tall wall is small "


@pytest.mark.long
def test_a_small_llama_has_a_row_for_each_chip_once(tmp_path, monkeypatch):
    llama = small_llama.make(tmp_path / "llama")
    texts = tmp_path / "texts"
    fitted = tmp_path / "fitted" / "text"
    for folder in (texts, fitted):
        folder.mkdir(parents=True)
    for name in ("alice29", "lcet10", "asyoulik"):
        (texts / f"{name}.txt").write_text(120 * _WORDS)
    (fitted / "a.txt").write_text(60 * _WORDS)
    chip = experiment.EXAMPLES / "chip.yaml"
    (fitted.parent / "chip.yaml").write_text(chip.read_text())
    monkeypatch.setattr(experiment, "EXAMPLES", fitted.parent)
    monkeypatch.setattr(experiment, "WINDOWS", 1)
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    command = ["--base", str(llama), "--texts", str(texts), "--chips", "0", *folders]
    setting = "errors of 3 %"
    experiment.main([*command, "--settings", setting])
    chosen = "errors of 3 %, chosen ADC bits"
    experiment.main([*command, "--settings", setting, "errors of 10 %", chosen])
    rows = read_lines(tmp_path / "out" / "rows.jsonl")
    assert [experiment.job_of(row) for row in rows] == [
        (setting, False, 0),
        (setting, True, 0),
        ("errors of 10 %", True, 0),
        (chosen, True, 0),
    ]
    losses = [experiment.losses_above(row) for row in rows]
    assert all(excess.shape == (4, 1) for excess in losses)
    assert np.abs(losses[2]).mean() > np.abs(losses[1]).mean() > 0
    assert len((tmp_path / "out" / "table.csv").read_text().splitlines()) == 5
    with refused("there is no setting errors: choose from errors of 3 %"):
        experiment.main([*command, "--settings", "errors"])
    (texts / "alice29.txt").write_text(100 * _WORDS)
    with refused("holds other rows .texts_sha256"):
        experiment.main(command)
