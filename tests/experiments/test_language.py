"""Real language: roles of the tasks, and the script that trains the pool, on a small Llama and tasks made up here."""

import json
import random
from pathlib import Path

import pytest
import small_llama

from lorafusion_jax.io.peft.adapter import read_adapter

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(_ROOT / "experiments"))
    import _language
    import language_pool

    return _language, language_pool


def _colours(path: Path, rows: int) -> Path:
    """Write a task whose answer is the colour that its input names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [{"input": f"{i} {('red', 'blue')[i % 2]}", "output": ("red", "blue")[i % 2]} for i in range(rows)]
    random.Random(0).shuffle(found)
    path.write_text(json.dumps(found))
    return path


def test_no_task_has_two_roles_and_every_relation_has_two(scripts):
    language, _ = scripts
    sources = [name for family in language.SOURCES.values() for name in family]
    unseen = [name for tasks in language.UNSEEN.values() for name in tasks]
    roles = [*sources, *language.TUNING, *unseen]
    assert len(roles) == len(set(roles))
    assert len(sources) == 24 and len(language.TUNING) == 2 and len(unseen) >= 8
    assert all(len(tasks) >= 2 for tasks in language.UNSEEN.values())
    assert all(
        (family in language.SOURCES) == (relation != "none")
        for relation, tasks in language.UNSEEN.items()
        for family in tasks.values()
    )


def test_the_published_tasks_are_there_and_long_enough(scripts, shared):
    language, _ = scripts
    folder = shared / "data" / "function_vectors"
    if not folder.is_dir():
        pytest.skip("needs the function-vector data sets in ../shared/data/function_vectors")
    sources = [name for family in language.SOURCES.values() for name in family]
    for name in sources:
        path = language.find(name, folder)
        task = language.load(path, language.source_rows(path))
        assert len(task.train) >= 100
    for name in (*language.TUNING, *(name for tasks in language.UNSEEN.values() for name in tasks)):
        task = language.load(language.find(name, folder))
        assert len(task.train) == 100 and task.train[0].input.startswith("Q: ") and task.train[0].input.endswith("\nA:")


def test_rows_of_a_source(scripts, tmp_path):
    language, _ = scripts
    counts = {190: 100, 250: 100, 420: 166, 460: 250, 900: 500}
    for rows, train in counts.items():
        path = _colours(tmp_path / f"{rows}.json", rows)
        assert language.source_rows(path) == train
        assert len(language.load(path, train).test) == rows - train
    with pytest.raises(ValueError, match=r"150 different inputs, and 50 of them to test on when 100 train"):
        language.load(_colours(tmp_path / "150.json", 150))


def test_the_pool_is_trained_task_by_task(scripts, tmp_path, monkeypatch, capsys):
    _, language_pool = scripts
    llama = small_llama.make(tmp_path / "llama")
    monkeypatch.setattr(language_pool, "base", lambda: llama)
    monkeypatch.setattr(language_pool, "TEST_ROWS", 8)
    for name in ("one", "two"):
        _colours(tmp_path / "tasks" / "sub" / f"{name}.json", 190)
    given = ["--tasks", str(tmp_path / "tasks"), "--out", str(tmp_path / "out"), "--rank", "2"]
    given += ["--lr", "0.02"]
    language_pool.main([*given, "--sources", "one"])
    first = (tmp_path / "out" / "pool.jsonl").read_text()
    row = json.loads(first)
    assert (row["task"], row["train_rows"], row["test_rows"], row["steps"]) == ("one", 100, 8, 30)
    assert row["adapter"]["loss"] < row["base"]["loss"] and len(row["validation_loss"]) == 5
    assert row["adapter"]["same_case"] <= row["adapter"]["exact_match"]
    assert row["base"]["option_accuracy"] is not None
    adapter = read_adapter(str(tmp_path / "out" / "adapters" / "one"))
    assert adapter.config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert {(str(A.dtype), A.shape[0], B.shape[1]) for A, B in adapter.factors.values()} == {("bfloat16", 2, 2)}
    assert {path.rpartition(".")[2] for path in adapter.factors} == {"q_proj", "v_proj"}

    language_pool.main([*given, "--sources", "one", "two", "--plan"])
    said = capsys.readouterr().out
    assert "1 tasks, " in said and "of 1 finished tasks" in said and "95 rows x 5" in said
    trained = []
    monkeypatch.setattr(
        language_pool, "_train", lambda name, path, options: trained.append(name) or row | {"task": name}
    )
    language_pool.main([*given, "--sources", "one", "two"])
    assert trained == ["two"]
    assert (tmp_path / "out" / "pool.jsonl").read_text().startswith(first)
