"""Progress is live on a terminal, and a line a minute in a log."""

import time

from lorafusion_jax import progress as module
from lorafusion_jax.progress import progress


def test_what_takes_less_than_a_minute_writes_nothing_to_a_log(capsys):
    with progress("train", 10) as bar:
        bar.update(5)
    assert capsys.readouterr().err == ""


def test_a_log_has_a_line_where_the_time_has_come(capsys, monkeypatch):
    monkeypatch.setattr(module, "_MINUTE", 0.01)
    with progress("train", 10, done=2) as bar:
        time.sleep(0.02)
        bar.update(5)
        assert "train:  70%" in capsys.readouterr().err


def test_other_processes_write_nothing(capsys, monkeypatch):
    monkeypatch.setattr(module, "_MINUTE", 0.01)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with progress("train", 10) as bar:
        time.sleep(0.02)
        bar.update(5)
    assert capsys.readouterr().err == ""
