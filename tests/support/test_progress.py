"""Progress is live on a terminal, and a line a minute in a log."""

import time

import jax
import pytest

from lorafusion_jax.support import progress as module
from lorafusion_jax.support.progress import progress


def test_a_log_has_no_line_before_a_minute(capsys):
    with progress("train", 10) as bar:
        bar.update(5)
    assert capsys.readouterr().err == ""


def test_the_time_left_does_not_count_the_first_item_nor_compilation(
    capsys, monkeypatch
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    clock = 0.0
    with progress("train", 1000) as bar:
        assert "train: compiling" in capsys.readouterr().err
        monkeypatch.setattr(bar, "_time", lambda: clock)
        clock += 100  # of which most is compilation
        bar.update(1)
        assert "?it/s" in capsys.readouterr().err
        for _ in range(20):
            clock += 1
            bar.update(1)
        clock += 51
        jax.monitoring.record_event_duration_secs(
            "/jax/core/compile/backend_compile_duration", 50.0
        )
        bar.update(1)
        assert "1.00it/s" in capsys.readouterr().err.rpartition("\r")[2]


@pytest.mark.parametrize("process", [0, 1])
def test_the_first_process_alone_writes_a_line_to_a_log(process, capsys, monkeypatch):
    monkeypatch.setattr(module, "_MINUTE", 0.01)
    monkeypatch.setattr("jax.process_index", lambda: process)
    with progress("train", 10, done=2) as bar:
        bar.update(1)
        time.sleep(0.02)
        bar.update(4)
        assert ("train:  70%" in capsys.readouterr().err) == (process == 0)
