"""A matrix of runs: its rows, that no result is computed twice, and bad input that it refuses."""

import json
import sys
from dataclasses import replace

import jax
import one_block
import pytest
from lab import matrix
from lab.methods import ARMS
from refusals import refused

from lorafusion_jax.trials import key, read_rows

_ENTRIES = {
    name: replace(ARMS[name], recipe={"batch_size": 48, "max_new_tokens": 8})
    for name in ("zero-shot", "constant answer", "coefficients only")
}


@pytest.fixture(scope="module")
def options(small, tmp_path_factory):
    base, pool = small
    out = tmp_path_factory.mktemp("matrix") / "out"
    return matrix.MatrixOptions(
        base=str(base),
        pool=str(pool),
        tasks=(str(one_block.SMALL / "tasks" / "double_digit"),),
        out=out,
        seeds=(1, 2),
        modules=2,
        epochs=1,
        test_rows=5,
    )


@pytest.fixture
def ran(monkeypatch):
    """The list to which every run adds its method and folder."""
    ran = []
    fuse = matrix.fuse

    def run(options):
        ran.append((options.method, options.name))
        return fuse(options)

    monkeypatch.setattr(matrix, "fuse", run)
    return ran


def test_missing_rows_alone_are_computed_and_those_of_other_settings_refused(
    options, ran, capsys
):
    file = matrix.run_matrix(options, _ENTRIES)
    rows = read_rows(file)
    # What trains nothing and draws nothing has one seed.
    seeds = {"zero-shot": (1,)}
    expected = {
        ("double_digit", name, "95+5", seed)
        for name in _ENTRIES
        for seed in seeds.get(name, options.seeds)
    }
    assert {key(row) for row in rows} == expected and len(rows) == len(expected)
    assert [method for method, _ in ran] == [
        entry.method for entry in _ENTRIES.values()
    ]
    assert len({name for _, name in ran}) == len(ran)
    assert (
        "[5/5] double_digit, coefficients only, 95+5 shots, seed 2:"
        in capsys.readouterr().err
    )
    for row in rows:
        assert len(row["correct"]) == 5 and row["option_correct"] is None
        assert row["config"]["recipe"].get("modules") == (
            2 if row["config"]["pool"] else None
        )
        trained = row["method"] == "coefficients only"
        assert row["trainable"] == (2 * 2 if trained else 0)  # modules times blocks
        assert (row["forward_rows"], row["backward_rows"]) == (
            (100, 95) if trained else (0, 0)
        )
        assert (row["loss"] is None) == (row["method"] == "constant answer")
    before = file.read_bytes()
    ran.clear()
    assert matrix.run_matrix(options, _ENTRIES) == file
    assert not ran and file.read_bytes() == before
    # Without one of its rows, the matrix computes that one again.
    lines = file.read_text().splitlines(keepends=True)
    gone = rows.index(
        next(row for row in rows if key(row)[1::2] == ("constant answer", 2))
    )
    file.write_text("".join(lines[:gone] + lines[gone + 1 :]))
    matrix.run_matrix(options, _ENTRIES)
    assert [method for method, _ in ran] == ["constant"]
    assert read_rows(file) == [*rows[:gone], *rows[gone + 1 :], rows[gone]]
    before = file.read_bytes()
    ran.clear()
    for changes, message in [
        (
            {"epochs": 2},
            r"zero-shot, 95\+5 shots, seed 1 was run with other settings \(epochs was 1, is 2\)",
        ),
        ({"chat": True}, "chat was False, is True"),
    ]:
        with refused(message):
            matrix.run_matrix(replace(options, **changes), _ENTRIES)
    assert not ran and file.read_bytes() == before


def test_five_shots_have_five_rows_and_more_epochs(options):
    parts = replace(options, shots=("95+5", "5"), methods=("coefficients only",))
    jobs = [*matrix.jobs(replace(parts, epochs=None), _ENTRIES)]
    plenty = jobs[0].options
    few = jobs[1].options
    assert (plenty.train_rows, few.train_rows) == (100, 5)
    assert (plenty.recipe.epochs, few.recipe.epochs) == (20, 40)
    assert plenty.name != few.name
    (none,) = matrix.jobs(
        replace(options, epochs=0, methods=("coefficients only",)), _ENTRIES
    )
    assert none.options.recipe.epochs == 0  # not the default


_OUT_OF_MEMORY = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n1 more line"
)


def test_a_job_that_runs_out_of_memory_fails_alone_and_is_repeated_on_request(
    options, monkeypatch, capsys, tmp_path
):
    ran = []
    fuse = matrix.fuse
    errors = [_OUT_OF_MEMORY, MemoryError()]

    def run(options):
        ran.append(options.method)
        if options.method == "constant" and errors:
            raise errors.pop(0)
        return fuse(options)

    monkeypatch.setattr(matrix, "fuse", run)
    few = replace(options, methods=("constant answer", "zero-shot"), out=tmp_path)
    for retry, cause in (
        (False, "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
        (True, "MemoryError"),
    ):
        file = matrix.run_matrix(replace(few, retry_failed=retry), _ENTRIES)
        assert {row["method"] for row in read_rows(file)} == {"zero-shot"}
        printed = capsys.readouterr().err
        assert f"double_digit, constant answer, 95+5: out of memory ({cause}" in printed
        assert "jobs ran out of memory" in printed and "--retry-failed" in printed
        failed = json.loads((tmp_path / "failed.jsonl").read_text().splitlines()[-1])
        assert (failed["method"], failed["seeds"], failed["config"]["test_rows"]) == (
            "constant answer",
            [1, 2],
            5,
        )
        matrix.run_matrix(few, _ENTRIES)
        assert "1 of 2 jobs ran out of memory" in capsys.readouterr().err
    matrix.run_matrix(replace(few, retry_failed=True), _ENTRIES)
    assert ran == ["constant", "zero-shot", "constant", "constant"]
    assert {
        row["seed"] for row in read_rows(file) if row["method"] == "constant answer"
    } == {1, 2}


def test_bad_input_is_refused_before_anything_runs(options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    entries = _ENTRIES | {"LoraHub": ARMS["LoraHub"]}
    for changes, message in [
        (
            {"methods": ("coefficients only", "LoRa")},
            "no method LoRa: choose of zero-shot; constant answer; coeff",
        ),
        ({"tasks": ()}, "no task: give at least one with --tasks"),
        (
            {"modules": 5},
            "pool holds 4 modules, and 5 are to be drawn: give fewer with --modules",
        ),
        ({"pool": str(tmp_path)}, "is not a pool"),
        (
            {"methods": ("LoraHub",)},
            r'LoraHub.* needs nevergrad, .* pip install "lorafusion-jax\[lorahub\]"',
        ),
    ]:
        with refused(message):
            matrix.run_matrix(
                replace(options, out=tmp_path / "new", **changes), entries
            )
    assert not (tmp_path / "new").exists()
    # Methods without a pool need none.
    poolless = replace(options, pool=str(tmp_path), methods=("zero-shot",))
    assert [job.options.pool for job in matrix.jobs(poolless, _ENTRIES)] == [None]
