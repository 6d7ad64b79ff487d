"""The folder of a report: the formats of its tables, the content of its page, and how a browser shows it."""

import csv
import html
import re

import numpy as np
import pytest
import results_page
from made_up_rows import made_up, row
from refusals import refused

from lorafusion_jax.report import Column, Table, markdown, plot_means, write_report
from lorafusion_jax.trials import append_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report with both numbers of shots, of 5 seeds, 6 tasks and 16 methods."""
    rows = [*made_up(), *made_up(shots="5", options=False, start=1)]
    out = tmp_path_factory.mktemp("report")
    results_page.report(rows, out, "Fusing <frozen> & other LoRAs", "fusion sum")
    return out


def _page(out, *arguments, **options):
    write_report(out, *arguments, **options)
    return (out / "report.html").read_text()


def test_a_table_is_written_as_markdown_csv_and_html(tmp_path):
    columns = [
        Column("method", "text"),
        Column("x_1", "spread"),
        Column("ci", "interval"),
        Column("n", "counts"),
    ]
    first = ["a|b & <i>", (44.84, 1.46), (-2.0, 3.25), (900, 1000)]
    table = Table(
        "50 % of <b> & a_b",
        columns,
        [first, ["$c_1$ 100% #~^\\{}", (5.0, None), None, (1232, 1232)]],
    )
    lines = markdown(table).splitlines()
    assert lines[0] == r"50 % of \<b> & a_b"
    assert [
        cell.strip() for cell in lines[4].replace(r"\|", "¦").strip("|").split("|")
    ] == [
        r"a¦b & \<i>",
        "44.8 ± 1.5",
        "−2.0 to 3.2",
        "900 to 1,000",
    ]
    assert len({len(line) for line in lines[2:]}) == 1
    page = _page(tmp_path, "", {"some": table}, {})
    assert list(csv.reader((tmp_path / "some.csv").read_text().splitlines())) == [
        ["method", "x_1", "x_1 sd", "ci low", "ci high", "n min", "n max"],
        ["a|b & <i>", "44.84", "1.46", "-2", "3.25", "900", "1000"],
        ["$c_1$ 100% #~^\\{}", "5", "", "", "", "1232", "1232"],
    ]
    assert "<caption>50 % of &lt;b&gt; &amp; a_b</caption>" in page
    assert '<th scope="col" class="number">x_<wbr>1</th>' in page
    assert (
        '<th scope="row">a|b &amp; &lt;i&gt;</th><td class="number">44.8 ± 1.5</td>'
        in page
    )


def test_without_a_complete_method_there_is_a_page_and_no_plot(tmp_path):
    rows = [
        row(task, method, 1, np.ones(8, bool))
        for task, method in (("easy", "a"), ("hard", "b"))
    ]
    with refused("there are no means to draw"):
        plot_means({}, tmp_path / "means.png")
    results_page.report(rows, tmp_path, "early", "LoRAFusion")
    assert {path.name for path in tmp_path.iterdir()} == {
        "table.csv",
        "paired.csv",
        "report.html",
    }


def test_the_page_is_whole_and_needs_no_other_file(folder):
    whole = (folder / "report.html").read_text()
    bare = re.sub('base64,[^"]*', "", whole)
    unclosed = []
    for end, tag in re.findall(r"<(/?)(\w+)", bare):
        if end:
            assert unclosed.pop() == tag
        elif tag not in ("meta", "link", "img", "wbr"):
            unclosed.append(tag)
    assert not unclosed
    addresses = re.findall(r'\b(?:src|href|srcset|data)="([^"]*)"', bare)
    assert len(addresses) == 3 and all(
        address.startswith("data:") for address in addresses
    )
    assert "http" not in bare and "url(" not in whole and "@import" not in whole
    shown = html.unescape(re.sub("<[^>]*>", "", bare))
    for text in ("95 + 5 examples", "5 examples", "fusion sum minus each"):
        assert text in shown
    assert whole.count("prefers-color-scheme: dark") == 1 and 'name="viewport"' in whole


def test_the_script_compares_with_a_method_that_has_rows(tmp_path):
    file = tmp_path / "results.jsonl"
    append_lines(file, made_up(methods=("zero-shot", "LoRA"), items=20))
    results_page.main(f"{file} --out {tmp_path / 'out'} --reference zero-shot".split())
    assert (
        "zero-shot minus each other method"
        in (tmp_path / "out" / "report.html").read_text()
    )
    with refused("no results of 'LoRa' to compare with: choose one of zero-shot, LoRA"):
        results_page.main(f"{file} --out {tmp_path / 'out'} --reference LoRa".split())
