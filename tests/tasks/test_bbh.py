"""LoraHub's split of BIG-Bench Hard: the published digests are the oracle; bad input stops before a write."""

import hashlib
import json

import bbh_rows
import pytest
from json_files import write_json
from refusals import refused

from lorafusion_jax.tasks import write_lorahub_split

_PREFIX = "Count.\n\n"
_EXAMPLES = [{"input": f"Wie groß ist {i}?", "target": str(i)} for i in range(6)]


def _digest(numbers, sep="\n"):
    """The digest of rows, their lines written out by hand."""
    lines = [
        f'{{"context": "Count.\\n\\nQ: Wie groß ist {i}?{json.dumps(sep)[1:-1]}A:", "completion": "{i}"}}'
        for i in numbers
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _entry(example=(4, 0, 2), zero_shot=(1, 5), sep="\n", **other):
    return {
        "example": list(example),
        "zero_shot": list(zero_shot),
        "prefix": [_PREFIX],
        "sep": sep,
        "sha256_example": _digest(example, sep),
        "sha256_zero_shot": _digest(zero_shot, sep),
    } | other


@pytest.fixture
def write(tmp_path):
    """Writes index and benchmark, then the split."""

    def run(index=None, examples=None, **arguments):
        bbh = tmp_path / "bbh"
        bbh.mkdir(exist_ok=True)
        for name in ("counting", "measuring"):
            (bbh / f"{name}.json").write_text(
                json.dumps({"examples": examples or _EXAMPLES}), encoding="utf-8"
            )
        if index is None:
            index = {"counting": _entry(), "measuring": _entry(sep="", example=[3])}
        path = tmp_path / "index.json"
        path.write_text(json.dumps(index), encoding="utf-8")
        return write_lorahub_split(bbh, tmp_path / "out", index=path, **arguments)

    return run


def test_every_task_is_written_as_its_digest_says(tmp_path):
    rows, index = bbh_rows.write(tmp_path)
    folders = write_lorahub_split(rows, tmp_path / "out", index=index)
    assert folders == [tmp_path / "out" / name for name in bbh_rows.TASKS]
    for folder in folders:
        rows = bbh_rows.TASKS[folder.name][1]
        trained = bbh_rows.TRAIN_ROWS
        for part, numbers in (
            ("example", range(trained)),
            ("zero_shot", range(trained, len(rows))),
        ):
            written = (folder / f"{part}.jsonl").read_text(encoding="utf-8")
            assert written == "\n".join(bbh_rows.lines(folder.name, numbers)), (
                folder.name
            )


def test_what_is_there_is_left_and_what_is_missing_is_added(write):
    folder, _ = write()
    kept = folder / "example.jsonl"
    lost = folder / "zero_shot.jsonl"
    before = kept.stat()
    content = lost.read_bytes()
    lost.unlink()
    write()
    after = kept.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert lost.read_bytes() == content
    assert sorted(path.name for path in folder.iterdir()) == [
        "example.jsonl",
        "zero_shot.jsonl",
    ]


def test_other_rows_in_place_are_not_overwritten(write):
    folder, other = write()
    (folder / "example.jsonl").unlink()
    (other / "zero_shot.jsonl").write_text("mine")
    with refused(r"measuring/zero_shot\.jsonl exists with other rows: move it"):
        write()
    assert (other / "zero_shot.jsonl").read_text() == "mine"
    assert not (folder / "example.jsonl").exists()


# Bad input


@pytest.mark.parametrize(("row", "part"), [(4, "example"), (5, "zero_shot")])
def test_another_version_of_the_benchmark_is_noticed_before_anything_is_written(
    write, tmp_path, row, part
):
    changed = [
        {**example, "target": "x"} if i == row else example
        for i, example in enumerate(_EXAMPLES)
    ]
    with refused(
        rf"counting, {part}\.jsonl: its rows have the sha256 \w{{12}}\.\.\., and LoraHub's have \w{{12}}\.\.\.: "
        r".*counting\.json is probably another version of the benchmark's file; take that of the folder bbh of https:"
    ):
        write(examples=changed)
    assert not (tmp_path / "out").exists()


def test_the_package_has_lorahubs_index(tmp_path):
    """Rows like the benchmark's, but not its own: LoraHub's digests and numbers are compared with them."""
    rows = [
        {"input": f"not ( True ) and {i} is", "target": "False"} for i in range(250)
    ]
    for name in ("boolean_expressions", "snarks"):
        write_json(tmp_path / f"{name}.json", {"examples": rows[:200]})
    with refused(
        r"boolean_expressions, example: the index lists row 2\d\d of .*rows 0 to 199"
    ):
        write_lorahub_split(tmp_path, tmp_path / "out", ["boolean_expressions"])
    with refused(
        r"snarks, example\.jsonl: its rows have the sha256 .*, and LoraHub's have \w{12}"
    ):
        write_lorahub_split(tmp_path, tmp_path / "out", ["snarks"])
    with refused(r"has no task none: it has boolean_expressions, .*, word_sorting"):
        write_lorahub_split(tmp_path, tmp_path / "out", ["none"])
