"""The bill of a task: counts against what programming makes and sums by hand, the command, its speed and refusals."""

import csv
import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import cost
import jax
import numpy as np
import pytest
import tiny

import lorafusion_jax as lf
from lorafusion_jax import Update, crossbar, kernels
from lorafusion_jax.cli import main
from lorafusion_jax.crossbar import (
    ADC,
    CONSTANTS,
    PRESETS,
    CrossbarConfig,
    Encoding,
    Range,
    Tile,
)
from lorafusion_jax.estimates.bill.show import constants_table
from lorafusion_jax.estimates.flops import forward_flops, step_flops
from lorafusion_jax.methods.fused import SumUpdate
from lorafusion_jax.methods.lora import LowRankUpdate

_ROOT = Path(__file__).resolve().parents[2]
_LARGE = lf.models.known_shapes()["flan-t5-large"]
_ISAAC = PRESETS["isaac"]
_OPTIONS = lf.estimates.CostOptions()
_LITTLE = lf.estimates.CostOptions(
    modules=2,
    rank=4,
    bases=(3,),
    source=16,
    target=8,
    train_rows=20,
    batch_size=5,
    epochs=3,
)
_BASES = ("LoRAFusion, basis of 16", "LoRAFusion, basis of 32")
_NO_CELLS = (
    "LoRA in SRAM",
    "VeRA",
    "LoraHub",
    "LoRAFusion",
    "LoRAFusion, side by side",
    *_BASES,
)


@functools.cache
def _activities(options=_OPTIONS, crossbar_config=_ISAAC, config=_LARGE):
    return {
        activity.method: activity
        for activity in lf.estimates.activities(config, crossbar_config, options)
    }


@pytest.fixture(scope="module")
def large():
    return {
        name: lf.estimates.price(activity, _ISAAC, _OPTIONS)
        for name, activity in _activities().items()
    }


def test_only_matrices_of_a_task_are_written(large):
    for name, bill in large.items():
        assert (bill.written.cells == 0) == (name in _NO_CELLS)
        assert (bill.written.until_worn is None) == (name in _NO_CELLS)
        assert bill.written.energy.high == pytest.approx(bill.written.cells * 104e-12)
    # By hand: 48 + 96 matrices; A is 1024 x 16 and a unit column in 8 row tiles, B 16 x 1024 in 8 column tiles.
    lora = 144 * 8 * (1024 * 17 + 16 * (1024 + 8))
    assert (
        large["LoRA in cells"].written.cells
        == large["DoRA in cells"].written.cells
        == lora
    )
    steps = 20 * 10
    assert large["LoRA in cells, every step"].written.cells == steps * lora
    assert large["LoRA in cells"].adapter_arrays == 144 * 8 * 16
    assert large["LoRAFusion"].adapter_arrays == 20 * 144 * 8 * 16
    assert large["LoRAFusion, side by side"].adapter_arrays == 144 * 8 * 2 * 8 * 3
    # One column tile of U and one row tile of V, whatever k.
    assert [large[name].adapter_arrays for name in _BASES] == [144 * 2 * 8 * 8] * 2
    assert (
        large["VeRA"].adapter_arrays == 8 * 16
    )  # one pair of 1024 x 128 and 128 x 1024, which all sites read


