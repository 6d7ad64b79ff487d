"""A matrix of runs: its rows, what is not run twice, and what it refuses."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import one_block
import pytest
from made_up_rows import row as made_up_row

from lorafusion_jax.report import append_rows, done, read_rows

_EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
_TASK = one_block.SMALL / "tasks" / "double_digit"
_OLD = Path(__file__).resolve().parents[1] / "old_version" / "results.jsonl"
_QUICK = {"batch_size": 48, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def matrix():
    """The experiments' module, imported as its scripts see it, and methods that are quick."""
    sys.path.insert(0, str(_EXPERIMENTS))
    try:
        from lab import matrix, methods

        chosen = ("zero-shot", "constant answer", "uniform mean", "coefficients only")
        entries = {name: methods.METHODS[name] for name in chosen}
        yield matrix, {name: dataclasses.replace(entry, recipe=_QUICK) for name, entry in entries.items()}
    finally:
        sys.path.remove(str(_EXPERIMENTS))


@pytest.fixture(scope="module")
def options(matrix, tmp_path_factory):
    out = tmp_path_factory.mktemp("matrix")
    base, pool = one_block.cut(out)
    return matrix[0].MatrixOptions(
        base=str(base),
        pool=str(pool),
        tasks=(str(_TASK),),
        seeds=(1, 2),
        modules=2,
        epochs=1,
        test_rows=5,
        out=out / "matrix",
    )


def _counted(matrix, monkeypatch) -> list[tuple[str, str]]:
    """Return the list to which every run adds its method and folder."""
    ran, fuse = [], matrix.fuse

    def run(options):
        ran.append((options.method, options.name))
        return fuse(options)

    monkeypatch.setattr(matrix, "fuse", run)
    return ran


def test_every_result_is_a_row_and_none_is_run_twice(matrix, options, monkeypatch, capsys):
    module, entries = matrix
    ran = _counted(module, monkeypatch)
    file = module.run_matrix(options, entries)
    rows = read_rows(file)
    # What trains nothing and draws nothing has one seed.
    seeds = {"zero-shot": (1,)}
    expected = {
        ("double_digit", method, "95+5", seed) for method in entries for seed in seeds.get(method, options.seeds)
    }
    assert done(rows) == expected and len(rows) == len(expected)
    assert [method for method, _ in ran] == [entry.method for entry in entries.values()]
    assert len({name for _, name in ran}) == len(ran)
    assert "[4/4] double_digit, coefficients only, 95+5:" in capsys.readouterr().err
    for row in rows:
        assert len(row["correct"]) == 5 and row["option_correct"] is None
        assert row["config"]["recipe"].get("modules") == (2 if row["config"]["pool"] else None)
        trained = row["method"] == "coefficients only"
        assert row["trainable"] == (2 * 2 if trained else 0)  # modules times blocks
        assert (row["forward_rows"], row["backward_rows"]) == ((100, 95) if trained else (0, 0))
        assert (row["loss"] is None) == (row["method"] == "constant answer")
    before = file.read_bytes()
    ran.clear()
    assert module.run_matrix(options, entries) == file
    assert not ran and file.read_bytes() == before


def test_a_row_that_is_missing_is_run_again_alone(matrix, options, monkeypatch):
    module, entries = matrix
    file = module.run_matrix(options, entries)
    lines = file.read_text().splitlines(keepends=True)
    (gone,) = [line for line in lines if (row := json.loads(line))["method"] == "uniform mean" and row["seed"] == 2]
    kept = [line for line in lines if line != gone]
    file.write_text("".join(kept))
    ran = _counted(module, monkeypatch)
    module.run_matrix(options, entries)
    assert [method for method, _ in ran] == ["mean"]
    again = file.read_text().splitlines(keepends=True)
    assert again[:-1] == kept and json.loads(again[-1]) == json.loads(gone)


