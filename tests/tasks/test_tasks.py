"""Reading tasks, splitting them, drawing modules, tokenising: what arrives, and what bad input is told."""

import json
import random
from dataclasses import replace

import datasets
import numpy as np
import one_block
import pytest
from hypothesis import given, strategies as st
from json_files import write_json
from numpy.testing import assert_array_equal
from refusals import refusals, refused

from lorafusion_jax import load_tokenizer
from lorafusion_jax.tasks import (
    Example,
    batch_orders,
    draw_modules,
    encode,
    load_task,
    split,
)


def _rows(count, start=0, keys=("input", "target")):
    return [
        dict(zip(keys, (f"question {i}", f"answer {i}"), strict=True))
        for i in range(start, start + count)
    ]


def _examples(count, start=0):
    return tuple(
        Example(f"question {i}", f"answer {i}") for i in range(start, start + count)
    )


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def _dataset(rows):
    return datasets.Dataset.from_list(rows)


@pytest.fixture(autouse=True)
def quiet_datasets():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


# Sources


@pytest.mark.parametrize(
    ("train", "test", "keys"),
    [
        ("train.jsonl", "test.jsonl", ("input", "target")),
        ("example.jsonl", "zero_shot.jsonl", ("context", "completion")),
    ],
)
def test_folder(tmp_path, train, test, keys):
    folder = tmp_path / "counting"
    _write(folder / train, _rows(3, keys=keys))
    _write(folder / test, _rows(2, start=3, keys=keys))
    task = load_task(folder)
    assert (task.name, task.source) == ("counting", str(folder))
    assert task.train == _examples(3)
    assert task.test == _examples(2, start=3)


def test_jsonl_may_have_blank_lines_crlf_a_bom_more_keys_and_unicode_line_separators(
    tmp_path,
):
    path = tmp_path / "test.jsonl"
    lines = [
        '{"input": "a", "target": "b", "id": 7}',
        "",
        '{"input": "c\u2028d", "target": "e"}',
        "",
    ]
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert load_task(path, need=["test"]).test == (
        Example("a", "b"),
        Example("c\u2028d", "e"),
    )


def test_one_file_is_divided_by_one_shuffle_whatever_is_needed(tmp_path):
    path = _write(tmp_path / "all.jsonl", _rows(150))
    task = load_task(path, name="mine")
    order = list(range(150))
    random.Random(42).shuffle(order)
    assert task.name == "mine"
    assert task.train == tuple(_examples(150)[i] for i in order[:100])
    assert task.test == tuple(_examples(150)[i] for i in order[100:])
    assert load_task(path, need=["test"]).test == task.test
    assert len(load_task(path, train_rows=10).test) == 140
    write_json(tmp_path / "bbh.json", {"examples": _rows(150), "canary": "none"})
    assert load_task(tmp_path / "bbh.json").train == task.train
    assert len(load_task(path, train_rows=0, need=["test"]).test) == 150


def test_fingerprint_tells_tasks_apart(tmp_path):
    path = _write(tmp_path / "train.jsonl", _rows(4))
    both = load_task(_write(tmp_path / "test.jsonl", _rows(4)).parent)
    assert both.sha256 == load_task(tmp_path, name="another name").sha256
    others = [load_task(tmp_path, prompt="Q: {input}"), load_task(path, need=["train"])]
    _write(path, _rows(4)[::-1])
    others.append(load_task(tmp_path))
    others.append(
        replace(both, train=both.train[:-1], test=(both.train[-1], *both.test))
    )
    told = replace(both.test[0], history=(("system", "Be brief."),))
    others.append(replace(both, test=(told, *both.test[1:])))
    assert len({both.sha256, *(task.sha256 for task in others)}) == 6


def test_prompt_stands_around_every_input(tmp_path):
    path = _write(tmp_path / "test.jsonl", [{"input": "{input} {x}", "target": "y"}])
    task = load_task(path, prompt="Count {{braces}}.\n\nQ: {input}\nA:", need=["test"])
    assert task.test == (Example("Count {braces}.\n\nQ: {input} {x}\nA:", "y"),)
    with refused(r"the prompt 'Q: \{\}' has no \{input\} or other column"):
        load_task(path, prompt="Q: {}")


def test_an_instruction_stands_before_the_input(tmp_path):
    rows = [
        {"instruction": "Name the opposite.", "input": "hot", "output": "cold"},
        {"instruction": "Name a colour.", "input": "", "output": "red"},
        {"instruction": "Name an animal.", "output": "cat"},
        {"instruction": "Name a fruit.", "input": None, "target": "fig"},
        {"instruction": "", "input": "one two", "output": "two"},
        {"instruction": None, "input": "three", "target": "four"},
        {"instruction": "Sort.", "context": "b a", "completion": "a b"},
    ]
    path = _write(tmp_path / "alpaca.jsonl", rows)
    task = load_task(path, prompt="Q: {input}\nA:", train_rows=2)
    assert {(example.input, example.target) for example in task.train + task.test} == {
        ("Q: Name the opposite.\nhot\nA:", "cold"),
        ("Q: Name a colour.\nA:", "red"),
        ("Q: Name an animal.\nA:", "cat"),
        ("Q: Name a fruit.\nA:", "fig"),
        ("Q: one two\nA:", "two"),
        ("Q: three\nA:", "four"),
        ("Q: Sort.\nb a\nA:", "a b"),
    }