def test_a_small_model_has_the_cells_that_programming_gives_it():
    config = CrossbarConfig(
        tile=Tile(rows=7, cols=5),
        encoding=Encoding(kind="offset", unit_column=True),
        adc=ADC(),
    )
    square = dataclasses.replace(
        tiny.CONFIG, num_heads=4, d_ff=16
    )  # few shapes, so few programs
    model = tiny.t5(square)
    pool = tiny.pool(2, config=square)
    weights = list(kernels(model).values())
    head = model.head.get_value()[None]
    write = jax.jit(
        jax.vmap(lambda w: crossbar.program(w, config, path="definition").cells)
    )

    def written(stack: jax.Array) -> tuple[int, int]:
        """Arrays and cells of stacked matrices: those of the array that stands for a weight or a unit column."""
        L, K, P, R, C, _, _ = write(stack).shape
        used = crossbar.Geometry.of(stack.shape[1:], config).cells_in_use
        with_unit = np.concatenate([used, used[..., :1]], axis=-1)
        return L * K * P * R * C, L * K * P * int(with_unit.sum())

    options = dataclasses.replace(_OPTIONS, modules=2, rank=4, vera_rank=5, bases=(4,))
    once = lf.estimates.installed_once(square, config, options)
    base = np.sum([written(stack) for stack in (*weights, head)], axis=0)
    modules = [
        m.reshape(-1, *m.shape[2:]) for m in (*pool.A.values(), *pool.B.values())
    ]
    own = np.sum([written(stack) for stack in modules], axis=0)
    found = [standing.counts for standing in once.values()]
    assert (found[0].arrays, found[0].cells) == tuple(base)
    assert (found[1].arrays, found[1].cells) == tuple(own)
    of = _activities(options, config, square)
    assert of["full fine-tuning"].written == found[0]
    assert of["LoRAFusion"].adapters == found[1] == of["LoRA in cells"].written * 2
    assert (
        of["LoRAFusion, side by side"].adapters == found[2]
        and of["VeRA"].adapters == found[3]
    )
    # A basis of as many directions as a module has ranks takes the cells of one module.
    assert (
        of["LoRAFusion, basis of 4"].adapters == found[4] == of["LoRA in cells"].written
    )
    adapted = 2 * (3 + 2 + 2)
    norm_terms = [adapted * (rank + 1) * 16 for rank in (2 * 4, 4)]
    tables = [(0, 0), *[(norm_terms[0], 16 * norm_terms[0])] * 2, (0, 0)]
    tables.append((norm_terms[1] + adapted * 2 * 4**2, 16 * norm_terms[1]))
    assert [(standing.words, standing.macs) for standing in once.values()] == tables


def test_reads_of_a_token_by_hand():
    config = CrossbarConfig(adc=ADC())
    options = dataclasses.replace(
        _OPTIONS, modules=3, rank=4, source=6, target=2, targets=("v",), bases=(5,)
    )
    of = _activities(options, config, tiny.CONFIG)

    def one(d_in: int, d_out: int) -> int:
        return crossbar.counts((d_in, d_out), config).conversions

    # d_model 16, inner 12, d_ff 24; three encoder and two decoder layers, whose cross k and v are read for the source.
    encoder = 3 * (
        3 * one(16, 12) + one(12, 16) + 2 * one(16, 24) + one(24, 16)
    ) + 2 * 2 * one(16, 12)
    decoder = 2 * (
        4 * one(16, 12) + 2 * one(12, 16) + 2 * one(16, 24) + one(24, 16)
    ) + one(16, 48)
    module = one(16, 4) + one(4, 12)
    basis = one(16, 5) + one(5, 12)
    # Conversions of adapters for a source token and a generated one; multiply-adds and words of a generated one.
    for name, of_source, generated, macs, words in (
        ("full fine-tuning", 0, 0, 0, 0),
        ("LoRA in SRAM", 0, 0, 2 * (4 * (16 + 12) + 12), 2 * 4 * (16 + 12)),
        ("LoRA in cells", (3 + 2) * module, 2 * module, None, None),
        (
            "LoRAFusion",
            3 * (3 + 2) * module,
            3 * 2 * module,
            2 * (3 * (4 + 12) + 12),
            2 * (3 + 12),
        ),
        ("LoRAFusion, side by side", None, 2 * (one(16, 12) + one(12, 12)), None, None),
        (
            "LoRAFusion, basis of 5",
            (3 + 2) * basis,
            2 * basis,
            2 * (5 * 5 + 2 * 12),
            2 * (5 * 5 + 12),
        ),
        ("LoraHub", None, None, 2 * 3 * (2 * 4 + 12), None),
        ("VeRA", None, None, 2 * (128 + 2 * 12), None),
    ):
        # Keys and values of 6 + 2 positions, 12 wide, in two layers of the decoder.
        attention = 2 * 2 * 8 * 12
        found = of[name].generated
        assert (
            of_source is None
            or of[name].source.reads.conversions == encoder + of_source
        ), name
        assert generated is None or found.reads.conversions == decoder + generated, name
        assert macs is None or found.macs == attention + macs, name
        assert words is None or found.words == attention + words, name
    assert (
        of["full fine-tuning"].source[1:] == (2 * 3 * 6 * 12,) * 2
    )  # six positions in three layers of the encoder
    # v of 3 + 2 + 2 layers: the core of each is mixed from three, read and written, and 12 magnitudes are written.
    in_basis = of["LoRAFusion, basis of 5"]
    assert (in_basis.installed_macs, in_basis.installed_words) == (
        7 * 3 * 5**2,
        7 * ((3 + 1) * 5**2 + 12),
    )
    # q, k and v side by side and four more, in two layers, then the head; v's A and B come one after the other.
    stages = of["LoRA in cells"].stages
    assert sum(stages.values()) == 2 * 6 + 1
    longest = crossbar.read_latency((16, 4), config) + crossbar.read_latency(
        (4, 12), config
    )
    plain = lf.estimates.price(of["full fine-tuning"], config, options)
    adapted = lf.estimates.price(of["LoRA in cells"], config, options)
    assert adapted.latency_arrays.typical == pytest.approx(
        plain.latency_arrays.typical
        + 2 * (longest.typical - crossbar.read_latency((16, 12), config).typical)
    )


