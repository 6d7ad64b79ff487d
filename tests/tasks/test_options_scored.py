"""Scoring options against a loop over rows and options that reads the model's own log-probabilities."""

import functools
import importlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import one_block
import pytest
from flax import nnx
from json_files import write_rows

import lorafusion_jax as lf
from lorafusion_jax.runs import evaluate, load_setup, seed_rows
from lorafusion_jax.runs.evaluate import evaluate_seeds
from lorafusion_jax.tasks import answer_options
from lorafusion_jax.training import LOSS, start
from lorafusion_jax.training.method import GENERATION, OPTIONS

# The package's name of this module is that of its function.
evaluation = importlib.import_module("lorafusion_jax.runs.evaluate")

_WORDS = ["a", "c", "d", "g", "h", "h i", "* j", "a b c"]
_SEEDS = (1, 2)


def _row(number, rng):
    """Options of 2 to 4 answers of different lengths at the end of the prompt, one of which is right."""
    options = [_WORDS[i] for i in rng.permutation(len(_WORDS))[: 2 + number % 3]]
    text = " ".join("abcdefghij"[i] for i in rng.integers(0, 10, 2 + number % 5))
    stated = "\n".join(f"- {option}" for option in options)
    return {
        "input": f"double then digit : {text}\nOptions:\n{stated}",
        "target": str(rng.choice(options)),
    }


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The setup of a fusion of two modules for a task of 11 test rows, and numbers of two seeds that differ."""
    out = tmp_path_factory.mktemp("options")
    base, pool = one_block.cut(out)
    rng = np.random.default_rng(0)
    (out / "task").mkdir()
    for part, count in (("train", 6), ("test", 11)):
        rows = [_row(number, rng) for number in range(count)]
        write_rows(out / "task" / f"{part}.jsonl", rows)
    options = lf.FuseOptions(
        base=str(base),
        pool=str(pool),
        task=str(out / "task"),
        seeds=_SEEDS,
        out=out,
        eval_batch=7,
        recipe=replace(lf.PRESETS["default"], modules=2, max_new_tokens=4),
    )
    setup = load_setup(options)
    params = start(setup.problem, _SEEDS).params
    # Away from the start, and apart from each other.
    params["coefficients"] = (
        params["coefficients"] * jnp.array([0.5, 2.0])[:, None, None]
    )
    apart = {
        site: rng.uniform(0.1, 3.0, m.shape) for site, m in params["magnitudes"].items()
    }
    params["magnitudes"] = {
        s: m * jnp.asarray(apart[s], jnp.float32)
        for s, m in params["magnitudes"].items()
    }
    return setup, options, params


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(graph, weights, ids, mask, start):
    return jax.nn.log_softmax(nnx.merge(graph, weights)(ids, mask, start)[0])


def _likelihood(model, tokenizer, prompt, option):
    """Return the log-probability that the model says an option and then ends, token after token."""
    asked = tokenizer(prompt)["input_ids"]
    wanted = tokenizer(option)["input_ids"]
    assert wanted[-1] == tokenizer.eos_token_id
    # one shape, one program
    ids = np.zeros((1, 64), np.int32)
    start = np.zeros((1, 8), np.int32)
    ids[0, : len(asked)] = asked
    start[0, 1 : len(wanted)] = wanted[:-1]
    start[0, 0] = model.start_id
    log_probs = _log_probs(
        *nnx.split(model), ids, np.arange(64)[None] < len(asked), start
    )
    return sum(float(log_probs[t, token]) for t, token in enumerate(wanted))


@pytest.fixture(scope="module")
def chosen(given):
    """[seeds][rows]: the likeliest option of the model with each seed's fusion merged in."""
    setup, _, params = given
    problem = setup.problem
    found = []
    for seed in range(len(_SEEDS)):
        of_seed = jax.tree.map(lambda p, seed=seed: p[seed], params)
        adapters, _ = jax.jit(problem.method.adapters)(
            of_seed, problem.frozen, problem.index[seed]
        )
        model = lf.merged_base(nnx.merge(problem.graph, problem.frozen.base), adapters)
        rows = []
        for example in setup.task.test:
            lines = example.input.splitlines()
            options = [line[2:] for line in lines if line.startswith("- ")]
            score = functools.partial(
                _likelihood, model, setup.tokenizer, example.input
            )
            rows.append(max(options, key=score))
        found.append(rows)
    return found


def test_options_are_scored_for_the_rows_that_are_evaluated(given, chosen):
    """Batches of another size, fewer rows, and the mode from the options of a run."""
    setup, options, params = given
    fewer = replace(
        setup, test=type(setup.test)(*(part[:5] for part in vars(setup.test).values()))
    )
    seeds, found = evaluate_seeds(fewer, options, params)
    assert seeds == _SEEDS and found.option_correct is not None
    wanted = [
        [s == row.target for s, row in zip(rows, setup.task.test, strict=True)][:5]
        for rows in chosen
    ]
    np.testing.assert_array_equal(found.option_correct, wanted)
    assert [row["option_accuracy"] for row in seed_rows(seeds, found)] == [
        100 * np.mean(row) for row in wanted
    ]


def test_every_batch_is_read_with_noise_of_its_own(given, monkeypatch):
    """Eleven rows, and about three times as many pairs of a row and an option, in batches of four."""
    setup, _, params = given
    read = []
    closed = answer_options(setup.task)
    monkeypatch.setattr(
        lf.Problem, "read", lambda problem, *number: read.append(number) or problem
    )

    def answer(params, of_batch, test, **_):
        for number in range(3):
            of_batch(number)
        return np.zeros((2, len(test), 1), np.int32)

    monkeypatch.setattr(evaluation, "generate_rows", answer)
    monkeypatch.setattr(
        evaluation,
        "seed_scores",
        lambda params, batch, problem: np.zeros((2, 2, batch.row_mask.shape[-1])),
    )
    evaluate(setup, params, batch_size=4, options=closed)
    of_options = [(OPTIONS, number) for number in range(-(-sum(map(len, closed)) // 4))]
    assert (
        read
        == [(purpose, number) for purpose in (GENERATION, LOSS) for number in range(3)]
        + of_options
    )
