"""The plan of a matrix of runs, compared with XLA's analysis of the programs that run; nothing is computed."""

import dataclasses
import os
import re
from dataclasses import replace

import jax
import one_block
import pytest
import tiny
from numpy.testing import assert_allclose
from refusals import refused

import lorafusion_jax as lf
from lorafusion_jax import estimates
from lorafusion_jax.estimates import plan
from lorafusion_jax.estimates.estimate import Traced, estimate, interpolated
from lorafusion_jax.estimates.machines import Pace, pace, spent
from lorafusion_jax.estimates.params import size
from lorafusion_jax.estimates.plan import plan_table
from lorafusion_jax.methods import METHODS, recipe_of
from lorafusion_jax.models.decoder.config import Rope
from lorafusion_jax.models.qwen3_5.config import Delta, Qwen35Config
from lorafusion_jax.models.t5.config import SHAPES
from lorafusion_jax.tasks import Example, Task

# XLA counts the body of a loop once: layers are unrolled, and no more than `compose` computes in one go.
_SMALL = lf.models.T5Config(
    vocab_size=512,
    d_model=128,
    d_kv=32,
    d_ff=320,
    num_heads=4,
    num_layers=2,
    num_decoder_layers=1,
    unroll=True,
)
_SCANNED = replace(_SMALL, num_layers=9, num_decoder_layers=7, unroll=False)
_HEADS = {
    "d_head": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "query_scale": 32**-0.5,
    "rope": Rope(width=32),
}
_SIZES = {
    "vocab_size": 512,
    "d_model": 128,
    "d_ff": 320,
    "num_layers": 2,
    "context": 128,
}
_DECODER = lf.models.DecoderConfig(
    model_type="llama", **_SIZES, **_HEADS, eps=1e-6, unroll=True
)
_SCANNED_DECODER = replace(_DECODER, num_layers=9, unroll=False)
_DELTA = Delta(key_heads=4, value_heads=4, d_key=32, d_value=32, kernel=4)
_HYBRID = Qwen35Config(
    model_type="qwen3_5_text",
    **_SIZES,
    **_HEADS,
    eps=1e-6,
    unroll=True,
    attention_gate=True,
    group=2,
    delta=_DELTA,
)
_SCANNED_HYBRID = replace(_HYBRID, num_layers=8, group=4, unroll=False)


