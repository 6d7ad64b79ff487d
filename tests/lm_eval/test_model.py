"""Benchmarks of lm-evaluation-harness on bases, modules, fused runs and chips, without PyTorch."""

import re
from pathlib import Path

import lm_eval_tasks
import numpy as np
import pytest
import recipes
import small_llama
from json_files import read_json
from numpy.testing import assert_allclose
from refusals import refused

from lorafusion_jax import cli, fuse
from lorafusion_jax.runs import run_path

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance

from lorafusion_jax.lm_eval.model import LorafusionLM


def _requests(*arguments):
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=each, idx=0)
        for each in arguments
    ]


@pytest.fixture(scope="module")
def llama(base):
    return LorafusionLM(base=str(base), batch_size=4, max_length=24)


def test_answers_are_drawn_or_greedy_and_end_before_their_stop_text(llama):
    def answer(prompt="the cold", until="\n\n", **how):
        asked = {"until": [until], "max_gen_toks": 9} | how
        (text,) = llama.generate_until(_requests((prompt, asked)))
        return text

    greedy = answer()
    assert answer("tall " * 30) == answer("tall " * 40)  # more than its context
    assert answer(until=greedy[2:4]) == greedy.partition(greedy[2:4])[0]
    assert answer(do_sample=True, temperature=3.0) != greedy
    drawn = answer(do_sample=True, top_p=0.99)
    assert drawn == answer(do_sample=True, top_p=0.99, temperature=1.0) != greedy


