"""The page of results: its content, how a browser shows it, and the script that writes it with tables and plots."""

import html
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import results_page
from lab.page import page
from made_up_rows import made_up, row

from lorafusion_jax.report import plot_means, scores
from lorafusion_jax.trials import MatrixOptions, append_rows

_SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "results_page.py"

_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr"
).split()
# Appended to a copy of the page: how wide its images came out, and whether anything but boxes that scroll is too wide.
_PROBE = """<script>
addEventListener("load", () => {
  const body = document.body;
  body.dataset.widths = [...document.images].map(image => image.naturalWidth).join(" ");
  body.dataset.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
});
</script>"""


@pytest.fixture(scope="module")
def whole():
    """A page with both numbers of shots, of 5 seeds, 6 tasks and 16 methods."""
    rows = [*made_up(), *made_up(shots="5", options=False, start=1)]
    return page(rows, "Fusing <frozen> & other LoRAs", "First <b>.\n\nSecond.")


def test_without_a_complete_method_there_is_a_page_and_no_plot(tmp_path):
    rows = [row(task, method, 1, np.ones(8, bool)) for task, method in (("easy", "a"), ("hard", "b"))]
    with pytest.raises(ValueError, match="no method has results of all 2 tasks: there are no means to draw"):
        plot_means(scores(rows)[0], tmp_path / "means.png")
    assert "No method has results of all tasks yet" in page(rows, "early")


def test_all_text_is_escaped():
    name = "<script>alert('a\"b')</script>&"
    rows = [row(name, f"{method}{name}", 1, np.ones(8, bool)) for method in "ab"]
    for found in rows:
        found.update(device=name, versions={name: name}, config={name: {"x": found["method"]}})
    text = page(rows, name, name)
    assert "<script" not in text and "&lt;script&gt;alert(&#x27;a&quot;b&#x27;)" in text


def test_the_page_is_whole_and_needs_no_other_file(whole):
    bare, unclosed = re.sub('base64,[^"]*', "", whole), []
    for end, tag in re.findall(r"<(/?)(\w+)", bare):
        if end:
            assert unclosed.pop() == tag
        elif tag not in ("meta", "link", "img", "wbr"):
            unclosed.append(tag)
    assert not unclosed
    addresses = re.findall(r'\b(?:src|href|srcset|data)="([^"]*)"', bare)
    assert len(addresses) == 3 and all(address.startswith("data:") for address in addresses)
    assert "http" not in bare and "url(" not in whole and "@import" not in whole
    shown = html.unescape(re.sub("<[^>]*>", "", bare))
    for text in ("95 + 5 examples", "5 examples", "First <b>.", "recipe.lr", "jax 0.10.2", "fusion sum minus each"):
        assert text in shown
    assert whole.count("prefers-color-scheme: dark") == 1 and 'name="viewport"' in whole


def test_the_page_shows_how_configurations_differ():
    rows = made_up(methods=("LoRA", "fusion sum"), tasks=("easy",), seeds=(1, 2), items=8)
    rows[0]["config"]["only"] = [1, 2]
    text = page(rows, "title", reference="LoRA")
    assert '<th scope="row">recipe.lr</th><td>0.002</td><td>0.02</td>' in text
    assert '<th scope="row">only</th><td>[1, 2]</td><td>–</td>' in text
    assert '<th scope="row">recipe.epochs</th><td>20</td></tr>' in text
    assert rows[0]["data_sha256"] in text and "LoRA minus each other method" in text


@pytest.mark.skipif(_BROWSER is None, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_tables_and_images_without_errors(whole, tmp_path, width):
    probed = tmp_path / "page.html"
    probed.write_text(whole.replace("</body>", f"{_PROBE}</body>"))
    # A window is never narrower than 500: a frame is, which shows the same page.
    frame = tmp_path / "frame.html"
    script = "f.onload = () => setTimeout(() => { dom.textContent = f.contentDocument.body.outerHTML; }, 200)"
    frame.write_text(
        f'<link rel="icon" href="data:,"><iframe id="f" src="page.html" width="{width}" height="800"></iframe>'
        f'<pre id="dom"></pre><script>{script}</script>'
    )
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [_BROWSER, *_FLAGS, profile, "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=100, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    dom = done.stdout.replace("&lt;", "<").replace("&gt;", ">")
    widths = [int(found) for found in re.search('data-widths="([^"]*)"', dom)[1].split()]
    assert len(widths) == 2 and min(widths) > 500
    assert re.search('data-overflow="([^"]*)"', dom)[1] == "0"
    assert dom.count("<table>") == 9 and dom.count("</table>") == 9
    assert dom.count("<caption>fusion sum minus each other method") == 2


@pytest.fixture
def report(monkeypatch):
    """A function that runs the script with some arguments."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["results_page.py", *map(str, arguments)])
        runpy.run_path(str(_SCRIPT), run_name="__main__")

    return run


@pytest.mark.long
def test_the_script_writes_page_tables_and_plots(report, tmp_path):
    results, more, out = tmp_path / "results.jsonl", tmp_path / "more.jsonl", tmp_path / "out"
    rows = made_up(methods=("zero-shot", "LoRA"), items=20)
    append_rows(results, rows)
    append_rows(more, [{**found, "shots": "5"} for found in rows])
    report(results, "--out", out, "--title", "One number")
    names = {"table.csv", "table.tex", "paired.csv", "means.png"}
    assert {path.name for path in out.iterdir()} == names | {"report.html"}
    assert "<h1>One number</h1>" in (out / "report.html").read_text()
    assert "LoRA minus each other method" in (out / "table.tex").read_text()
    report(results, more, "--out", out / "both")
    both = {f"{Path(name).stem}_{shots}{Path(name).suffix}" for name in names for shots in ("95+5", "5")}
    assert {path.name for path in (out / "both").iterdir()} == both | {"report.html"}


def test_a_matrix_is_compared_with_a_method_only_where_all_shots_have_it(tmp_path, monkeypatch):
    file, given = tmp_path / "results.jsonl", []
    monkeypatch.setattr(results_page, "run_matrix", lambda *_, **__: file)
    monkeypatch.setattr(results_page, "main", given.append)
    options = MatrixOptions(base="", pool="", tasks=(), out=tmp_path)
    rows = [row("one", method, 1, [True]) for method in ("LoRA", "LoRAFusion")]
    for more, compared in (rows, ["LoRA", "LoRAFusion"]), ([rows[1] | {"shots": "5"}], ["LoRAFusion"]):
        append_rows(file, more)
        for reference in ("LoRA", "LoRAFusion"):
            results_page.run_and_report(options, {}, "", reference)
            assert given.pop()[5:] == (["--reference", reference] if reference in compared else [])


def test_the_script_names_errors(report, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        report("none.jsonl", "--out", "out")
    assert "none.jsonl" in capsys.readouterr().err