_LONG = pytest.mark.long
_SHAPE = estimates.Shape(4, 32, 8)
_PACKED = estimates.Shape(1, 96, 24, ((2, 32, 8), (2, 16, 8)))
_TASK = str(one_block.SMALL / "tasks" / "double_digit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Numbers(lf.FusionRecipe):
    """Numbers for plans of all methods, each of which has a part of them."""

    lora_rank: int = 16
    vera_rank: int = 128
    lora_targets: tuple[str, ...] | None = None
    lr_lora: float = 2e-3
    lr_full: float = 2e-4


_RECIPE = _Numbers(modules=5, lora_rank=8, vera_rank=24)
_SETTINGS = estimates.Settings(recipe=_RECIPE, rank=8, pool=7)
_QUICK = {
    "xla_backend_optimization_level": "0"
}  # of LLVM: what XLA computes and holds stays the same


@pytest.mark.parametrize(
    ("method", "config", "changes"),
    [
        ("fusion", _SMALL, {}),
        pytest.param("fusion", _SCANNED_DECODER, {"load_in": "nf4"}, marks=_LONG),
        pytest.param("lora", _SCANNED, {}, marks=_LONG),
        pytest.param("lora", _SCANNED_DECODER, {"dtype": "bfloat16"}, marks=_LONG),
        pytest.param("full", _SCANNED, {}, marks=_LONG),
        pytest.param("fusion", _SCANNED_HYBRID, {}, marks=_LONG),
    ],
)
def test_a_step_takes_what_xla_counts(method, config, changes):
    """XLA counts elementwise operations too, and a loop's body once: FLOPs are compared where layers are unrolled.

    Memory is compared for loops, which plans count with.
    """
    dtype = changes.get("dtype", config.dtype)
    config = replace(config, dtype=dtype)
    load_in = changes.get("load_in", "full")
    settings = replace(_SETTINGS, seeds=1, load_in=load_in)
    entry = METHODS[method]
    recipe = recipe_of(entry.recipe, vars(_RECIPE))
    run = Traced(config, entry, recipe, settings)
    shape = estimates.Shape(8, 64, 8)
    batch = jax.eval_shape(lambda: tiny.batch(config, rows=8, source=64, target=8))
    apart = run.problem(apart=method != "full")
    state, tree = jax.tree.flatten(run.state)

    def step(state, batch, leaves):
        problem = apart.problem(leaves)
        rates = jax.tree.map(
            lambda rate: rate[0], lf.training.recipe_rates(problem.method, recipe, 1)
        )
        found = lf.fusion_step(
            tree.unflatten(state),
            batch,
            problem,
            rates,
            optimisation=lf.Optimisation(steps=9),
        )
        return jax.tree.leaves(found)

    compiled = (
        jax.jit(step, donate_argnums=0)
        .lower(state, batch, apart.leaves)
        .compile(compiler_options=_QUICK)
    )
    memory = compiled.memory_analysis()
    allocated = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    allocated += memory.output_size_in_bytes - memory.alias_size_in_bytes
    planned = estimates.program_of(config, method, settings, "step", shape)
    needed = estimates.held_bytes(config, method, settings) + planned.bytes
    if method == "full":  # nothing reads the base that the trained weights replace
        needed -= run.frozen_bytes[0]
    if config.unroll:
        counted = compiled.cost_analysis()["flops"]
        assert_allclose(planned.flops, counted, rtol=0.1)
    else:
        assert_allclose(needed, allocated, rtol=0.25)


def test_flops_by_hand():
    # One layer each of 2 x 2 matrices, one row of 3 source and 1 target tokens.
    config = lf.models.T5Config(
        vocab_size=5,
        d_model=2,
        d_kv=2,
        d_ff=2,
        num_heads=1,
        num_layers=1,
        num_decoder_layers=1,
    )
    settings = estimates.Settings(seeds=1, recipe=replace(_RECIPE, lora_rank=7))
    shape = estimates.Shape(1, 3, 1)
    # Encoder: q k v o and three of the feed-forward for 3 tokens; decoder: 9 for 1, cross k and v for 3; the head.
    base = 8 * (7 * 3 + 9 * 1 + 2 * 3) + 2 * 2 * 5
    attention = 2 * 2 * 2 * (3 * 3 + 1 * 1 + 1 * 3)

    def flops(method):
        return estimates.program_of(config, method, settings, "loss", shape).flops

    assert flops("zero-shot") == base + attention
    # q and v: of 3 tokens in the encoder, of 1, 1 and 1 in the decoder, cross v of 3.
    read = 3 + 3 + 1 + 1 + 1 + 3
    assert flops("lora") == base + attention + 2 * read * 7 * (2 + 2)


def test_a_packed_step_has_the_scores_of_each_row_alone():
    settings = replace(_SETTINGS, seeds=1)
    packed = estimates.program_of(_SMALL, "fusion", settings, "step", _PACKED)
    in_one = _PACKED._replace(groups=((1, *_PACKED[1:3]),))
    line = estimates.program_of(_SMALL, "fusion", settings, "step", in_one)
    assert line.flops > 1.05 * packed.flops


def test_every_token_of_an_answer_is_counted():
    settings = replace(_SETTINGS, seeds=1)

    def flops(new_tokens):
        shape = estimates.Shape(4, 32, new_tokens)
        return estimates.program_of(_SMALL, "fusion", settings, "answers", shape).flops

    # Of a token: all matrices of the decoder other than the source's keys and values, the head, and adapters.
    decoder = 6 * 128 * 128 + 3 * 128 * 320 + 128 * 512
    adapters = 5 * 8 * 3 * (128 + 128)
    scores = 4 * 128 * (32 + 8)
    needed = 2 * 4 * 4 * (decoder + adapters) + 4 * 4 * scores
    assert flops(8) - flops(4) == pytest.approx(needed, rel=0.1)


def test_programs_between_two_shapes_are_interpolated():
    method = Traced(
        _SMALL, METHODS["fusion"], recipe_of(lf.FusionRecipe, vars(_RECIPE)), _SETTINGS
    )
    shapes = [
        estimates.Shape(8, 32, 4),
        estimates.Shape(8, 72, 8),
        estimates.Shape(8, 160, 16),
    ]
    program = interpolated(method, "step", shapes)
    for shape in shapes:
        exact = method.program("step", shape)
        # Only long batches form the sum as a matrix.
        assert_allclose(program(shape), exact, rtol=0.1)


_SAME = tuple(Example("a b c", "d e") for _ in range(20))


def test_a_workload_has_the_batches_of_training_and_evaluation():
    rows = [Example("x" * (4 * n + 2), "yes" if n % 2 else "no") for n in range(40)]
    recipe = lf.FewShotRecipe(epochs=3, batch_size=8, shots=4)
    found = estimates.workload(
        Task("t", tuple(rows), tuple(rows[:30]), "-"), recipe, eval_batch=16
    )
    # 2 of 40 rows validate; 5 batches hold 38; a row of n tokens and its end is at most 40 wide.
    assert (
        len(found.steps) == 15 and len(found.search) == 5 and found.validation.rows == 2
    )
    assert all(step.rows == 8 and 4 <= step.source <= 48 for step in found.steps)
    assert [shape.rows for shape in found.test.rows] == [15, 15]
    assert (
        found.test.rows[-1].source == 32
    )  # 30 bytes and the end, on the ladder of widths
    # Each test row is asked with both labels.
    assert sum(shape.rows for shape in found.test.options) == 60
    assert found.few_shot is not None and found.few_shot.rows[0].source > 32
    assert found.lengths == "estimated from characters" and found.new_tokens == 4

    def tokenizer(texts, **_):
        return {"input_ids": [[1] * (10 * len(text.split())) for text in texts]}

    found = estimates.workload(
        Task("t", _SAME, _SAME[:2], "-"),
        lf.FewShotRecipe(shots=50),
        tokenizer=tokenizer,
    )
    assert (
        found.steps[0] == estimates.Shape(10, 32, 20)
        and found.lengths == "tokenised"
        and found.few_shot is None
    )
    with refused("too few training rows for 50 examples in a prompt: lower shots"):
        estimate(
            _SMALL,
            "few-shot",
            found,
            estimates.Settings(recipe=lf.FewShotRecipe(shots=50)),
        )


def _work():
    row = Example("x" * 116, "x" * 8)
    return estimates.workload(Task("t", (row,) * 40, (row,) * 50, "-"), _RECIPE)


def test_a_plan_adds_up():
    work = _work()
    methods = ["fusion", "zero-shot", "constant", "lorahub", "single"]
    planned = plan(_SMALL, methods, {"a": work, "b": work}, _SETTINGS)
    rows = {row.method: row for row in planned}
    alone = estimate(_SMALL, "fusion", work, _SETTINGS)
    fusion = rows["fusion"]
    # Two encoder layers with q and v, a decoder layer with two attentions, rank 8, five modules.
    for granularity, columns in {
        "global": 1,
        "block": 3,
        "site": 8,
        "rank": 8 * 8,
    }.items():
        settings = replace(_SETTINGS, recipe=replace(_RECIPE, granularity=granularity))
        assert (
            estimates.trained_numbers(_SMALL, "coefficients", settings) == 5 * columns
        )
    assert (
        fusion.runs == 10
        and rows["zero-shot"].runs == 2
        and rows["constant"].cost.peak_bytes == 0
    )
    assert fusion.cost.training_flops == pytest.approx(10 * alone.training_flops)
    assert fusion.cost.evaluation_flops == pytest.approx(10 * alone.evaluation_flops)
    cost = fusion.cost
    assert cost.weights_bytes == 4 * size(_SMALL)
    assert cost.peak_bytes == (
        cost.weights_bytes + cost.pool_bytes + cost.state_bytes + cost.activation_bytes
    )
    # 40 evaluations of LoraHub, one for each of 5 modules of the best single one.
    searched = rows["lorahub"].cost
    assert searched.training_flops / searched.forward_flops == pytest.approx(
        10 * 40 * len(work.search)
    )
    passes = rows["single"].cost.training_flops / rows["single"].cost.forward_flops
    assert passes == pytest.approx(10 * 5 * len(work.search))


def test_ranking_is_one_pass_over_all_modules_in_memory():
    work = _work()
    recipe = replace(_RECIPE, basis=12)

    def settings(**changes):
        chosen = replace(recipe, **changes)
        return replace(_SETTINGS, pool=60, recipe=chosen)

    drawn = estimate(_SMALL, "fusion", work, settings())
    for choose, basis in (("gradient", None), ("basis-gradient", 12)):
        ranked = estimate(_SMALL, "fusion", work, settings(choose=choose))
        everything = settings(modules=60, basis=basis)
        once = sum(
            estimates.program_of(_SMALL, "fusion", everything, "step", shape).flops
            for shape in work.search
        )
        assert ranked.training_flops == pytest.approx(drawn.training_flops + once)
        assert ranked.trainable == drawn.trainable
        assert ranked.pool_bytes == drawn.pool_bytes
        if choose == "gradient":
            modules = 60 * 8 * 8 * (128 + 128) * 4
            assert ranked.activation_bytes > drawn.activation_bytes + modules


def test_a_plan_describes_its_runs_and_costs():
    large = (
        SHAPES["flan-t5-large"],
        {"snarks": _work()},
        estimates.Settings(recipe=lf.Recipe()),
    )
    out = estimates.describe(
        plan(large[0], ["zero-shot", "fusion"], *large[1:]), *large
    )
    assert (
        "2 methods and 1 tasks, looped; 5 seeds as one program, one after the other."
        in out
    )
    assert "lengths estimated from characters, padded" in out and "2.92 GiB" in out
    assert "| fusion    |    5 |   148,416 |" in out


def test_a_plan_names_what_its_machine_cannot_hold_and_smaller_dtypes(monkeypatch):
    options = lf.FuseOptions(
        base="flan-t5-large", task=_TASK, seeds=(1, 2), method="full"
    )

    def planned(name, **changes):
        asked = estimates.PlanOptions(plan=True, plan_for=name)
        return estimates.describe_run(replace(options, **changes), asked)

    h100 = planned("h100")
    assert "batched" in h100 and "float32 on an accelerator" in h100
    assert "The machine has 74.51 GiB. All rows fit." in h100
    for dtype in ("float32", "bfloat16"):
        few_bits = planned("h100", dtype=dtype, load_in="nf4", method="lora")
        assert ("Add --dtype bfloat16." in few_bits) == (dtype == "float32")
    assert "The machine has 14.90 GiB. More than that need: full." in planned("v5e")
    mac = planned("mac-64gb")
    assert "one after the other" in mac and "float32 on a CPU" in mac
    assert "The machine has 64.00 GiB. All rows fit." in mac
    assert "JAX's Metal backend is not tested." in mac and "Time: not known" in mac
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert "The machine has 4.00 GiB. More than that need: full." in planned(None)


def test_times_and_costs_by_hand():
    options = estimates.PlanOptions(
        plan=True, plan_for="a100", utilisation=0.5, price=2.5, devices=2
    )
    at = pace(options, _SMALL, _SHAPE)
    assert at.flops == 78e12  # half of 156 TFLOP/s
    # 1, 2 and 3 hours: the longest on one device, the others on the second.
    out = spent([78e12 * 3600 * hours for hours in (1, 2, 3)], at, options)
    assert out.startswith(
        "Time at 0.5 of the 156 TFLOP/s of a100 in float32 (--utilisation), without "
    )
    assert "compilation: 6.0 h on one device" in out
    assert out.endswith(" on one device, 3.0 h on 2. At 2.5 an hour: 15.00.")
    by_default = replace(options, utilisation=None)
    half = pace(by_default, replace(_SMALL, dtype="bfloat16"), _SHAPE)
    assert half.flops == pytest.approx(0.3 * 312e12)
    (row,) = plan(_SMALL, ["lora"], {"a": _work(), "b": _work()}, _SETTINGS)
    assert row.jobs == ((row.cost.training_flops + row.cost.evaluation_flops) / 2,) * 2
    table = plan_table([row], Pace(row.jobs[0] / 90, ""))
    assert re.findall(r"[\d.]+ min", table) == ["1.5 min", "3.0 min"] * 2


def test_the_rate_of_a_cpu_is_measured():
    whole = estimates.PlanOptions(plan=True, plan_for="cpu", utilisation=1.0)
    half = pace(replace(whole, utilisation=0.5), _SMALL, _SHAPE)
    whole = pace(whole, _SMALL, _SHAPE)
    assert whole.flops == 2 * half.flops > 0
    # Four rows of 32 tokens, and the largest matrices.
    assert "GFLOP/s, measured: 128 x 128 by 128 x 320" in whole.source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"utilisation": 0.0},
            "utilisation is 0.0: expected a share of the peak, above 0 and at most 1",
        ),
        ({"utilisation": 1.5}, "utilisation is 1.5"),
        (
            {"price": -1.0},
            "price is -1.0: expected the price of a device's hour, 0 or more",
        ),
        ({"price": float("inf")}, "price is inf"),
        ({"devices": 0}, "devices is 0: expected at least 1"),
        (
            {"plan": False, "price": 2.5},
            "--price 2.5 is an option of a plan: add --plan, or leave it out",
        ),
        ({"plan": False, "plan_for": "h100"}, "--for h100 is an option of a plan"),
        (
            {"plan_for": "mac-m3"},
            "no machine 'mac-m3': choose of cpu, a100, .*, or a Mac by its unified memory, such as mac-64gb",
        ),
    ],
)
def test_options_of_a_plan_that_cannot_be_used_are_refused(changes, message):
    with refused(message):
        estimates.PlanOptions(**{"plan": True} | changes).check_plan()


