"""experiments/report.py: from files of rows to a folder with page, tables and plots."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_rows import made_up

from lorafusion_jax.report import append_rows

_ROOT = Path(__file__).resolve().parents[2]


def _report(*arguments):
    command = [sys.executable, "experiments/report.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    return subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.long
def test_the_script_writes_all(tmp_path):
    results, more, out = tmp_path / "results.jsonl", tmp_path / "more.jsonl", tmp_path / "out"
    rows = made_up(methods=("zero-shot", "LoRA"), items=20)
    append_rows(results, rows)
    append_rows(more, [{**found, "league": "5"} for found in rows])
    done = _report(results, "--out", out, "--title", "One league")
    assert done.returncode == 0, done.stderr
    names = {"report.html", "table.md", "table.csv", "table.tex", "paired.csv", "means.png", "trainable.png"}
    assert {path.name for path in out.iterdir()} == names
    assert "<h1>One league</h1>" in (out / "report.html").read_text()
    assert "LoRA minus each other method" in (out / "table.md").read_text()
    done = _report(results, more, "--out", out / "both")
    assert done.returncode == 0, done.stderr
    both = {f"{Path(name).stem}_{league}{Path(name).suffix}" for name in names for league in ("95+5", "5")}
    assert {path.name for path in (out / "both").iterdir()} == both - {"report_95+5.html", "report_5.html"} | {
        "report.html"
    }


def test_the_script_helps_and_names_errors(tmp_path):
    done = _report("--help")
    assert done.returncode == 0 and "python experiments/report.py runs/" in done.stdout
    done = _report(tmp_path / "none.jsonl", "--out", tmp_path)
    assert done.returncode == 2 and "none.jsonl" in done.stderr and "Traceback" not in done.stderr
