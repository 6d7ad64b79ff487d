"""experiments/results_page.py: from files of rows to a folder with page, tables and plots."""

import runpy
import sys
from pathlib import Path

import pytest
from made_up_rows import made_up

from lorafusion_jax.report import append_rows

_SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "results_page.py"


@pytest.fixture
def report(monkeypatch):
    """A function that runs the script with some arguments."""

    monkeypatch.syspath_prepend(str(_SCRIPT.parent))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["results_page.py", *map(str, arguments)])
        runpy.run_path(str(_SCRIPT), run_name="__main__")

    return run


@pytest.mark.long
def test_the_script_writes_all(report, tmp_path):
    results, more, out = tmp_path / "results.jsonl", tmp_path / "more.jsonl", tmp_path / "out"
    rows = made_up(methods=("zero-shot", "LoRA"), items=20)
    append_rows(results, rows)
    append_rows(more, [{**found, "league": "5"} for found in rows])
    report(results, "--out", out, "--title", "One league")
    names = {"report.html", "table.csv", "table.tex", "paired.csv", "means.png", "trainable.png"}
    assert {path.name for path in out.iterdir()} == names
    assert "<h1>One league</h1>" in (out / "report.html").read_text()
    assert "LoRA minus each other method" in (out / "table.tex").read_text()
    report(results, more, "--out", out / "both")
    both = {f"{Path(name).stem}_{league}{Path(name).suffix}" for name in names for league in ("95+5", "5")}
    assert {path.name for path in (out / "both").iterdir()} == both - {"report_95+5.html", "report_5.html"} | {
        "report.html"
    }


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [(["--help"], 0, "python experiments/results_page.py runs/"), (["none.jsonl", "--out", "out"], 2, "none.jsonl")],
)
def test_the_script_helps_and_names_errors(arguments, code, said, report, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        report(*arguments)
    printed = capsys.readouterr()
    assert stopped.value.code == code and said in (printed.err if code else printed.out)
