"""What PyTorch and PEFT computed once with two small Llamas; padding, generation and what a decoder refuses.

Tolerances are those that come with the goldens: logits 1e-4, losses 1e-5, gradients 1e-5 + 1e-4 relative,
trajectories of 20 steps 1e-4.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorafusion_jax.adapters.coefficients import expand
from lorafusion_jax.adapters.composition import compose
from lorafusion_jax.adapters.norms import gram
from lorafusion_jax.io.hf import load_base
from lorafusion_jax.io.pool import read_pool
from lorafusion_jax.methods.fusion import PRESETS, Fusion
from lorafusion_jax.models.architecture import kernels
from lorafusion_jax.models.decoder import FAMILY, Decoder
from lorafusion_jax.models.generate import generate
from lorafusion_jax.tasks import Batch
from lorafusion_jax.training.frozen import Frozen
from lorafusion_jax.training.loss import cross_entropy
from lorafusion_jax.training.problem import Problem
from lorafusion_jax.training.recipe import Rates
from lorafusion_jax.training.step import fusion_step, init_state

_TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": [1, 2],
}


def _close(got, wanted, tolerance, relative=0.0):
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=relative, atol=tolerance)


@functools.partial(jax.jit, static_argnames=("graph", "tokens"))
def _say(graph, base, adapters, ids, mask, tokens):
    return generate(nnx.merge(graph, base), ids, mask, adapters, max_new_tokens=tokens)


@functools.partial(jax.jit, static_argnames="graph")
def _logits(graph, base, ids, mask, adapters):
    return nnx.merge(graph, base)(ids, mask, adapters)


# The tiny Llama of the fusion goldens: two adapters, factors mixed.


@pytest.fixture(scope="module")
def llama(goldens):
    """The model, its inputs, a fusion of its two adapters, and what PEFT made of it."""
    folder = goldens / "fusion" / "llama"
    model = load_base(folder / "base")
    golden = dict(np.load(folder / "pool_factors_lora.npz"))
    pool = read_pool([str(folder / "adapters" / name) for name in ("lora_0", "lora_1")], model.config)
    graph, base = nnx.split(model)
    problem = Problem(
        graph=graph,
        method=Fusion(composition="mix", start="uniform", magnitudes=False),
        frozen=Frozen(base, pool, gram(pool, {site: kernels(model)[site] for site in pool.A})),
        index=jnp.arange(2),
    )
    return model, dict(np.load(folder / "inputs.npz")), problem, golden


def _batch(arrays, k):
    """Rows whose labels begin behind the prompt, as a prompt and a completion; both batches get four rows."""
    ids, mask, labels = (arrays[f"{name}_{k}"] for name in ("input_ids", "attention_mask", "labels"))
    prompt = int(np.argmax(labels[0] >= 0))
    assert (labels[:, :prompt] < 0).all() and (labels[:, prompt] >= 0).all()
    filling = ((0, 4 - len(ids)), (0, 0))
    return Batch(
        input_ids=jnp.asarray(np.pad(ids[:, :prompt], filling), jnp.int32),
        input_mask=jnp.asarray(np.pad(mask[:, :prompt] > 0, filling)),
        labels=jnp.asarray(np.pad(labels[:, prompt:], filling, constant_values=-100), jnp.int32),
        row_mask=jnp.arange(4) < len(ids),
    )


def _first(arrays):
    return jnp.asarray(arrays["input_ids_0"]), jnp.asarray(arrays["attention_mask_0"] > 0)


def _check_logits(logits, arrays, wanted):
    """Compare the positions that the golden has, where they are no padding."""
    real = arrays["attention_mask_0"][:, arrays["positions"]] > 0
    _close(logits[:, arrays["positions"]][real], wanted[real], 1e-4)


def _adapters(problem, coefficients):
    return problem.method.adapters({"coefficients": jnp.asarray(coefficients)}, problem.frozen, problem.index)[0]


@pytest.mark.smoke
def test_base_logits_loss_and_tokens(llama):
    model, arrays, problem, _ = llama
    _check_logits(model(*_first(arrays)), arrays, arrays["base_logits_0"])
    batch = _batch(arrays, 0)
    of_labels = model.label_logits(batch.input_ids, batch.input_mask, batch.labels, {})
    prompt = batch.input_ids.shape[1]
    # The first label is predicted at the prompt's end.
    of_positions = arrays["positions"] - (prompt - 1)
    among = (of_positions >= 0) & (of_positions < batch.labels.shape[1])
    assert among.sum() >= 2
    predicted = np.asarray(batch.labels)[:, of_positions[among]] >= 0
    _close(of_labels[:, of_positions[among]][predicted], arrays["base_logits_0"][:, among][predicted], 1e-4)
    _close(cross_entropy(of_labels, batch.labels), arrays["base_loss_mean_ce_0"], 1e-5)
    said = _say(problem.graph, problem.frozen.base, {}, batch.input_ids, batch.input_mask, 16)
    np.testing.assert_array_equal(said, arrays["base_greedy_0"][:, prompt:])


@pytest.mark.parametrize("when", ["init", "final"])
def test_fused_logits_and_tokens(llama, when):
    model, arrays, problem, golden = llama
    adapters = _adapters(problem, golden["traj_coeff"][0 if when == "init" else -1])
    logits = model(*_first(arrays), adapters)
    _check_logits(logits, arrays, golden["logits" if when == "init" else "logits_final"])
    batch = _batch(arrays, 0)
    said = _say(problem.graph, problem.frozen.base, adapters, batch.input_ids, batch.input_mask, 16)
    np.testing.assert_array_equal(said, golden[f"greedy_{when}"][:, batch.input_ids.shape[1] :])


def test_twenty_steps_of_the_reference_protocol(llama):
    _, arrays, problem, golden = llama
    recipe, batches = PRESETS["reference"], (_batch(arrays, 0), _batch(arrays, 1))
    step = jax.jit(functools.partial(fusion_step, optimisation=recipe.optimisation(20)))

    def rates(l1, l2):
        return Rates({"coefficients": jnp.float32(recipe.lr_coefficients)}, l1=jnp.float32(l1), l2=jnp.float32(l2))

    def start():
        return init_state(problem, jax.random.key(0), {"coefficients": jnp.asarray(golden["traj_coeff"][0])})

    # The golden's gradient leaves L1 and L2 out. After one step Adam's first moment is a tenth of the gradient.
    state, metrics = step(start(), batches[0], problem, rates(0.0, 0.0))
    _close(metrics["loss"], golden["loss"], 1e-5)
    _close(10 * state.adam.mu["coefficients"], golden["grad_coeff"], 1e-5, 1e-4)
    state = start()
    for number in range(20):
        state, metrics = step(state, batches[number % 2], problem, rates(recipe.l1, recipe.l2))
        _close(metrics["loss"], golden["traj_loss"][number], 1e-4)
        _close(metrics["l1"], golden["traj_l1"][number], 1e-4)
        _close(state.params["coefficients"], golden["traj_coeff"][number + 1], 1e-4)


# A real small Llama: 260,032 parameters, grouped queries, adapters of PEFT on two or all maps.


@pytest.fixture(scope="module")
def stories(goldens):
    folder = goldens / "stories260k"
    model = load_base(folder / "base")
    model.config = dataclasses.replace(model.config, eos_id=(1, 2))
    prompts, answers = (json.loads((folder / f"{name}.json").read_text()) for name in ("prompts", "greedy"))
    return model, folder, prompts["prompts"], answers, dict(np.load(folder / "logits.npz"))


_FUSIONS = {
    "base": {},
    "A": {"A_robot_r8_qv": 1.0},
    "B": {"B_quiz_r4_all": 1.0},
    "cat_0.7_-0.3": {"A_robot_r8_qv": 0.7, "B_quiz_r4_all": -0.3},
    "cat_1_1": {"A_robot_r8_qv": 1.0, "B_quiz_r4_all": 1.0},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("base", "cat_1_1") else pytest.mark.long) for name in _FUSIONS],
)
def test_stories_logits_and_tokens(stories, name):
    """Sums of adapters are PEFT's `cat`; all prompts are one batch, padded."""
    model, folder, prompts, answers, logits = stories
    adapters = {}
    if weights := _FUSIONS[name]:
        pool = read_pool([str(folder / "adapters" / adapter) for adapter in weights], model.config)
        c = jnp.array(list(weights.values()), jnp.float32)
        adapters, _ = compose(pool, jnp.arange(len(pool)), expand(c, pool, "global"), "sum")
    width = max(map(len, prompts))
    ids = jnp.array([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    mask = jnp.arange(width)[None] < jnp.array([len(prompt) for prompt in prompts])[:, None]
    graph, base = nnx.split(model)
    for number, (prompt, got) in enumerate(zip(prompts, _logits(graph, base, ids, mask, adapters), strict=True)):
        _close(got[jnp.array([len(prompt) // 2, len(prompt) - 1])], logits[f"{name}.{number}"], 1e-4)
    for wanted, answer in zip(answers[name], _say(graph, base, adapters, ids, mask, 60), strict=True):
        np.testing.assert_array_equal(answer[: len(wanted)], wanted)


# What a config asks for.


def test_results_do_not_depend_on_padding():
    """Nor on the other rows: with a window, dynamic frequencies and a cap, padded on either side, much or little."""
    config = FAMILY.read_config(
        _TINY
        | {"model_type": "gemma2", "sliding_window": 3, "head_dim": 8, "max_position_embeddings": 6}
        | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}}
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    assert any(config.sliding) and not all(config.sliding)
    rows = [[5, 6, 7, 8, 9, 10, 11, 12], [3, 4, 5]]
    graph, base = nnx.split(model)
    alone = [_logits(graph, base, jnp.array([row]), jnp.ones((1, len(row)), bool), {})[0] for row in rows]
    for left, right in ((0, 0), (2, 3)):
        width = left + 8 + right
        for at_the_left in (True, False):
            ids = np.full((2, width), 2)
            mask = np.zeros((2, width), bool)
            for number, row in enumerate(rows):
                first = width - right - len(row) if at_the_left else left
                ids[number, first : first + len(row)], mask[number, first : first + len(row)] = row, True
            got = _logits(graph, base, jnp.asarray(ids), jnp.asarray(mask), {})
            for number, wanted in enumerate(alone):
                _close(got[number][mask[number]], wanted, 1e-5)


def test_the_first_answer_has_the_frequencies_of_the_whole_prompt():
    """Dynamic frequencies depend on the length: the whole prompt's in the cache, and one more for the next token."""
    config = FAMILY.read_config(
        _TINY
        | {"model_type": "llama", "pad_token_id": 0, "max_position_embeddings": 4}
        | {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 100.0}}
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    ids, mask = jnp.array([[5, 6, 7, 8, 9, 10, 11]]), jnp.ones((1, 7), bool)
    first, _ = model.prompt(ids, mask, 1, {})
    _close(first, model(ids, mask)[:, -1], 1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi3"])
def test_generation_follows_the_logits_of_labels(model_type):
    """The cache's pass over one token after the other says what all tokens at once do."""
    window = {"sliding_window": 4} if model_type != "llama" else {}
    config = FAMILY.read_config(_TINY | {"model_type": model_type, "pad_token_id": 0, "head_dim": 4} | window)
    model = Decoder(config, rngs=nnx.Rngs(1))
    ids, mask = jnp.array([[5, 6, 7, 8, 9], [8, 9, 0, 0, 0]]), jnp.array([[True] * 5, [True, True] + [False] * 3])
    said = generate(model, ids, mask, max_new_tokens=12)
    again = jnp.argmax(model.label_logits(ids, mask, said, {}), axis=-1)
    for row, wanted in zip(np.asarray(said), np.asarray(again), strict=True):
        ends = np.isin(row, config.end_ids)
        length = int(np.argmax(ends)) + 1 if ends.any() else len(row)
        np.testing.assert_array_equal(row[:length], wanted[:length])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "the rope scaling is 'yarn', which is not impl"),
        ({"rope_parameters": {"rope_type": "\x1b[31m", "factor": 2.0}}, r"the rope scaling is '\\x1b\[31m'"),
        ({"hidden_act": "relu"}, "the activation is 'relu': wanted silu or gelu_pytorch_tanh"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4: wanted a multiple of num_key_value_heads, 3"),
        ({"eos_token_id": None}, "eos_token_id is missing: wanted the token, or tokens, that end an answer"),
        ({"quantization_config": {"quant_method": "awq"}}, "the weights are quantised by awq: give the unquantised"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide': expected an integer from 1 to 10,000,000"),
    ],
)
def test_what_the_decoder_lacks_is_refused_by_name(changes, message, capfd):
    with pytest.raises(ValueError, match=message):
        FAMILY.read_config(_TINY | {"model_type": "llama"} | changes)
    assert capfd.readouterr().err == ""  # libraries would print the file's text as it is


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_bidirectional_attention_is_refused(model_type):
    with pytest.raises(ValueError, match="use_bidirectional_attention is set: wanted a causal language model"):
        FAMILY.read_config(_TINY | {"model_type": model_type, "use_bidirectional_attention": True})