def test_an_input_is_prepared_once_for_a_token():
    config = CrossbarConfig(
        adc=ADC(), mapping=crossbar.Mapping(factors=True, transform="hadamard")
    )
    options = dataclasses.replace(
        _OPTIONS, modules=3, rank=4, source=6, target=2, targets=("v",), bases=(5,)
    )
    for of in _activities(options, config, tiny.CONFIG).values():
        # q, k and v; o; both gates; wo; and cross-attention's k and v. Then two layers of the decoder, and the head.
        assert of.source.reads.factors == 3 * (16 + 12 + 16 + 24) + 2 * 16
        assert of.generated.reads.factors == 2 * (16 + 12 + 16 + 12 + 16 + 24) + 16
        assert (
            of.source.reads.transforms
            == 3 * (16 * 4 + 12 * 11 + 16 * 4 + 24 * 12) + 2 * 16 * 4
        )


def test_training_by_hand():
    """Forward on arrays, backward digital: the steps' FLOPs without the forward products of frozen matrices."""
    config = CrossbarConfig(adc=ADC())
    options = dataclasses.replace(_LITTLE, evaluations=7)
    of = _activities(options, config, tiny.CONFIG)
    # 19 rows of 20 train, packed, so nothing fills up the last batch of an epoch.
    shapes = [lf.estimates.Shape(rows, 16, 8) for rows in (5, 5, 5, 4)] * 3
    validation = lf.estimates.Shape(1, 16, 8)
    steps = len(shapes)
    trained_rows = 3 * 19

    def products(shape: lf.estimates.Shape) -> float:
        found = 2.0 * shape.rows * shape.target * 16 * 48
        for name, site in tiny.CONFIG.sites.items():
            of_source = name.startswith("encoder") or name in (
                "decoder.cross.k",
                "decoder.cross.v",
            )
            count = shape.rows * (shape.source if of_source else shape.target)
            found += 2.0 * count * site.layers * site.d_in * site.d_out
        return found

    def flops(update: Update, trainable: int) -> float:
        trained = sum(
            step_flops(tiny.CONFIG, step, update, trainable=trainable)
            for step in shapes
        )
        return trained + 3 * forward_flops(tiny.CONFIG, validation, update)

    base = flops(Update(), 0)
    on_arrays = sum(map(products, [*shapes, *[validation] * 3]))
    lora = of["LoRA in cells"]
    full = of["full fine-tuning"]
    trained = of["LoRA in cells"].trainable
    assert lora.base_training.macs == pytest.approx((base - on_arrays) / 2)
    assert lora.update_training.macs == pytest.approx(
        (flops(LowRankUpdate(rank=4), trained) - base) / 2
    )
    assert (
        lora.update_training.reads.conversions
        == full.base_training.reads.conversions
        == 0
    )
    assert lora.update_training.words == 7 * steps * trained
    assert full.base_training.macs == pytest.approx(base / 2)
    # A row's reads are those of its tokens; all adapters on arrays are read as often.
    source = (trained_rows + 3) * 16
    target = (trained_rows + 3) * 8
    for name in (
        "LoRAFusion",
        "LoRAFusion, basis of 3",
        "VeRA",
        "LoRA in cells, every step",
    ):
        read = of[name].base_training.reads + of[name].update_training.reads
        assert (
            read == of[name].source.reads * source + of[name].generated.reads * target
        )
    searched = of["LoraHub"].base_training.reads + of["LoraHub"].update_training.reads
    rows = 7 * 4 * 5
    assert searched == of["LoraHub"].source.reads * (rows * 16) + of[
        "LoraHub"
    ].generated.reads * (rows * 8)
    assert of["LoraHub"].update_training.words == 0
    # A basis of 3 at 16 x 12 matrices: every pass mixes 2 cores, multiplies V by the sum and forms the norm. A token
    # is multiplied by the core; backward, by V, by the core for its gradient and the token's, and by U.
    fused = of["LoRAFusion, basis of 3"]
    k = 3
    # Layers of q and v, and tokens of a row; the cross-attention's v reads the source.
    sites = [(3, 16), (3, 16), *[(2, 8)] * 3, (2, 16)]
    matrices = sum(layers for layers, _ in sites)
    met = sum(layers * count for layers, count in sites)
    per_pass = matrices * (2 * k**2 + k**2 * 12 + k * k * (16 + 12))
    forward_tokens = (trained_rows + 3) * met
    step_tokens = trained_rows * met
    wanted = (steps + 3) * per_pass + forward_tokens * k**2
    wanted += (
        step_tokens * (2 * k**2 + k * (16 + 12))
        + steps * matrices * 2 * k**2
        + steps * 9 * fused.trainable
    )
    assert fused.update_training.macs == pytest.approx(wanted)
    tables = matrices * (2 * k**2 + (k + 1) * 12)
    assert (
        fused.update_training.words
        == 7 * steps * fused.trainable + (steps + 3) * tables
    )