def test_rows_of_other_settings_are_no_part_of_a_matrix(matrix, options, monkeypatch):
    module, entries = matrix
    file = module.run_matrix(options, entries)
    before = file.read_bytes()
    ran = _counted(module, monkeypatch)
    for changes, message in [
        (
            {"epochs": 2},
            r"results.jsonl: double_digit, zero-shot, 95\+5, seed 1 was run with other settings \(epochs was 1, is 2\)",
        ),
        ({"test_rows": 4}, "test_rows was 5, is 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            module.run_matrix(dataclasses.replace(options, **changes), entries)
    assert not ran and file.read_bytes() == before


def test_rows_of_an_old_version_are_a_part_of_the_matrix(matrix, tmp_path, monkeypatch):
    """They have numbers of all methods in one recipe, and old names of options."""
    import small_pool

    ran = _counted(matrix[0], monkeypatch)
    shutil.copy(_OLD, tmp_path)
    task = str(small_pool.SMALL / "tasks" / "swapends_prev")
    chosen = small_pool.SmallPoolOptions(tasks=(task,), methods=("LoRA", "LoRAFusion"), seeds=(1,), out=tmp_path)
    matrix[0].run_matrix(chosen, small_pool.METHODS)
    assert not ran and (tmp_path / "results.jsonl").read_bytes() == _OLD.read_bytes()
    fewer = dataclasses.replace(chosen, modules=5)
    with pytest.raises(ValueError, match=r"LoRAFusion, 95\+5, seed 1 .* \(modules was 20, is 5\)"):
        matrix[0].run_matrix(fewer, small_pool.METHODS)


def test_more_seeds_are_more_rows(matrix, options):
    module, entries = matrix
    few = dataclasses.replace(options, methods=("uniform mean",), seeds=(7,), out=options.out.with_name("seeds"))
    file = module.run_matrix(few, entries)
    first = file.read_text()
    module.run_matrix(dataclasses.replace(few, seeds=(7, 8)), entries)
    assert file.read_text().startswith(first)
    assert [row["seed"] for row in read_rows(file)] == [7, 8]


def test_the_league_of_five_has_five_rows_and_more_epochs(matrix, options):
    module, entries = matrix
    leagues = dataclasses.replace(options, leagues=("95+5", "5"), methods=("coefficients only",))
    plenty, few = (job.options for job in module.jobs(dataclasses.replace(leagues, epochs=None), entries))
    assert (plenty.train_rows, few.train_rows) == (100, 5)
    assert (plenty.recipe.epochs, few.recipe.epochs) == (20, 40)
    assert plenty.name != few.name


_OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n1 more line")


@pytest.mark.parametrize("error", [_OUT_OF_MEMORY, MemoryError()], ids=lambda error: type(error).__name__)
def test_a_job_that_runs_out_of_memory_fails_alone_and_is_tried_again_only_if_asked(
    matrix, options, monkeypatch, capsys, tmp_path, error
):
    module, entries = matrix
    ran, fuse = [], module.fuse

    def run(options):
        ran.append(options.method)
        if options.method == "mean":
            raise error
        return fuse(options)

    monkeypatch.setattr(module, "fuse", run)
    few = dataclasses.replace(options, methods=("zero-shot", "uniform mean", "constant answer"), out=tmp_path)
    file = module.run_matrix(few, entries)
    assert ran == ["zero-shot", "mean", "constant"]
    assert {row["method"] for row in read_rows(file)} == {"zero-shot", "constant answer"}
    said = capsys.readouterr().err
    assert f"[2/3] double_digit, uniform mean, 95+5: out of memory ({str(error).partition(chr(10))[0] or 'Mem'}" in said
    assert "1 of 3 jobs ran out of memory" in said and "--retry-failed" in said
    (failed,) = map(json.loads, (tmp_path / "failed.jsonl").read_text().splitlines())
    assert (failed["method"], failed["seeds"], failed["config"]["test_rows"]) == ("uniform mean", [1, 2], 5)

    ran.clear()
    module.run_matrix(few, entries)
    assert not ran and "1 of 3 jobs ran out of memory" in capsys.readouterr().err
    # One seed is another job, and so is one that is retried.
    module.run_matrix(dataclasses.replace(few, seeds=(1,)), entries)
    assert ran == ["mean"]
    monkeypatch.setattr(module, "fuse", fuse)
    module.run_matrix(dataclasses.replace(few, retry_failed=True), entries)
    assert {row["seed"] for row in read_rows(file) if row["method"] == "uniform mean"} == {1, 2}
    assert "out of memory" not in capsys.readouterr().err.splitlines()[-1]
    module.run_matrix(few, entries)
    assert "out of memory" not in capsys.readouterr().err


def test_other_errors_of_jax_end_a_matrix_and_so_does_one_without_any_result(matrix, options, monkeypatch, tmp_path):
    module, entries = matrix

    def run(options):
        raise error

    monkeypatch.setattr(module, "fuse", run)
    error = jax.errors.JaxRuntimeError("INTERNAL: a fault")
    one = dataclasses.replace(options, methods=("uniform mean",), out=tmp_path)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        module.run_matrix(one, entries)
    assert not (tmp_path / "failed.jsonl").exists()
    error = _OUT_OF_MEMORY
    for _ in range(2):
        with pytest.raises(ValueError, match="1 of 1 jobs ran out of memory .* and no other job has a result"):
            module.run_matrix(one, entries)


def test_what_cannot_be_run(matrix, options, tmp_path, monkeypatch):
    module, entries = matrix
    for changes, message in [
        ({"methods": ("coefficients only", "LoRa")}, "no method LoRa: choose of zero-shot; constant answer; uniform"),
        ({"tasks": ()}, "no task: give at least one with --tasks"),
        ({"modules": 5}, "pool holds 4 modules, and 5 are to be drawn: give fewer with --modules"),
        ({"pool": str(tmp_path)}, "is not a pool"),
    ]:
        with pytest.raises(ValueError, match=message):
            module.run_matrix(dataclasses.replace(options, out=tmp_path / "new", **changes), entries)
    assert not (tmp_path / "new").exists()
    # A library that is missing is named before anything runs.
    monkeypatch.setitem(sys.modules, "evosax", None)
    search = {"CMA-ES": dataclasses.replace(entries["uniform mean"], method="cma")}
    with pytest.raises(ValueError, match=r"CMA-ES needs evosax, .* pip install -e '\.\[cma\]'"):
        module.run_matrix(dataclasses.replace(options, out=tmp_path / "new"), entries | search)
    assert not (tmp_path / "new").exists()
    # Methods without a pool need none.
    poolless = dataclasses.replace(options, pool=str(tmp_path), methods=("zero-shot",))
    assert [job.options.pool for job in module.jobs(poolless, entries)] == [None]


def test_no_epochs_are_not_the_default_epochs(matrix, options):
    module, entries = matrix
    (job,) = module.jobs(dataclasses.replace(options, epochs=0, methods=("coefficients only",)), entries)
    assert job.options.recipe.epochs == 0
    with pytest.raises(ValueError, match="epochs"):
        module.run_matrix(dataclasses.replace(options, epochs=0, methods=("coefficients only",)), entries)


def test_a_report_compares_with_a_method_only_where_every_league_has_it(matrix, tmp_path):
    module, _ = matrix
    file = tmp_path / "results.jsonl"
    append_rows(file, [made_up_row("one", "LoRA", 1, [True]), made_up_row("one", "LoRAFusion", 1, [True])])
    assert module.against("LoRA", file) == ["--reference", "LoRA"]
    append_rows(file, [made_up_row("one", "LoRAFusion", 1, [True]) | {"league": "5"}])
    assert module.against("LoRA", file) == []
    assert module.against("LoRAFusion", file) == ["--reference", "LoRAFusion"]
