"""Runs compared with each other: the same test rows, paired seeds, and what is refused."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import recipes
from json_files import read_json, write_json
from refusals import refused

from lorafusion_jax import cli, fuse
from lorafusion_jax.runs import run_path
from lorafusion_jax.runs.compare import CompareOptions, compare


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """Folders and results: a method of two seeds with an own prompt, one of a single seed, and fewer test rows."""
    out = tmp_path_factory.mktemp("runs")
    found = {}
    for name, changes in (
        ("mean", {"method": "mean", "prompt": "{context}? {input}"}),
        ("base", {"method": "zero-shot", "pool": None}),
        ("fewer", {"method": "zero-shot", "pool": None, "test_rows": 5}),
    ):
        options = recipes.small_run(
            small, out, name=name, **{"test_rows": 12} | changes
        )
        found[name] = (run_path(options), fuse(options))
    return found


def test_means_and_paired_differences_are_those_of_the_runs(runs, tmp_path, capsys):
    folders = [runs[name][0] for name in ("mean", "base")]
    means, differences = compare(
        CompareOptions(runs=tuple(folders), plot=tmp_path / "new" / "means.png")
    )
    scores = {
        name: [seed["exact_match"] for seed in results.seeds]
        for name, (_, results) in runs.items()
    }
    assert [line[0] for line in means.lines] == ["mean", "base"]
    of_base = dict(
        zip([column.name for column in means.columns], means.lines[-1], strict=True)
    )
    paired = dict(
        zip(
            [column.name for column in differences.columns],
            differences.lines[-1],
            strict=True,
        )
    )
    assert of_base["mean"] == (pytest.approx(scores["base"][0]), None)
    low, high = of_base["95 % interval"]
    assert low <= scores["base"][0] <= high
    difference = np.mean(scores["mean"]) - scores["base"][0]
    assert (
        paired["difference"] == pytest.approx(difference, abs=1e-6)
        and 0 < paired["p"] <= 1
    )
    assert (tmp_path / "new" / "means.png").stat().st_size
    cli.main(["compare", *map(str, folders), "--reference", str(folders[1])])
    assert re.search(
        r"base minus each other run.*\n(.*\n)*\| mean +\|", capsys.readouterr().out
    )


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    mean = runs["mean"][0]
    base = runs["base"][0]
    fewer = runs["fewer"][0]
    nothing = tmp_path / "nothing"
    for folders, message in (
        ((mean, fewer), "fewer was evaluated on other test rows than .*mean"),
        ((mean, nothing), "nothing is not the folder of a run"),
        ((), "expected two or more different runs"),
        ((mean, mean), "expected two or more different runs"),
    ):
        with refused(message):
            compare(CompareOptions(runs=folders))
    with refused("is none of the runs"):
        compare(CompareOptions(runs=(mean, base), reference=fewer))


def test_damaged_runs_are_not_compared(runs, tmp_path):
    mean = runs["mean"][0]
    damaged = Path(shutil.copytree(mean, tmp_path / "damaged"))
    options = CompareOptions(runs=(runs["base"][0], damaged))
    rows = (mean / "predictions.jsonl").read_text().splitlines(keepends=True)
    for damaged_rows, count in ((rows[1:], 11), ([*rows, rows[0]], 13), ([], 0)):
        (damaged / "predictions.jsonl").write_text("".join(damaged_rows))
        with refused(rf"predictions.jsonl holds {count} rows of seed .*: expected"):
            compare(options)
    (damaged / "predictions.jsonl").unlink()
    with refused("damaged/predictions.jsonl: missing: restore it from a copy"):
        compare(options)
    results = read_json(mean / "results.json")
    write_json(damaged / "results.json", results | {"seeds": []})
    with refused(r"damaged/results.json: seeds is \[\]: expected .*, as in config"):
        compare(options)
