"""Real language: roles of the tasks, and the script that trains the pool, on a small Llama and tasks made up here."""

import random

import language as experiment
import language_pool
import pytest
import small_llama
import tune
from json_files import write_json
from lab import language
from refusals import refused

from lorafusion_jax.io import read_adapter
from lorafusion_jax.tasks import Example
from lorafusion_jax.trials import read_lines


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.setattr(experiment, "FOLDER", tmp_path / "smollm2")


def _words(path, pairs):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [{"input": word, "output": answer} for word, answer in pairs])
    return path


def _colours(path, rows, first=0):
    """Write a task whose answer is the colour that its input names, after a number that counts from `first`."""
    colours = [("red", "blue")[i % 2] for i in range(rows)]
    pairs = [(f"{first + i} {colour}", colour) for i, colour in enumerate(colours)]
    random.Random(0).shuffle(pairs)
    return _words(path, pairs)


def test_no_task_has_two_roles_and_relations_are_to_families_of_the_pool():
    unseen = [name for tasks in language.UNSEEN.values() for name in tasks]
    for pool in language.POOLS.values():
        sources = [name for family in pool.values() for name in family]
        roles = [*sources, *language.TUNING, *unseen]
        assert len(roles) == len(set(roles)) and len(sources) == 24
    for relation, tasks in language.UNSEEN.items():
        assert len(tasks) >= 2
        for family in tasks.values():
            assert (family in language.SOURCES) == (relation != "none")


def test_test_pairs_that_something_was_trained_on_are_left_out_and_counted(tmp_path):
    source = _words(
        tmp_path / "tasks" / "source.json",
        [(f"Source {i}", f"Answer {i}.") for i in range(190)],
    )
    trained = language.trained_pairs(["source"], tmp_path / "tasks")
    of_source = language.load_task(source, train_rows=100).train
    assert trained["source"] == {
        (row.input.lower(), row.target.lower().rstrip(".")) for row in of_source
    }

    seen = of_source[0]
    train = [Example(f"Word {i}", f"Answer {i}") for i in range(100)]
    clean = [Example(f"new {i}", "yes") for i in range(150)]
    known = [Example("WORD 3", "answer 3."), Example(seen.input.upper(), seen.target)]
    others = [Example(text, "another answer") for text in ("word 3", seen.input)]

    def task(name, test):
        return language.write_task(tmp_path / name, train=train, test=test)

    found = language.unseen(
        task("leaks", [*known, *others, *clean]), trained, tmp_path / "out"
    )
    assert found == (tmp_path / "out" / "leaks", 2)
    kept = language.load_task(found.path)
    assert (kept.train, kept.test) == (tuple(train), (*others, *clean))
    # Pairs that are not evaluated leave the task unchanged.
    for name, test in (("clean", [*others, *clean]), ("late", [*clean, *known])):
        path = task(name, test)
        assert language.unseen(path, trained, tmp_path / "out") == (path, 0)


def test_a_task_that_a_source_was_trained_on_is_refused(tmp_path):
    path = _words(
        tmp_path / "new.json", [(f"Word {i}", f"Answer {i}.") for i in range(200)]
    )
    task = language.load_task(path, train_rows=100)
    pairs = [(row.input.lower(), row.target.lower().rstrip(".")) for row in task.test]
    assert (
        language.unseen(path, {"source": set(pairs[:5])}, tmp_path / "out").left_out
        == 5
    )
    with refused(
        r"new is not unseen: 6% of its test pairs are training pairs of source, .*5%"
    ):
        language.unseen(path, {"source": set(pairs[:6])}, tmp_path / "out")
    few = {f"source {i}": set(pairs[5 * i : 5 * i + 5]) for i in range(6)}
    with refused(
        r"30 of 100 test pairs are training pairs, .* expected at least 75 others"
    ):
        language.unseen(path, few, tmp_path / "out")