def test_a_larger_pool_is_ranked_by_one_pass_over_whole_modules():
    config = CrossbarConfig(adc=ADC())
    drawn = _activities(_LITTLE, config, tiny.CONFIG)
    ranked = _activities(dataclasses.replace(_LITTLE, pool_size=5), config, tiny.CONFIG)
    none = Update()
    whole = SumUpdate(rank=4, modules=5, magnitudes=True)
    # tokens of four padded batches
    source = 4 * 5 * 16
    target = 4 * 5 * 8
    base = drawn["LoRA in cells"].base_training
    for name in ("LoRAFusion", "LoRAFusion, basis of 3"):
        before = drawn[name]
        after = ranked[name]
        assert after.base_training.reads != base.reads == before.base_training.reads
        added = after.base_training.macs - before.base_training.macs
        # One pass over 20 rows, one of them padding; each of the three epochs has 19, and one to validate.
        assert added == pytest.approx(base.macs / 3 * 21 / 20, rel=0.01)
        reads = after.update_training.reads + before.update_training.reads * -1
        if name == "LoRAFusion":
            module = drawn["LoRA in cells"]
            bare = drawn["full fine-tuning"]
            of_source = (module.source.reads + bare.source.reads * -1) * 5
            of_target = (module.generated.reads + bare.generated.reads * -1) * 5
            # The tallest array is not a sum: no difference has one.
            wanted = of_source * source + of_target * target
            assert dataclasses.replace(reads, tallest=0) == dataclasses.replace(
                wanted, tallest=0
            )
        else:  # the arrays hold the basis, so whole modules are read digitally
            assert reads.conversions == 0
            once = step_flops(
                tiny.CONFIG, lf.estimates.Shape(5, 16, 8), whole, trainable=0
            )
            once -= step_flops(
                tiny.CONFIG, lf.estimates.Shape(5, 16, 8), none, trainable=0
            )
            assert (
                after.update_training.macs - before.update_training.macs
                == pytest.approx(4 * once / 2)
            )
    for name in ("LoRA in cells", "LoraHub"):
        here = {
            part: value
            for part, value in vars(ranked[name]).items()
            if not callable(value)
        }
        there = {
            part: value
            for part, value in vars(drawn[name]).items()
            if not callable(value)
        }
        assert here == there


