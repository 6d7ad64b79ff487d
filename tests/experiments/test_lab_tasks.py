"""Tasks that experiments find in folders of other projects."""

from lab.tasks import lorahub_tasks, prompt_overlap
from refusals import refused

from lorafusion_jax.tasks import Example, Task


def test_lorahubs_own_folder(tmp_path):
    with refused("data_bbh does not exist: give LoraHub's data_bbh"):
        lorahub_tasks(tmp_path / "data_bbh")
    for name in ("snarks", "navigate"):
        (tmp_path / "data_bbh" / name).mkdir(parents=True)
    with refused(r"data_bbh has no task: .*release 0\.1 .*BIG-Bench-Hard.*--bbh"):
        lorahub_tasks(tmp_path / "data_bbh")
    for name in ("snarks", "navigate"):
        row = '{"context": "a", "completion": "b"}'
        (tmp_path / "data_bbh" / name / "example.jsonl").write_text(row)
    assert [path.name for path in lorahub_tasks(tmp_path / "data_bbh")] == [
        "navigate",
        "snarks",
    ]


def test_overlap_is_of_prompts_alone():
    said = Example("a", "1", (("user", "b"),))
    train = (Example("a", "1"), Example("b", "2"))
    test = (Example("b", "3"), Example("c", "1"), Example("a", "1"), Example("a ", "1"))
    assert prompt_overlap(Task("t", train, test, "here")) == (0, 2)
    assert prompt_overlap(Task("t", (), test, "here")) == ()
    assert prompt_overlap(Task("t", (said,), (said, Example("a", "1")), "here")) == (0,)
