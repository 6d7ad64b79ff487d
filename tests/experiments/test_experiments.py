"""The experiments' own bookkeeping; what they run is tested where it is made."""

import dataclasses
import sys
from pathlib import Path

import pytest

from lorafusion_jax.runs.folder import RunFolder

_ROOT = Path(__file__).resolve().parents[2]
_SMALL = _ROOT / "examples" / "small"
# Methods with a learning rate; those that search or merge have none.
_TRAINED = ("fusion", "coefficients", "magnitudes", "lora", "dora", "vera", "full", "mean-fusion")


@pytest.fixture(scope="module")
def experiments():
    """The experiments' modules, imported as their scripts see them."""
    sys.path.insert(0, str(_ROOT / "experiments"))
    try:
        import demo
        import tune
        from lab import common, methods

        yield common, methods, demo, tune
    finally:
        sys.path.remove(str(_ROOT / "experiments"))


def test_an_earlier_result_is_kept_beside_a_new_one(experiments, tmp_path):
    common, *_ = experiments
    folder = tmp_path / "runs" / "demo"
    for content in ("first", "second", "third"):
        with common.fresh_folder(folder):
            assert not (folder / "table.md").exists()
            (folder / "table.md").write_text(content)
    kept = {path.name: (path / "table.md").read_text() for path in folder.parent.iterdir()}
    assert kept == {"demo.1": "first", "demo.2": "second", "demo": "third"}


def test_a_folder_in_use_stays_where_it_is(experiments, tmp_path):
    common, *_ = experiments
    folder = tmp_path / "demo"
    with RunFolder(folder).locked():
        (folder / "table.md").write_text("being written")
        with pytest.raises(ValueError, match="demo is in use by process"), common.fresh_folder(folder):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert (folder / "table.md").read_text() == "being written"


def test_the_demo_measures_on_tasks_that_nothing_was_trained_or_tuned_on(experiments):
    *_, demo, tune = experiments
    shown = {*demo.TASKS, demo.OUT_OF_REACH}
    assert len(demo.TASKS) >= 4
    assert shown <= {path.name for path in (_SMALL / "tasks").iterdir()}
    assert not shown & {path.name for path in (_SMALL / "adapters").iterdir()}
    assert not shown & set(tune.TASKS)
    assert not set(demo.SEEDS) & set(tune.SEEDS)


def test_every_trained_method_had_the_same_number_of_trials(experiments):
    common, methods, _, tune = experiments
    everything = methods.METHODS | methods.COEFFICIENTS | methods.IN_BASIS
    trained = {name: entry for name, entry in everything.items() if entry.method in _TRAINED}
    assert list(tune.TRIALS) == list(trained)
    assert len({len(trials) for trials in tune.TRIALS.values()}) == 1
    for name, entry in everything.items():
        common.recipe_of(entry)  # raises on a name that a recipe does not have
        if name not in trained:
            assert not entry.rates
            continue
        assert entry.rates in tune.TRIALS[name] or entry.few_rates in tune._trials(name, "5")
        for trial in tune.TRIALS[name]:
            common.recipe_of(dataclasses.replace(entry, rates=trial))


def test_the_table_of_trials_marks_the_best_of_each_method(experiments):
    *_, tune = experiments

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