def test_a_bill_adds_up(large):
    fusion = large["LoRAFusion"]
    assert fusion.install == CONSTANTS["word_energy"] * 148_416
    for bill in large.values():
        assert bill.learning == bill.install + bill.update + bill.base
        share = bill.generated.total + bill.source.total * 16.0
        assert bill.inference.typical == pytest.approx(1000 * share.typical)
    more = lf.estimates.price(
        _activities()["LoRAFusion"],
        _ISAAC,
        dataclasses.replace(_OPTIONS, tokens_per_task=3000),
    )
    assert (
        more.inference.low == pytest.approx(3 * fusion.inference.low)
        and more.learning == fusion.learning
    )


def test_saved_writes_are_outweighed_where_the_two_bills_meet():
    of = _activities()
    constants = CONSTANTS.pinned("typical")
    of = {
        name: of[name]
        for name in ("LoRA in cells", "LoRAFusion", "LoRAFusion, basis of 16")
    }
    for name, found in lf.estimates.comparisons(
        of, _ISAAC, _OPTIONS, constants
    ).items():
        tokens = found.break_even.typical
        priced = [
            lf.estimates.price(of[n], _ISAAC, _OPTIONS, constants)
            for n in ("LoRA in cells", name)
        ]
        lora = priced[0].inference.typical / 1000 * tokens
        fusion = priced[1].inference.typical / 1000 * tokens
        installed = [b.install.typical for b in priced]
        assert fusion + installed[1] == pytest.approx(lora + installed[0], rel=1e-6)
        assert found.learning.typical == pytest.approx(
            priced[0].learning.typical / priced[1].learning.typical
        )
        assert found.install.typical == pytest.approx(
            priced[0].install.typical / priced[1].install.typical
        )
    narrow = dataclasses.replace(
        _OPTIONS, bases=(8,)
    )  # fewer directions than the LoRA has ranks
    found = lf.estimates.comparisons(_activities(narrow), _ISAAC, narrow)[
        "LoRAFusion, basis of 8"
    ]
    assert math.isinf(found.break_even.typical)


def test_a_ratio_ranges_over_cells_alone_and_over_everything(large):
    of = {name: _activities()[name] for name in ("LoRA in cells", "LoRAFusion")}
    found = lf.estimates.comparisons(of, _ISAAC, _OPTIONS)["LoRAFusion"]
    word = 148_416 * 2.15e-12
    cells = large["LoRA in cells"].written.cells
    for end, energy in (("low", 1.3e-12), ("typical", 41e-12), ("high", 104e-12)):
        assert getattr(found.install, end) == pytest.approx(cells * energy / word)
    assert (
        found.learning_all.low <= found.learning.low
        and found.learning.high <= found.learning_all.high
    )
    cheap = dataclasses.replace(
        CONSTANTS.table["cell_write_energy"], low=1e-3, typical=1e-3, high=1e-3
    )
    table = dataclasses.replace(
        CONSTANTS, table={**CONSTANTS.table, "cell_write_energy": cheap}
    )
    assert (
        lf.estimates.comparisons(of, _ISAAC, _OPTIONS, table)[
            "LoRAFusion"
        ].break_even.high
        < found.break_even.low
    )


def test_a_tied_head_is_digital():
    tied = dataclasses.replace(tiny.CONFIG, tied=True)
    of = lf.estimates.activities(tied, _ISAAC, dataclasses.replace(_OPTIONS, bases=()))[
        0
    ]
    other = lf.estimates.activities(
        tiny.CONFIG, _ISAAC, dataclasses.replace(_OPTIONS, bases=())
    )[0]
    head = crossbar.counts((16, 48), _ISAAC)
    assert of.generated.reads + head == other.generated.reads
    assert (
        of.generated.macs == other.generated.macs + 16 * 48
        and of.source == other.source
    )


