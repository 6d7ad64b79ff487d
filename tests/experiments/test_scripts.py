"""The experiments' bookkeeping and settings: folders, rows, trials, ablations, plans, the sweep as one program."""

import dataclasses
import json
from pathlib import Path

import ablations
import crossbar_pictures
import demo
import language_pool
import language_tune
import numpy as np
import one_block
import pytest
import seed_sweep
import tune
from lab import common, methods

from lorafusion_jax import FuseOptions, fuse
from lorafusion_jax.methods import find
from lorafusion_jax.runs.folder import RunFolder
from lorafusion_jax.runs.prepare import check

_TASKS = one_block.SMALL / "tasks"


def test_an_earlier_result_is_kept_next_to_a_new_one(tmp_path):
    folder = tmp_path / "runs" / "demo"
    for content in ("first", "second", "third"):
        with common.fresh_folder(folder):
            assert not (folder / "table.md").exists()
            (folder / "table.md").write_text(content)
    kept = {path.name: (path / "table.md").read_text() for path in folder.parent.iterdir()}
    assert kept == {"demo.1": "first", "demo.2": "second", "demo": "third"}
    with RunFolder(folder).locked():
        with pytest.raises(ValueError, match="demo is in use by process"), common.fresh_folder(folder):
            pass
        assert (folder / "table.md").read_text() == "third"


def test_the_demo_measures_on_tasks_that_nothing_was_trained_or_tuned_on():
    shown = {*demo.TASKS, demo.OUT_OF_REACH}
    assert len(demo.TASKS) >= 4
    assert shown <= {path.name for path in _TASKS.iterdir()}
    assert not shown & {path.name for path in (one_block.SMALL / "adapters").iterdir()}
    assert not shown & set(tune.TASKS)
    assert not set(demo.SEEDS) & set(tune.SEEDS)


def test_every_trained_method_had_the_same_number_of_trials():
    everything = methods.METHODS | methods.COEFFICIENTS | methods.IN_BASIS
    trained = {name: entry for name, entry in everything.items() if find(entry.method).learns == "trained"}
    assert list(tune.TRIALS) == list(trained)
    assert len({len(trials) for trials in tune.TRIALS.values()}) == 1
    for name, entry in everything.items():
        common.recipe_of(entry)  # raises on a name that a recipe does not have
        trials = tune.TRIALS.get(name, [])
        assert entry.rates in trials if trials else not entry.rates
        for trial in trials:
            common.recipe_of(dataclasses.replace(entry, rates=trial))


def test_the_table_of_trials_marks_the_best_of_each_method():
    def trial(method, rate, *scores):
        tasks = {task: {"exact_match": [score]} for task, score in zip(tune.TASKS, scores, strict=True)}
        mean = sum(scores) / len(scores)
        return {"method": method, "rates": {"lr_lora": rate}, "tasks": tasks, "exact_match": mean}

    trials = [trial("LoRA", 0.1, 10.0, 20.0), trial("LoRA", 0.2, 30.0, 10.0), trial("other", 0.3, 1.0, 2.0)]
    assert tune.table_of([*trials, trial("LoRA", 0.4, 20.0, 20.0)])[1:] == [
        ["LoRA", "lr_lora 0.1", "10.0", "20.0", "15.0", ""],
        ["LoRA", "lr_lora 0.2", "30.0", "10.0", "20.0", "←"],
        ["other", "lr_lora 0.3", "1.0", "2.0", "1.5", "←"],
        ["LoRA", "lr_lora 0.4", "20.0", "20.0", "20.0", ""],
    ]


def test_every_ablation_can_run_and_is_next_to_what_it_varies():
    options = ablations.AblationOptions()
    plain = common.recipe_of(ablations.METHODS["LoRAFusion"])
    for group in options.groups:
        entries, settings = ablations.entries_of(group, options), set()
        for entry in entries.values():
            more = {"load_in": entry.load_in or "full", "train_rows": entry.train_rows or 100}
            run = {"base": "base", "pool": "pool", "task": "task", "method": entry.method, "control": entry.control}
            run = FuseOptions(**run, recipe=common.recipe_of(entry), **more)
            check(run)
            settings.add(json.dumps(dataclasses.asdict(run), default=str))
        assert len(settings) == len(entries)  # no two rows run the same
        if group in ("granularity", "composition", "start", "bits", "pruning", "controls"):
            first = next(iter(entries.values()))
            assert common.recipe_of(first) == plain and first.control == "none"


@pytest.mark.nightly
def test_a_sweep_has_the_results_of_its_runs(tmp_path, capsys):
    base, pool = one_block.cut(tmp_path)
    where = {"base": str(base), "pool": str(pool), "task": str(_TASKS / "rotr_next")}
    given = {f"--{name}": [value] for name, value in where.items()} | {"--seeds": [1, 2], "--epochs": [2]}
    given |= {"--lr-coefficients": [0.05, 0.2], "--lr-magnitudes": [0.02], "--out": [tmp_path / "sweep"]}
    seed_sweep.main([str(word) for name, values in given.items() for word in (name, *values)])
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    losses, scores = np.array(found["loss"]), np.array(found["exact_match"])
    assert losses.shape == scores.shape == (2, 1, 2)
    assert len(set(losses.ravel().tolist())) == 4
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "4 runs as one program (sequential)" in capsys.readouterr().out
    recipe = common.recipe_of(seed_sweep.METHODS["LoRAFusion"])
    for loss, score, rate in zip(losses, scores, (0.05, 0.2), strict=True):
        own = dataclasses.replace(recipe, lr_coefficients=rate, lr_magnitudes=0.02, epochs=2)
        alone = fuse(FuseOptions(**where, seeds=(1, 2), out=tmp_path, name=f"alone-{rate}", recipe=own))
        assert [seed["loss"] for seed in alone["seeds"]] == loss[0].tolist()
        assert [seed["exact_match"] for seed in alone["seeds"]] == score[0].tolist()