@pytest.mark.parametrize(
    "splits",
    [
        {"train": _rows(3), "test": _rows(2, start=3), "validation": _rows(9)},
        {
            "train": _rows(3),
            "validation": _rows(2, start=3, keys=("context", "completion")),
        },
    ],
)
def test_a_folder_of_datasets_holds_training_and_test_rows(tmp_path, splits):
    folder = tmp_path / "saved"
    datasets.DatasetDict(
        {split: _dataset(rows) for split, rows in splits.items()}
    ).save_to_disk(folder)
    task = load_task(folder)
    assert (task.name, task.train, task.test) == (
        "saved",
        _examples(3),
        _examples(2, start=3),
    )


def test_a_folder_of_datasets_with_one_split_is_divided(tmp_path):
    _dataset(_rows(6)).save_to_disk(tmp_path / "alone")
    task = load_task(tmp_path / "alone", train_rows=4)
    assert len(task.train) == 4
    assert set(task.train + task.test) == set(_examples(6))


# Bad input


def _files(folder, *names, rows=1):
    for name in names:
        _write(folder / name, _rows(rows))


def _saved(folder, **splits):
    datasets.DatasetDict(
        {split: _dataset(rows) for split, rows in splits.items()}
    ).save_to_disk(folder)


_BOTH = "give a folder or data set that has both parts"
_LOST = "does not exist: give a task file, a task folder or a data set's hub id"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: None,
            r"is not a task folder: it holds nothing; expected train\.jsonl",
        ),
        (
            lambda folder: _files(folder, "b.json", "a.json"),
            r"it holds a\.json, b\.json; .* by its own path",
        ),
        (
            lambda folder: _files(folder, "train.jsonl", "example.jsonl"),
            "example.jsonl, two files for one part",
        ),
        (lambda folder: _files(folder, "test.jsonl"), f"has no train rows: {_BOTH}"),
        (lambda folder: _files(folder, "train.jsonl"), f"has no test rows: {_BOTH}"),
        (
            lambda folder: (folder / "dataset_dict.json").write_text("{}"),
            "cannot be loaded by datasets",
        ),
        (
            lambda folder: _saved(folder, a=_rows(1), b=_rows(1)),
            "splits a, b: expected train, and test or validation",
        ),
        (
            lambda folder: _saved(folder, train=_rows(1), test=[{"text": "a"}]),
            "split test, row 0 has text: ",
        ),
    ],
)
def test_folders_that_are_no_tasks_are_refused(tmp_path, make, message):
    make(tmp_path)
    with refused(message):
        load_task(tmp_path)


def test_other_sources_that_are_no_tasks_are_refused(tmp_path):
    path = _write(tmp_path / "one.jsonl", _rows(1))
    with refused("has one row, .*: give more rows"):
        load_task(path)
    for source in ("/no/such/folder", "no_such.jsonl", "./owner/name", "a/b/c"):
        with refused(_LOST):
            load_task(source)
    with refused("^'xxx.* cannot be a task: File name too long"):
        load_task("x" * 5000)


@pytest.mark.parametrize(
    ("train_rows", "parts"),
    [(100, (32, 8)), (40, (32, 8)), (39, (39, 1)), (0, (0, 40)), (None, (40, 0))],
)
def test_a_list_keeps_a_fifth_to_test_where_all_rows_could_train(
    tmp_path, train_rows, parts
):
    path = _write(tmp_path / "labelled.jsonl", _rows(40))
    task = load_task(path, train_rows=train_rows, need=())
    assert (len(task.train), len(task.test)) == parts


# What seeds decide


def test_the_reference_split_is_the_papers():
    order = list(range(100))
    random.Random(42).shuffle(order)
    train, validation = split(100, [1, 2, 3], protocol="reference")
    assert train.tolist() == [order[5:]] * 3 and validation.tolist() == [order[:5]] * 3


@given(
    count=st.integers(20, 300),
    limit=st.integers(20, 120),
    protocol=st.sampled_from(["reference", "default"]),
)
def test_split_divides_rows(count, limit, protocol):
    train, validation = split(count, [7, 8], protocol=protocol, limit=limit)
    used = min(count, limit)
    assert validation.shape == (2, int(0.05 * used))
    for rows in np.concatenate([train, validation], axis=1):
        assert len(set(rows.tolist())) == len(rows) == used
        assert rows.min() >= 0
        assert rows.max() < count