def test_numbers_are_written_with_units_and_the_docs_have_the_constants():
    assert (
        lf.report.as_markdown(constants_table(CONSTANTS))
        in (_ROOT / "docs" / "reference" / "constants.md").read_text()
    )
    assert (
        lf.estimates.quantity(Range(1.2e-6, 3.45e-6, 0.0123), "J")
        == "1.2 / 3.45 / 12,300 µJ"
    )
    assert (
        lf.estimates.quantity(Range.of(2.5), "s") == "2.5 s"
        and lf.estimates.quantity(Range.of(0.0), "J") == "0 J"
    )
    assert (
        lf.estimates.quantity(Range(1e-20, 2e-20, 3e-20), "J")
        == "1e-05 / 2e-05 / 3e-05 fJ"
    )
    assert lf.estimates.number(Range(0.5, 12.0, 1e10)) == "0.5 / 12 / 1e+10"
    assert lf.estimates.number(Range(1.0, math.inf, math.inf)) == "1 / never / never"


def test_the_command_prints_every_method_writes_json_and_reads_constants(
    tmp_path, capsys
):
    out = tmp_path / "cost.json"
    path = tmp_path / "mine.yaml"
    main(["cost", "--crossbar", "isaac", "--json", str(out)])
    printed = capsys.readouterr().out
    for name in (
        "LoRAFusion",
        "LoRA in cells",
        "LoRA in SRAM",
        "DoRA in cells",
        "VeRA",
        "LoraHub",
        "full fine-tuning",
    ):
        rows = [line for line in printed.splitlines() if line.startswith(f"| {name} ")]
        assert len(rows) == 4 + (name == "LoRAFusion")
        assert name != "LoRAFusion" or rows[0].split("|")[3].strip() == "0"
    assert all(constant.source[:40] in printed for constant in CONSTANTS.table.values())
    saved = json.loads(out.read_text())
    assert saved["methods"]["LoRAFusion"]["written"]["cells"] == 0
    assert saved["methods"]["LoRA in cells"]["written"]["cells"] == 39_075_840
    low, typical, high = saved["methods"]["LoRAFusion"]["generated"]["adc"]
    assert 0 < low < typical < high
    path.write_text(
        "cell_write_energy: {unit: pJ, low: 1.0e+6, typical: 1.0e+6, high: 1.0e+6, source: mine}"
    )
    main(["cost", "--crossbar", "isaac", "--constants", str(path)])
    after = capsys.readouterr().out
    assert printed != after and re.search(r"\| *mine\b", after)


@pytest.mark.long
def test_the_experiment_writes_tables_and_plots(tmp_path):
    arguments = [
        "--shapes",
        "t5-small",
        "flan-t5-small",
        "--crossbars",
        "puma",
        "--out",
        str(tmp_path),
    ]
    cost.main(arguments)
    assert {p.name for p in tmp_path.iterdir()} == {
        "table.csv",
        "t5-small.png",
        "flan-t5-small.png",
    }
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert {row["shape"] for row in rows} == {"t5-small", "flan-t5-small"}
    assert all(
        float(row["low"]) <= float(row["typical"]) <= float(row["high"]) for row in rows
    )
    of = {
        (row["method"], row["quantity"]): row
        for row in rows
        if row["shape"] == "t5-small"
    }
    found = lf.estimates.bills(
        lf.models.known_shapes()["t5-small"], PRESETS["puma"], _OPTIONS
    )["LoRA in cells"]
    assert float(of["LoRA in cells", "learned"]["high"]) == pytest.approx(
        found.learning.high, rel=1e-5
    )
    assert float(of["LoRA in cells", "cells written"]["low"]) == found.written.cells
    assert float(of["once: base", "cells written"]["low"]) > 0
    with pytest.raises(ValueError, match="no shapes t5-tiny: choose of flan-t5-small"):
        cost.main(["--shapes", "t5-tiny"])


def test_bad_options_are_refused_before_files_are_written(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        ("--crossbar ideal", "dac = None is an ideal converter"),
        ("--targets q_proj", "targets are q_proj: choose of q k v"),
        ("--modules 0", "modules is 0"),
        ("--tokens-per-task 0", "tokens_per_task is 0"),
        ("--bases 321", "321 directions: expected 1 to 320, the pool's rank"),
        (
            "--bases 600 --modules 40 --shape t5-small",
            "600 directions, but encoder.self.q is 512 x",
        ),
        ("--pool-size 19", "pool_size is 19: expected at least 20"),
        ("--json cost.txt", "expected a file ending in .json"),
        ("--constants none.yaml", "none.yaml: no such file of constants"),
        ("--constants cost.txt", "constants are a file ending in"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["cost", *arguments.split()])
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
