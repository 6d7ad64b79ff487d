"""Scripts of the experiments that no other file runs: settings of the ablations, the sweep as one program."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import one_block
import pytest

from lorafusion_jax import FuseOptions, fuse
from lorafusion_jax.runs.prepare import check

_EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
_TASK = one_block.SMALL / "tasks" / "rotr_next"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(_EXPERIMENTS))
    try:
        import ablations
        import seed_sweep
        from lab import common

        yield common, ablations, seed_sweep
    finally:
        sys.path.remove(str(_EXPERIMENTS))


def test_every_ablation_can_run_and_is_next_to_what_it_varies(scripts):
    common, ablations, _ = scripts
    options = ablations.AblationOptions()
    settings = set()
    for group in options.groups:
        entries = ablations.entries_of(group, options)
        for name, entry in entries.items():
            recipe = common.recipe_of(entry)
            run = FuseOptions(
                base="base",
                pool="pool",
                task="task",
                method=entry.method,
                control=entry.control,
                recipe=recipe,
                load_in=entry.load_in or "full",
                train_rows=entry.train_rows or 100,
            )
            check(run)
            settings.add((group, json.dumps(dataclasses.asdict(run), default=str)))
            assert name
    # Within a group no two rows run the same.
    assert len(settings) == sum(len(ablations.entries_of(group, options)) for group in options.groups)
    plain = ablations.METHODS["LoRAFusion"]
    for group in ("granularity", "composition", "start", "bits", "pruning", "controls"):
        first = next(iter(ablations.entries_of(group, options).values()))
        assert common.recipe_of(first) == common.recipe_of(plain) and first.control == "none"


@pytest.mark.nightly
def test_a_sweep_is_its_runs(scripts, tmp_path, capsys):
    common, _, seed_sweep = scripts
    base, pool = one_block.cut(tmp_path)
    given = {"--base": [base], "--pool": [pool], "--task": [_TASK], "--seeds": [1, 2], "--epochs": [2]}
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
        alone = fuse(
            FuseOptions(
                base=str(base),
                pool=str(pool),
                task=str(_TASK),
                seeds=(1, 2),
                out=tmp_path,
                name=f"alone-{rate}",
                recipe=dataclasses.replace(recipe, lr_coefficients=rate, lr_magnitudes=0.02, epochs=2),
            )
        )
        assert [seed["loss"] for seed in alone["seeds"]] == loss[0].tolist()
        assert [seed["exact_match"] for seed in alone["seeds"]] == score[0].tolist()


def test_a_single_seed_has_no_spread(scripts):
    _, _, seed_sweep = scripts
    options = seed_sweep.SweepOptions(seeds=(1,), lr_coefficients=(0.1,), lr_magnitudes=(0.01,))
    assert seed_sweep._table(np.full((1, 1, 1), 40.0), options).endswith("| coefficients 0.1 | 40.0 |")
    both = seed_sweep._table(np.array([[[40.0, 42.0]]]), options)
    assert both.endswith("| coefficients 0.1 | 41.0 ± 1.4 |")


def test_lines_are_added_behind_the_last_whole_one(scripts, tmp_path):
    common, _, _ = scripts
    file = tmp_path / "rows.jsonl"
    assert common.read_lines(file) == []
    file.write_text('{"a": 1}\n{"a": NaN}\n{"a": [2, ')
    assert [of["a"] for of in common.read_lines(file)][0] == 1 and len(common.read_lines(file)) == 2
    common.append_line(file, {"a": 3})
    assert file.read_text() == '{"a": 1}\n{"a": NaN}\n{"a": 3}\n'
    file.write_text("not JSON\n")
    with pytest.raises(ValueError, match="rows.jsonl, line 1 is not JSON .*fix or remove the line"):
        common.read_lines(file)


def test_adapters_of_other_settings_or_without_a_row_are_refused(scripts, tmp_path, monkeypatch):
    import language_pool

    monkeypatch.setattr(language_pool, "find", lambda name, folder: tmp_path / name)
    monkeypatch.setattr(language_pool, "load", lambda path, rows: None)
    monkeypatch.setattr(language_pool, "source_rows", lambda path: 100)
    monkeypatch.setattr(language_pool, "_train", lambda *_: pytest.fail("was trained"))
    given = ["--tasks", str(tmp_path), "--out", str(tmp_path), "--sources", "one", "two"]
    settings = {"rank": 8, "lr": 0.005, "chat": False}
    (tmp_path / "pool.jsonl").write_text(json.dumps({"task": "one", "config": settings}) + "\n")
    with pytest.raises(ValueError, match=r"one was trained with rank 8, asked is 4: .*--out"):
        language_pool.main([*given, "--rank", "4"])
    (tmp_path / "adapters" / "two").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"adapters/two is there, but pool.jsonl has no line of it.*remove"):
        language_pool.main(given)


def test_a_picture_that_fails_leaves_the_one_before(scripts, tmp_path, monkeypatch):
    import crossbar_pictures

    class Broken:
        def savefig(self, path, **_):
            Path(path).write_bytes(b"half")
            raise OSError("the disk is full")

    (tmp_path / "crossbar_tile.png").write_bytes(b"whole")
    monkeypatch.setattr(crossbar_pictures, "tile", Broken)
    with pytest.raises(OSError, match="disk is full"):
        crossbar_pictures.main(["--out", str(tmp_path)])
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("crossbar_tile.png", b"whole")]


def test_a_plan_counts_the_rows_that_an_ablation_learns_from(scripts, capsys):
    _, ablations, _ = scripts
    task = str(one_block.SMALL / "tasks" / "double_digit")
    given = ["--base", "t5-small", "--tasks", task, "--groups", "examples", "--examples", "10", "100", "--plan"]
    ablations.main(given)
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("League")] == [
        "League 95+5, 20 epochs, 20 modules", "League 95+5, 20 epochs over 10 rows, 20 modules"
    ]  # fmt: skip
    hundred, ten = said.split("over 10 rows")
    assert hundred.splitlines()[1:] != ten.splitlines()[1:]


def _planned(ablations, capsys, *given):
    """Return the cells of every row of a plan for t5-small, by its name."""
    task = str(one_block.SMALL / "tasks" / "double_digit")
    ablations.main(["--base", "t5-small", "--pool", "none", "--tasks", task, *given, "--plan"])
    said = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| ")]
    return said, {name: cells for name, *cells in lines if name not in ("method", "all") and set(name) != {"-"}}


def test_a_plan_has_every_row_of_a_matrix_with_numbers_of_its_own(scripts, capsys):
    _, ablations, _ = scripts
    options = ablations.AblationOptions()
    for group in ("controls", "granularity"):
        said, rows = _planned(ablations, capsys, "--groups", group)
        assert set(rows) == set(ablations.entries_of(group, options))
        trained = {name: cells[1] for name, cells in rows.items()}
        if group == "controls":  # v of 3 x 6 layers, rank 1
            assert trained["LoRA of equal size"] == f"{18 * (512 + 512):,}"
            assert rows["random pool"] == rows["LoRAFusion"] and said.count("| all ") == 1
        else:  # 20 modules, 12 blocks, q and v of 18 attentions, rank 16
            of_sizes = {"global": 20, "block": 20 * 12, "site": 20 * 36, "rank": 20 * 36 * 16}
            assert {size: trained[f"coefficients only, {size}"] for size in of_sizes} == {
                size: f"{count:,}" for size, count in of_sizes.items()
            }


def test_a_plan_says_its_dtype_and_bits(scripts, capsys):
    _, ablations, _ = scripts
    full, narrow = (
        _planned(ablations, capsys, "--groups", "bits", "--dtype", dtype) for dtype in ("float32", "bfloat16")
    )
    weights = [float(rows["float32"][5].removesuffix(" MiB")) for _, rows in (full, narrow)]
    assert weights[0] == pytest.approx(2 * weights[1], rel=0.01) and "bfloat16 on a CPU" in narrow[0]
    sizes = [float(full[1][bits][5].removesuffix(" MiB")) for bits in ("float32", "int8", "nf4")]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] < 0.4 * sizes[0]
    for bits in ("int8", "nf4"):
        assert full[0].count(f"float32 on a CPU, base and pool in {bits}. ") == 1


def test_trials_are_added_to_those_of_another_process(scripts, tmp_path, monkeypatch):
    import language_tune

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