def test_lines_are_added_behind_the_last_whole_one(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert common.read_lines(file) == []
    file.write_text('{"a": 1}\n{"a": NaN}\n{"a": [2, ')
    assert [of["a"] for of in common.read_lines(file)][0] == 1 and len(common.read_lines(file)) == 2
    common.append_line(file, {"a": 3})
    assert file.read_text() == '{"a": 1}\n{"a": NaN}\n{"a": 3}\n'
    file.write_text("not JSON\n")
    with pytest.raises(ValueError, match="rows.jsonl, line 1 is not JSON .*fix or remove the line"):
        common.read_lines(file)


def test_adapters_of_other_settings_or_without_a_row_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(language_pool, "find", lambda name, folder: tmp_path / name)
    monkeypatch.setattr(language_pool, "load", lambda path, rows: None)
    monkeypatch.setattr(language_pool, "source_rows", lambda path: 100)
    given = ["--tasks", str(tmp_path), "--out", str(tmp_path), "--sources", "one", "two"]
    settings = {"rank": 8, "lr": 0.005, "chat": False}
    (tmp_path / "pool.jsonl").write_text(json.dumps({"task": "one", "config": settings}) + "\n")
    with pytest.raises(ValueError, match=r"one was trained with rank 8, asked is 4: .*--out"):
        language_pool.main([*given, "--rank", "4"])
    (tmp_path / "adapters" / "two").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"adapters/two .*pool.jsonl has no line of it.*remove"):
        language_pool.main(given)


def test_a_picture_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    class Broken:
        def savefig(self, path, **_):
            Path(path).write_bytes(b"half")
            raise OSError("the disk is full")

    (tmp_path / "crossbar_tile.png").write_bytes(b"whole")
    monkeypatch.setattr(crossbar_pictures, "tile", Broken)
    with pytest.raises(OSError, match="disk is full"):
        crossbar_pictures.main(["--out", str(tmp_path)])
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("crossbar_tile.png", b"whole")]


def _planned(capsys, *given):
    """Return a plan for t5-small, and the cells of its rows by name."""
    task = str(_TASKS / "double_digit")
    ablations.main(["--base", "t5-small", "--pool", "none", "--tasks", task, *given, "--plan"])
    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    return printed, {name: cells for name, *cells in lines if name not in ("method", "all") and set(name) != {"-"}}


def test_a_plan_counts_the_rows_that_an_ablation_learns_from(capsys):
    printed, _ = _planned(capsys, "--groups", "examples", "--examples", "10", "100")
    leagues = [line for line in printed.splitlines() if line.startswith("League")]
    assert leagues == [f"League 95+5, 20 epochs{few}, 20 modules" for few in ("", " over 10 rows")]
    hundred, ten = printed.split("over 10 rows")
    assert hundred.splitlines()[1:] != ten.splitlines()[1:]


def test_a_plan_has_every_row_of_a_matrix_with_its_numbers(capsys):
    options = ablations.AblationOptions()
    printed, rows = _planned(capsys, "--groups", "controls")
    assert set(rows) == set(ablations.entries_of("controls", options))
    assert rows["LoRA of equal size"][1] == f"{18 * (512 + 512):,}"  # v of 3 x 6 layers, rank 1
    assert rows["random pool"] == rows["LoRAFusion"] and printed.count("| all ") == 1
    _, rows = _planned(capsys, "--groups", "granularity")
    assert set(rows) == set(ablations.entries_of("granularity", options))
    # 20 modules, 12 blocks, q and v of 18 attentions, rank 16.
    for size, count in {"global": 20, "block": 20 * 12, "site": 20 * 36, "rank": 20 * 36 * 16}.items():
        assert rows[f"coefficients only, {size}"][1] == f"{count:,}"


def test_a_plan_shows_its_dtype_and_bits(capsys):
    full, narrow = (_planned(capsys, "--groups", "bits", "--dtype", dtype) for dtype in ("float32", "bfloat16"))
    weights = [float(rows["float32"][5].removesuffix(" MiB")) for _, rows in (full, narrow)]
    assert weights[0] == pytest.approx(2 * weights[1], rel=0.01) and "bfloat16 on a CPU" in narrow[0]
    sizes = [float(full[1][bits][5].removesuffix(" MiB")) for bits in ("float32", "int8", "nf4")]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] < 0.4 * sizes[0]
    for bits in ("int8", "nf4"):
        assert full[0].count(f"float32 on a CPU, base and pool in {bits}. ") == 1


def test_trials_are_added_to_those_of_another_process(tmp_path, monkeypatch):
    file = tmp_path / "tune.jsonl"

    def losses(method, path, adapters, trials):
        other = {"method": "LoRA", "task": path.name, "rates": {"lr_lora": 1.0}, "loss": 1.0}
        with file.open("a") as lines:
            lines.write(json.dumps(other) + "\n")
        return [2.0] * len(trials)

    for name in ("link_tasks", "make_pools"):
        monkeypatch.setattr(language_tune, name, lambda folder: folder)
    monkeypatch.setattr(language_tune, "find", lambda name, folder: Path(name))
    monkeypatch.setattr(language_tune, "_losses", losses)
    given = ["--tasks", str(tmp_path), "--out", str(tmp_path), "--methods"]
    language_tune.main([*given, "coefficients only"])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["method"] for row in rows] == (["LoRA"] + ["coefficients only"] * 9) * 2
    with pytest.raises(ValueError, match="no trials of zero-shot: choose of LoRAFusion;"):
        language_tune.main([*given, "zero-shot"])
