"""The embedded small pool: its tasks by their definitions, its files by what they hold and how they answer."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import one_block
import pytest
from flax import nnx

import lorafusion_jax as lf
from examples.string_tasks import Task, draw, split
from lorafusion_jax.estimates.params import size
from lorafusion_jax.io.tensor_files import load_tensors
from lorafusion_jax.tasks import exact_match

_SMALL = one_block.SMALL
_TASKS = [*split().tuning, *split().unseen, split().out_of_reach]
_BIN = split().pool[0]
_SAFETENSORS = split().pool[-1]


def _rows(task, part):
    lines = (_SMALL / "tasks" / task.name / f"{part}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer():
    return lf.load_tokenizer(_SMALL / "base")


@pytest.fixture(scope="module")
def answer(tokenizer):
    """A function that answers contexts greedily, with an adapter of the pool or without."""
    model = lf.load_base(_SMALL / "base")
    graph, state = nnx.split(model)

    @jax.jit
    def generate(state, *arguments):
        return lf.generate(nnx.merge(graph, state), *arguments, max_new_tokens=15)

    def answer(contexts, adapter=None):
        adapters = {}
        if adapter is not None:
            source = str(_SMALL / "adapters" / adapter.name)
            pool = lf.read_pool([source], model.config)
            adapters = {
                site: lf.LowRank(pool.A[site][:, 0], pool.B[site][:, 0])
                for site in pool.A
            }
        batch = tokenizer(
            contexts, padding="max_length", max_length=12, return_tensors="np"
        )
        mask = jnp.asarray(batch["attention_mask"], bool)
        ids = jnp.asarray(batch["input_ids"], jnp.int32)
        tokens = generate(state, ids, mask, adapters)
        return tokenizer.batch_decode(np.asarray(tokens), skip_special_tokens=True)

    return answer


_OPERATIONS = (
    "copy=abcde rotl=bcdea dropfirst=bcde droplast=abcd first3=abc reverse=edcba rotr=eabcd swapends=ebcda "
    "double=aabbccddee odd=ace pairswap=badce last3=cde sort=abcde",
    "same=ajuz next=bkva prev=zity next2=clwb digit=1016 dash=a-j-u-z numvow=1j5z starvow=*j*z starcon=a*u* "
    "mirror=zqfa",
)


def test_operations_of_the_tasks():
    positions = dict(case.split("=") for case in _OPERATIONS[0].split())
    characters = dict(case.split("=") for case in _OPERATIONS[1].split())
    cases = [
        (position, "same", "abcde", answer) for position, answer in positions.items()
    ]
    cases += [
        ("copy", character, "ajuz", answer) for character, answer in characters.items()
    ]
    # The position's operation comes first.
    cases += [("double", "dash", "ab", "a-a-b-b"), ("sort", "next", "zab", "bca")]
    for position, character, word, answer in cases:
        task = Task(position, character)
        assert task.completion(word) == " ".join(answer), task.name
        assert task.context(word) == f"{position} then {character} : {' '.join(word)}"


def test_every_row_solves_its_task_and_none_is_in_both_parts(tokenizer):
    texts = []
    for task in _TASKS:
        train = _rows(task, "train")
        test = _rows(task, "test")
        assert (len(train), len(test)) == (100, 200)
        for row in [*train, *test]:
            ops, letters = row["context"].split(" : ")
            assert ops == f"{task.position} then {task.character}"
            assert row == {
                "context": row["context"],
                "completion": task.completion(letters.replace(" ", "")),
            }
        assert len({row["context"] for row in [*train, *test]}) == 300
        texts += [text for row in test for text in row.values()]
    # Texts survive the tokenizer.
    ids = tokenizer(texts)["input_ids"]
    assert all(
        row[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in row
        for row in ids
    )
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    assert tokenizer.tokenize("first3 then next : first") == [
        "first3",
        "then",
        "next",
        ":",
        *"first",
    ]


def test_the_base_and_the_adapters_are_what_the_readme_says():
    config = lf.read_config(_SMALL / "base")
    readme = (_SMALL / "README.md").read_text()
    assert f"{size(config):,} parameters in float16" in readme
    tensors = load_tensors(_SMALL / "base" / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {np.dtype("float16")}
    adapters = [str(_SMALL / "adapters" / task.name) for task in split().pool]
    pool = lf.read_pool(adapters, config)
    assert len(pool) == 28 and f"{len(pool)} LoRA adapters" in readme
    assert all((rank == 16).all() for rank in pool.rank.values())
    assert all(bool(jnp.any(B != 0, axis=(2, 3)).all()) for B in pool.B.values())


def test_the_base_and_two_adapters_score_as_in_the_readme(answer):
    table = re.findall(
        r"^\| (\w+) \|.* ([\d.]+)% \|$",
        (_SMALL / "README.md").read_text(),
        re.MULTILINE,
    )
    readme = {name: float(value) for name, value in table}

    def score(rows, adapter=None):
        texts = answer([row["context"] for row in rows], adapter)
        return 100 * exact_match([texts], [row["completion"] for row in rows]).mean()

    # Two rows of 200: another machine may round a tie differently.
    for task in _TASKS[2:]:
        assert score(_rows(task, "test")) == pytest.approx(
            readme[task.name], abs=1.01
        ), task.name
    for task in (_BIN, _SAFETENSORS):
        rows = draw(task, 200, (0, 1))
        adapted = score(rows, task)
        assert adapted == pytest.approx(
            readme[task.name], abs=1.01
        ) and adapted > score(rows), task.name