def test_a_dose_has_a_number_of_modules_of_the_family_and_all_smaller_doses():
    for family in experiment.RELEVANCE.values():
        own = set(language.SOURCES[family])
        before = set()
        for dose in experiment.DOSES:
            modules = experiment.dosed(family, dose, seed=2)
            relevant = own & set(modules)
            assert len(set(modules)) == experiment.FUSED
            assert len(relevant) == (len(own) if dose == "all" else int(dose))
            assert before <= relevant
            before = relevant
    assert experiment.dosed("words", "1", 1) != experiment.dosed("words", "1", 2)
    twins = experiment.dosed("words", "1", 1, "random-")
    assert twins[0] in language.SOURCES["words"] and all(
        name.startswith("random-") for name in twins[1:]
    )


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Train a pool of two tasks next to two others, on a small model and few rows; return where tasks and rows lie."""
    llama = small_llama.make(tmp_path / "llama")
    for module in (experiment, language_pool):
        monkeypatch.setattr(module, "base", lambda: llama)
    monkeypatch.setattr(experiment, "DIRECTIONS", 4)
    for module in (language, language_pool):
        monkeypatch.setattr(module, "EVALUATED_ROWS", 6)
    for name, first in (("one", 0), ("two", 0), ("new", 1000), ("tune", 2000)):
        _colours(tmp_path / "tasks" / f"{name}.json", 190, first)
    tasks = ["--tasks", str(tmp_path / "tasks"), "--out", str(tmp_path / "out")]
    language_pool.main([*tasks, *"--sources one two --rank 2".split()])
    return tasks


def test_the_pool_is_trained_task_by_task(trained, tmp_path, monkeypatch):
    file = tmp_path / "out" / "pool.jsonl"
    before = file.read_text()
    row, other = read_lines(file)
    assert (row["task"], other["task"], row["test_rows"]) == ("one", "two", 6)
    assert (row["train_rows"], row["steps"]) == (100, 30)
    assert row["adapter"]["loss"] < row["base"]["loss"]
    assert len(row["validation_loss"]) == 5
    assert row["adapter"]["same_case"] <= row["adapter"]["exact_match"]
    assert row["base"]["option_accuracy"] is not None
    adapter = read_adapter(str(tmp_path / "out" / "adapters" / "one"))
    assert (
        adapter.config["base_model_name_or_path"]
        == "HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    assert {
        (str(A.dtype), A.shape[0], B.shape[1]) for A, B in adapter.factors.values()
    } == {("bfloat16", 2, 2)}
    assert {path.rpartition(".")[2] for path in adapter.factors} == {"q_proj", "v_proj"}

    more = []
    monkeypatch.setattr(
        language_pool,
        "_train",
        lambda name, path, options: more.append(name) or row | {"task": name},
    )
    language_pool.main([*trained, *"--sources one new --rank 2".split()])
    assert more == ["new"]
    assert file.read_text().startswith(before)


@pytest.mark.nightly
def test_the_table_and_its_tuning_run_on_a_small_model(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "TUNING", ("tune",))
    monkeypatch.setattr(experiment, "SOURCES", {"colours": ("one", "two")})
    command = f"{' '.join(trained)} --adapters {tmp_path / 'out' / 'adapters'}"
    tune.main([*command.split(), "--methods", "coefficients only"])
    trials = read_lines(tmp_path / "out" / "tune.jsonl")
    assert len({trial["loss"] for trial in trials}) == len(trials) == 9
    assert (tmp_path / "out" / "table_tune.csv").read_text().count("←") == 1
    for name in ("LoRAFusion", "uniform mean"):
        entry = language.MAIN[name]
        few = language._entry(entry, entry.rates, modules=2)
        monkeypatch.setitem(experiment.MAIN, name, few)
    main = f"{command} --groups main --unseen new --seeds 1 2 --methods LoRAFusion"
    experiment.main([*main.split(), "uniform mean"])
    rows = read_lines(tmp_path / "out" / "main.jsonl")
    found = [(row["method"], row["seed"]) for row in rows]
    assert found == [("uniform mean", 1), ("LoRAFusion", 1), ("LoRAFusion", 2)]
    assert rows[1]["loss"] < rows[0]["loss"]
    assert (tmp_path / "out" / "main" / "table.csv").exists()
