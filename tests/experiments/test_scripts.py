"""The experiments' bookkeeping and settings: folders, rows, trials, ablations, plans."""

import dataclasses
import json

import ablations
import demo
import one_block
import tune
from lab import common, matrix, methods
from refusals import refused

from lorafusion_jax import FuseOptions
from lorafusion_jax.methods import find
from lorafusion_jax.runs import RunFolder

_TASKS = one_block.SMALL / "tasks"


def test_an_earlier_result_is_kept_next_to_a_new_one(tmp_path):
    folder = tmp_path / "runs" / "demo"
    for content in ("first", "second", "third"):
        with common.fresh_folder(folder):
            assert not (folder / "table.md").exists()
            (folder / "table.md").write_text(content)
    kept = {
        path.name: (path / "table.md").read_text() for path in folder.parent.iterdir()
    }
    assert kept == {"demo.1": "first", "demo.2": "second", "demo": "third"}
    with RunFolder(folder).locked():
        with (
            refused("demo is in use by process"),
            common.fresh_folder(folder),
        ):
            pass
        assert (folder / "table.md").read_text() == "third"


def test_the_demo_measures_on_tasks_that_nothing_was_trained_or_tuned_on():
    shown = {*demo.TASKS, demo.OUT_OF_REACH}
    sources = {path.name for path in (one_block.SMALL / "adapters").iterdir()}
    assert shown <= {path.name for path in _TASKS.iterdir()}
    assert not shown & (sources | {*tune.TASKS})
    assert not {*demo.SEEDS} & {*tune.SEEDS}


def test_every_trained_method_had_the_same_number_of_trials():
    everything = methods.ARMS | methods.COEFFICIENTS | methods.IN_BASIS
    trained = {
        name: entry
        for name, entry in everything.items()
        if find(entry.method).learns == "trained"
    }
    assert list(tune.TRIALS) == list(trained)
    assert len({len(tried) for tried in tune.TRIALS.values()}) == 1
    for name, entry in everything.items():
        matrix.recipe_of(entry)  # raises on a name that a recipe does not have
        tried = tune.TRIALS.get(name, [])
        assert entry.rates in tried if tried else not entry.rates
        for trial in tried:
            matrix.recipe_of(dataclasses.replace(entry, rates=trial))


def test_every_ablation_can_run_and_is_next_to_what_it_varies():
    options = ablations.AblationOptions()
    plain = matrix.recipe_of(methods.ARMS["LoRAFusion"])
    for group in options.groups:
        entries = ablations.entries_of(group, options)
        settings = set()
        for entry in entries.values():
            run = FuseOptions(
                base="base",
                pool="pool",
                task="task",
                method=entry.method,
                control=entry.control,
                recipe=matrix.recipe_of(entry),
                load_in=entry.load_in or "full",
                train_rows=entry.train_rows or 100,
            )
            run.check()
            settings.add(json.dumps(dataclasses.asdict(run), default=str))
        assert len(settings) == len(entries)  # no two rows run the same
        if group in (
            "granularity",
            "composition",
            "start",
            "bits",
            "pruning",
            "controls",
        ):
            first = next(iter(entries.values()))
            assert matrix.recipe_of(first) == plain and first.control == "none"


def test_a_plan_has_every_row_of_a_matrix_with_its_numbers(capsys):
    command = f"--base t5-small --pool none --tasks {_TASKS / 'double_digit'} --plan"
    ablations.main(f"{command} --groups controls".split())
    printed = capsys.readouterr().out
    rows = {}
    for line in printed.splitlines():
        if line.startswith("| "):
            name, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
            rows[name] = cells
    entries = ablations.entries_of("controls", ablations.AblationOptions())
    assert set(entries) <= set(rows)
    # v of 3 x 6 layers, rank 1
    assert rows["LoRA of equal size"][1] == f"{18 * (512 + 512):,}"
    assert rows["random pool"] == rows["LoRAFusion"] and printed.count("| all ") == 1
    with refused("no column question"):
        ablations.main([*command.split(), "--prompt", "{question}"])