@pytest.mark.parametrize(("count", "limit"), [(100, 5), (19, 100), (1, 100)])
@pytest.mark.parametrize("protocol", ["reference", "default"])
def test_fewer_than_twenty_rows_are_used_for_training_and_validation(
    count, limit, protocol
):
    train, validation = split(count, [7, 8], protocol=protocol, limit=limit)
    assert_array_equal(train, validation)
    for seed, rows in zip((7, 8), train.tolist(), strict=True):
        order = list(range(count))
        random.Random(42 if protocol == "reference" else f"split, seed {seed}").shuffle(
            order
        )
        assert rows == order[:limit]


def test_draws_are_the_same_everywhere():
    # Written down once: other numbers here mean that runs of today cannot be repeated.
    assert split(20, [1]).train[0, :5].tolist() == [13, 6, 16, 10, 19]
    rows = np.arange(6, dtype=np.int32)[None]
    assert batch_orders(rows, batch_size=3, epochs=2, seeds=[1]).tolist() == [
        [[0, 2, 1], [3, 5, 4], [3, 2, 5], [0, 4, 1]]
    ]
    names = [str(i) for i in range(196)]
    drawn = draw_modules(names, 5, 42)
    assert drawn == ("163", "28", "6", "189", "70")
    random.seed(42)  # as LoraHub does
    assert drawn == tuple(random.sample(names, 5))


test_draws_from_too_little_are_refused = refusals(
    [
        (lambda: split(0, [0], limit=100), "0 of 0 rows to split: give at least one"),
        (lambda: split(50, [0], limit=0), "0 of 50 rows to split: give at least one"),
        (lambda: draw_modules("abc", 0, 0), "0 modules to be drawn from a pool of 3"),
        (lambda: draw_modules("abc", 4, 0), "4 .* from a pool of 3: draw 1 to 3"),
    ]
)


@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    epochs=st.integers(1, 4),
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
    reshuffle=st.booleans(),
)
def test_every_row_once_an_epoch(count, batch_size, epochs, seeds, reshuffle):
    rows = np.stack(
        [
            np.array(random.Random(seed).sample(range(99), count), np.int32)
            for seed in seeds
        ]
    )
    orders = batch_orders(
        rows, batch_size=batch_size, epochs=epochs, seeds=seeds if reshuffle else None
    )
    size = min(batch_size, count)
    steps = -(-count // size)
    assert orders.shape == (len(seeds), epochs * steps, size)
    assert orders.dtype == np.int32
    for its_rows, order in zip(
        rows, orders.reshape(len(seeds), epochs, -1), strict=True
    ):
        for epoch in order:
            assert_array_equal(epoch[count:], -1)
            assert_array_equal(np.sort(epoch[:count]), np.sort(its_rows))
            if not reshuffle:
                assert_array_equal(epoch[:count], its_rows)


def test_epochs_and_seeds_are_shuffled_apart_and_a_seed_does_not_see_the_others():
    rows = np.tile(np.arange(30, dtype=np.int32), (2, 1))
    orders = batch_orders(rows, batch_size=30, epochs=3, seeds=[4, 5])
    assert len({tuple(epoch) for epoch in orders.reshape(6, 30).tolist()}) == 6
    assert_array_equal(
        batch_orders(rows[:1], batch_size=30, epochs=3, seeds=[5])[0], orders[1]
    )


# Tokenising


@pytest.fixture(scope="module")
def tokenizer():
    """The embedded base's: padding 0, end token 1 after every text, unknown words 2."""
    return load_tokenizer(one_block.SMALL / "base")


def test_tokenizer_loads_and_encodes(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    encoded = encode(tokenizer, [Example("a b c", "d"), Example("b Ж", "a c")])
    assert len(encoded) == 2
    a, b, c, d = tokenizer.convert_tokens_to_ids(["a", "b", "c", "d"])
    assert [ids.tolist() for ids in encoded.inputs] == [[a, b, c, 1], [b, 2, 1]]
    assert [ids.tolist() for ids in encoded.labels] == [[d, 1], [a, c, 1]]
    assert {ids.dtype for ids in encoded.inputs + encoded.labels} == {
        np.dtype(np.int32)
    }


def test_long_texts_are_cut_and_keep_their_end(tokenizer):
    encoded = encode(tokenizer, [Example("a " * 3000, "b " * 2500)])
    for (ids,), letter in ((encoded.inputs, "a"), (encoded.labels, "b")):
        assert ids.tolist() == [tokenizer.convert_tokens_to_ids(letter)] * 2047 + [1]
    short = (
        encode(tokenizer, [Example("a b c", "b c d")], max_length=3).labels[0].tolist()
    )
    assert short == [*tokenizer.convert_tokens_to_ids(["b", "c"]), 1]


def test_no_tokenizer(tmp_path):
    with refused(f"{tmp_path} gives no tokenizer: expected a folder or hub id"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with refused(f"{tmp_path} gives no tokenizer: .*double quotes"):
        load_tokenizer(tmp_path)