def test_named_modules_are_those_of_every_seed():
    adapters = one_block.SMALL / "adapters"
    options = lf.FuseOptions(
        base="t5-small", pool=str(adapters), task=_TASK, method="coefficients"
    )
    named = replace(
        options, adapters=tuple(sorted(path.name for path in adapters.iterdir()))[:3]
    )

    def pool(options, *seeds):
        described = estimates.describe_run(replace(options, seeds=seeds))
        (line,) = re.findall(r"^\| coefficients.*", described, re.MULTILINE)
        return line.split("|")[8].strip()

    drawn = replace(options, recipe=lf.FusionRecipe(modules=3))
    assert pool(named, 1, 2, 3) == pool(drawn, 1) != pool(drawn, 1, 2, 3)


def test_methods_settings_and_rows_that_cannot_be_planned_are_refused():
    of_basis = {k: {"recipe": lf.FusionRecipe(modules=5, basis=k)} for k in (0, 129)}
    for method, changes, message in (
        ("fusion", {"rank": 0}, "rank is 0"),
        ("lora", {"recipe": lf.Recipe(epochs=0)}, "epochs is 0"),
        ("fusion", {"pool": 2}, "a pool of 2 for seeds that draw 5 modules each"),
        (
            "fusion",
            {"targets": ("q", "x")},
            "targets are q x: choose of q k v o wi_0 wi_1 wo",
        ),
        ("mean", of_basis[129], "129 directions, but .* is 128 x 128"),
        ("fusion", of_basis[0], "basis is 0"),
    ):
        with refused(message):
            estimate(_SMALL, method, _work(), replace(_SETTINGS, **changes))
    for make, message in (
        (
            lambda: estimates.workload(Task("t", _SAME[:1], (), "-"), _RECIPE),
            "t has no test rows: give at least one",
        ),
        (
            lambda: plan(_SMALL, ["lora"], {}, _SETTINGS),
            "a plan of 1 methods for 0 tasks: give at least one of each",
        ),
    ):
        with refused(message):
            make()
