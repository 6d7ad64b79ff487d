"""Progress is live on a terminal, and a line a minute in a log."""

import time

import pytest

from lorafusion_jax.support import progress as module
from lorafusion_jax.support.progress import progress


def test_a_log_has_no_line_before_a_minute(capsys):
    with progress("train", 10) as bar:
        bar.update(5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("process", [0, 1])
def test_the_first_process_alone_writes_a_line_to_a_log(process, capsys, monkeypatch):
    monkeypatch.setattr(module, "_MINUTE", 0.01)
    monkeypatch.setattr("jax.process_index", lambda: process)
    with progress("train", 10, done=2) as bar:
        time.sleep(0.02)
        bar.update(5)
        assert ("train:  70%" in capsys.readouterr().err) == (process == 0)