def test_chat_templates_are_rendered_by_the_base(llama):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "o"},
    ]
    assert (
        llama.apply_chat_template(messages[:1])
        == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    begun = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\no"
    assert llama.apply_chat_template(messages, add_generation_prompt=False) == begun


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of four local tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    words = {"hot": "cold", "tall": "short", "bold": "old"}
    answers = {f"Q: {word}\nA:": answer for word, answer in words.items()}
    texts = ["the cold bold gold is old", "hot"]
    lm_eval_tasks.write_tasks(folder, answers, texts, until=["\n"], max_gen_toks=8)
    return folder


_TASKS = ("local_choices", "local_text", "local_cloze", "local_answers")


@pytest.mark.long  # the command reads the files of all 14,000 tasks of the harness
def test_the_command_runs_the_harness_with_its_own_options(
    base, tasks, tmp_path, capsys
):
    tasks_of_harness = f"--tasks {','.join(_TASKS)} --include_path {tasks}"
    model = f"lm-eval --base {base} --max-length 64 {tasks_of_harness}"
    cli.main(f"{model} --limit 2 --output_path {tmp_path} --log_samples".split())
    printed = capsys.readouterr().out
    assert all(re.search(rf"\|{task} *\|", printed) for task in _TASKS)
    (results,) = tmp_path.rglob("results_*.json")
    found = read_json(results)
    assert found["n-samples"]["local_choices"]["effective"] == 2
    assert 0 <= found["results"]["local_choices"]["acc,none"] <= 1
    assert found["results"]["local_cloze"]["perplexity,none"] > 1


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    options = recipes.small_run(small, tmp_path_factory.mktemp("runs"))
    fuse(options)
    return run_path(options)


_SMALL_PAIRS = (
    ("double then digit : a b c", "a"),
    ("digit : c d", "b b d d"),
    ("digit : c d", "d"),
)


def _scores(**options):
    found = LorafusionLM(**options).loglikelihood(_requests(*_SMALL_PAIRS))
    return [score for score, _ in found]


def test_a_run_is_measured_with_its_numbers_as_its_merged_export_is(
    run, small, tmp_path
):
    recipes.export(run=run, seed=2, out=tmp_path / "merged", format="merged")
    merged = _scores(base=str(tmp_path / "merged"))
    assert_allclose(_scores(run=str(run), run_seed=2), merged, atol=1e-4)
    assert np.max(np.abs(np.subtract(_scores(base=str(small[0])), merged))) > 0.01


def test_one_module_of_a_pool_is_measured_as_it_is_and_several_as_their_mean(
    small, tmp_path
):
    base, pool = map(str, small)
    everything = sorted(path.name for path in Path(pool).iterdir())
    names = everything[:2]
    found = [
        _scores(base=base, pool=pool, adapters=chosen)
        for chosen in (names[0], names[1:], ())
    ]
    for scores, chosen in zip(found, (names[:1], names[1:], everything), strict=True):
        out = tmp_path / f"{len(chosen)}-{chosen[0]}"
        weights = " ".join(f"{name}={1 / len(chosen)}" for name in chosen)
        merge = f"merge --base {base} --pool {pool} --weights {weights}"
        cli.main(f"{merge} --format merged --out {out}".split())
        assert_allclose(scores, _scores(base=str(out)), atol=1e-4)
    assert np.min(np.abs(np.subtract(found[0], found[1]))) > 1e-3


# One attention's queries and their modules: few programs to compile.
_DIGITAL = (
    "decoder.*",
    "encoder.ff.*",
    "encoder.self.[kvo]",
    "pool.[AB].decoder.*",
    "pool.[AB].encoder.self.v",
)


def test_ideal_arrays_change_nothing(small):
    base = str(small[0])
    assert_allclose(
        _scores(
            base=base,
            crossbar="ideal",
            keep_digital=_DIGITAL[:3],
            calibration_task=str(recipes.TASK),
        ),
        _scores(base=base),
        atol=1e-3,
    )


@pytest.mark.long
def test_coarse_converters_change_the_scores_of_a_run(run, tmp_path):
    (tmp_path / "coarse.yaml").write_text("adc: {bits: 3}\n")
    coarse = _scores(
        run=str(run), crossbar=str(tmp_path / "coarse.yaml"), keep_digital=_DIGITAL
    )
    assert np.all(np.isfinite(coarse))
    assert np.max(np.abs(np.subtract(coarse, _scores(run=str(run))))) > 0.01


def test_results_are_returned_in_python(llama, tasks):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(
        model=llama, tasks=["local_choices"], task_manager=manager, bootstrap_iters=0
    )
    assert found is not None and found["n-samples"]["local_choices"]["original"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            "expected one model: give a fused run with --run, or a base model with --base",
        ),
        ({"base": "BASE", "run": "here"}, "expected one model"),
        (
            {"base": "BASE", "adapters": ["one"]},
            "--adapters names modules of a pool: give it with --base and --pool",
        ),
        (
            {"base": "BASE", "crossbar": "ideal"},
            "a chip needs text that sets the ranges of its ADCs",
        ),
        (
            {"base": "BASE", "max_length": 200},
            "max_length is 200: expected at most the model's context of 160",
        ),
        (
            {"base": "BASE", "pretrained": "x"},
            "no model argument pretrained: expected some of",
        ),
        ({"run": "RUN", "pool": "pool"}, "--pool: only for a base without a run"),
        (
            {"base": "BASE", "run_seed": 2},
            "a base model has no seeds: leave out --run-seed",
        ),
        ({"run": "RUN", "run_seed": 9}, "has no seed 9: it has 1, 2"),
    ],
)
def test_options_that_name_no_model_are_refused(options, message, base, run):
    places = {"BASE": str(base), "RUN": str(run)}
    options = {name: places.get(str(value), value) for name, value in options.items()}
    with refused(re.escape(message)):
        LorafusionLM(**options)


def test_requests_that_cannot_be_answered_are_refused(llama, tmp_path):
    for arguments, message in (
        ({"max_gen_toks": 24}, "max_gen_toks is 24: expected less than the model's co"),
        ({"num_beams": 4}, "the task generates with num_beams, which is not supp"),
    ):
        with refused(message):
            llama.generate_until(
                _requests(("hot", {"until": [], "max_gen_toks": 8} | arguments))
            )
    with refused("a continuation has .* tokens: expected 1 to 24, the model's context"):
        llama.loglikelihood(_requests(("hot", " cold" * 40)))
    plain = LorafusionLM(
        base=str(small_llama.make(tmp_path / "base", chat_template=None))
    )
    with refused("has no chat template: leave out --apply_chat_template"):
        plain.apply_chat_template([{"role": "user", "content": "hi"}])
