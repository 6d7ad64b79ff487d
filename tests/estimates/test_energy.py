"""The energy table: counts by hand and as programming makes them, the command, its experiment and refusals."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import cost
import jax
import numpy as np
import pytest
import small_llama
import tiny
from json_files import read_json
from refusals import refused

import lorafusion_jax as lf
from lorafusion_jax import crossbar, estimates
from lorafusion_jax.cli import main
from lorafusion_jax.crossbar import (
    ADC,
    CONSTANTS,
    CrossbarConfig,
    Encoding,
    Range,
    Tile,
)
from lorafusion_jax.estimates import number, quantity

_ROOT = Path(__file__).resolve().parents[2]
_TYPICAL = CONSTANTS.pinned("typical")
_ARRAYS = CrossbarConfig(adc=ADC())
_OPTIONS = estimates.CostOptions(
    modules=3, rank=4, bases=(5,), source=6, target=2, train_rows=20, batch_size=5
)


def _costs(crossbar_config=_ARRAYS, config=tiny.CONFIG, options=_OPTIONS):
    return estimates.task_costs(config, crossbar_config, options, _TYPICAL)


@pytest.fixture(scope="module")
def costs():
    return _costs()


@pytest.mark.parametrize(
    "mapping",
    [
        crossbar.Mapping(),
        pytest.param(
            crossbar.Mapping(factors=True, transform="hadamard"), marks=pytest.mark.long
        ),
    ],
    ids=["plain", "prepared"],
)
def test_the_reads_of_a_token_by_hand(mapping):
    """An input that several matrices share is prepared once."""
    config = replace(_ARRAYS, mapping=mapping)
    found = _costs(config)

    def read(d_in, d_out, shared=False):
        return crossbar.counts((d_in, d_out), config, prepares=not shared)

    # d_model 16, inner 12, d_ff 24; six tokens in three encoder layers, and in cross-attention's k and v of two decoder
    # layers; two tokens in those layers and the head.
    attention = read(16, 12) + read(16, 12, True) * 2 + read(12, 16)
    feed_forward = read(16, 24) + read(16, 24, True) + read(24, 16)
    cross = read(16, 12) + read(12, 16)
    encoder = (attention + feed_forward) * 3
    encoder += (read(16, 12) + read(16, 12, True)) * 2
    base = encoder * 6 + ((attention + cross + feed_forward) * 2 + read(16, 48)) * 2
    # q and v: layers times tokens
    met = 2 * 3 * 6 + 2 * 6 + 3 * 2 * 2
    module = read(16, 4, True) + read(4, 12, True)
    adapters = {
        "full fine-tuning": crossbar.Counts(),
        "LoRA in SRAM": crossbar.Counts(),
        "LoRA in cells": module,
        "DoRA in cells": module,
        "LoRAFusion": module * 3,
        "LoraHub": module * 3,
        "LoRAFusion, side by side": read(16, 12, True) + read(12, 12, True),
        "LoRAFusion, basis of 5": read(16, 5, True) + read(5, 12, True),
        "VeRA": read(16, 128, True) + read(128, 12, True),
    }
    for method, counts in adapters.items():
        energy = crossbar.read_energy(base + counts * met, config, _TYPICAL).total
        assert found[method].reads.typical == pytest.approx(energy.typical / 2), method


def test_the_digital_work_of_a_token_by_hand(costs):
    """Attention; an adapter in memory, and the core of a basis. Products on arrays are none of it."""
    attention = 2 * 12 * (3 * 6 * 6 + 2 * (2 * 2 + 2 * 6))
    met = 2 * 3 * 6 + 2 * 6 + 3 * 2 * 2
    further = {"LoRA in SRAM": 4 * (16 + 12), "LoRAFusion, basis of 5": 5**2}
    each = (_TYPICAL["mac_energy"] + _TYPICAL["word_energy"]).typical
    for method, cost_of_task in costs.items():
        digital = cost_of_task.token.typical - cost_of_task.reads.typical
        wanted = each * (attention + met * further.get(method, 0)) / 2
        assert digital == pytest.approx(wanted, rel=1e-6), method


@pytest.mark.parametrize("tied", [True, False])
def test_attention_and_a_tied_head_stay_digital(tied, tmp_path):
    base = small_llama.make(tmp_path / "base", tie_word_embeddings=tied)
    config = lf.read_config(str(base))
    # Queries times keys, and weights times values, of 127 columns.
    attention = config.num_layers * 2 * 127 * config.num_heads * config.d_head
    head = math.prod(config.head) if tied else 0
    assert estimates.digital_macs(str(base)) == pytest.approx(attention + head)


def test_training_reads_arrays_forward_and_computes_the_rest(costs):
    """Adapters in arrays save the digital products x A B, and cost reads and writes. 19 rows train, one validates."""
    rows = 20 * (19 + 1)
    met = 2 * 3 * 6 + 2 * 6 + 3 * 2 * 2
    one = crossbar.counts((16, 4), _ARRAYS, prepares=False)
    other = crossbar.counts((4, 12), _ARRAYS, prepares=False)
    reads = crossbar.read_energy((one + other) * (met * rows), _ARRAYS, _TYPICAL).total
    mac = _TYPICAL["mac_energy"] + _TYPICAL["words_per_mac"] * _TYPICAL["word_energy"]
    once = costs["LoRA in cells"]
    every_step = costs["LoRA in cells, every step"]
    steps = 20 * 4
    assert every_step.written.cells == steps * once.written.cells
    saved = mac.typical * met * rows * 4 * (16 + 12)
    more = every_step.learned.typical - once.learned.typical
    writes = (steps - 1) * once.written.energy.typical
    assert more == pytest.approx(reads.typical + writes - saved)
    # All of full fine-tuning is digital. Where layers are unrolled, a step computes nothing again.
    settings = estimates.Settings(recipe=lf.Recipe(), seeds=1, device="accelerator")
    shape = estimates.Shape(5, 6, 2)
    unrolled = replace(tiny.CONFIG, unroll=True)
    step = estimates.program_of(unrolled, "full", settings, "step", shape).flops
    full = costs["full fine-tuning"]
    digital = (full.learned.typical - full.written.energy.typical) / mac.typical
    assert digital == pytest.approx(step / 2 * (19 * 20 / 5 + 20 / 5 / 3), rel=1e-6)


@pytest.mark.long
def test_a_small_model_has_the_cells_that_programming_gives_it():
    config = CrossbarConfig(
        tile=Tile(rows=7, cols=5),
        encoding=Encoding(kind="offset", unit_column=True),
        adc=ADC(),
    )
    # few shapes, so few programs
    square = replace(tiny.CONFIG, num_heads=4, d_ff=16)
    model = tiny.t5(square)
    pool = tiny.pool(1, config=square)
    write = jax.jit(
        jax.vmap(lambda w: crossbar.program(w, config, path="definition").cells)
    )

    def written(stack):
        """Return the cells of matrices: those of the array that stand for a weight or a unit column."""
        L, K, P, *_ = write(stack).shape
        used = crossbar.Geometry.of(stack.shape[1:], config).cells_in_use
        with_unit = np.concatenate([used, used[..., :1]], axis=-1)
        return L * K * P * int(with_unit.sum())

    found = _costs(config, square)
    base = [*lf.kernels(model).values(), model.head.get_value()[None]]
    module = [m[:, 0] for m in (*pool.A.values(), *pool.B.values())]
    assert found["full fine-tuning"].written.cells == sum(map(written, base))
    assert found["LoRA in cells"].written.cells == sum(map(written, module))


@pytest.mark.long
def test_a_tied_head_is_digital(costs):
    tied = _costs(config=replace(tiny.CONFIG, tied=True))["LoRA in cells"]
    head = crossbar.read_energy(crossbar.counts((16, 48), _ARRAYS), _ARRAYS, _TYPICAL)
    other = costs["LoRA in cells"]
    each = (_TYPICAL["mac_energy"] + _TYPICAL["word_energy"]).typical
    assert tied.reads.typical + head.total.typical == pytest.approx(other.reads.typical)
    digital = tied.token.typical - tied.reads.typical
    wanted = other.token.typical - other.reads.typical + 16 * 48 * each
    assert digital == pytest.approx(wanted)


def test_numbers_are_written_with_units_and_the_docs_have_the_constants():
    page = (_ROOT / "docs" / "reference" / "constants.md").read_text()
    for name, constant in CONSTANTS.table.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {name} ")]
        values = Range(constant.low, constant.typical, constant.high)
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        wanted = [number(values), constant.unit, constant.meaning, constant.source]
        assert cells[1:] == wanted, name
    for value, unit, text in (
        (Range(1.2e-6, 3.45e-6, 0.0123), "J", "1.2 / 3.45 / 12,300 µJ"),
        (Range.of(2.5), "s", "2.5 s"),
        (Range.of(0.0), "J", "0 J"),
        (Range(1e-20, 2e-20, 3e-20), "J", "1e-05 / 2e-05 / 3e-05 fJ"),
    ):
        assert quantity(value, unit) == text
    assert number(Range(0.5, 12.0, 1e10)) == "0.5 / 12 / 1e+10"


def test_the_command_has_the_paper_s_counts_and_reads_constants(tmp_path, capsys):
    out = tmp_path / "cost.json"
    main(f"cost --crossbar isaac --bases 32 --json {out}".split())
    printed = capsys.readouterr().out.splitlines()
    saved = read_json(out)
    for method, cost_of_task in saved.items():
        assert sum(line.startswith(f"| {method} ") for line in printed) == 1
        for name in ("learned", "token", "reads"):
            low, typical, high = cost_of_task[name]
            assert 0 < low < typical < high
        writes = "in cells" in method or method == "full fine-tuning"
        assert (cost_of_task["written"]["cells"] > 0) == writes
    # By hand: 48 + 96 matrices; A is 1024 x 16 and a unit column in 8 row tiles, B 16 x 1024 in 8 column tiles.
    lora = saved["LoRA in cells"]
    fusion = saved["LoRAFusion"]
    assert lora["written"]["cells"] == 144 * 8 * (1024 * 17 + 16 * (1024 + 8))
    assert (fusion["trained"], lora["trained"]) == (148_416, 4_718_592)
    # The reads of 20 modules for one token cost more than writing a LoRA; those of a basis do not.
    more = fusion["token"][1] - lora["token"][1]
    in_basis = saved["LoRAFusion, basis of 32"]["token"][1] - lora["token"][1]
    assert 0 < in_basis < lora["written"]["energy"][1] < more

    path = tmp_path / "mine.yaml"
    path.write_text(
        "cell_write_energy: {unit: pJ, low: 8.0, typical: 8.0, high: 8.0, source: mine}"
    )
    changed = f"--constants {path} --bases 32 --json {out}".split()
    main(["cost", *changed])
    cells = lora["written"]["cells"]
    energy = read_json(out)["LoRA in cells"]["written"]["energy"]
    assert energy == pytest.approx([8e-12 * cells] * 3)


@pytest.mark.long
def test_the_experiment_writes_a_table_and_plots(tmp_path):
    arguments = f"--shapes t5-small --crossbars puma --out {tmp_path}".split()
    cost.main(arguments)
    assert {p.name for p in tmp_path.iterdir()} == {"table.csv", "t5-small.png"}
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    lora = {row["quantity"]: row for row in rows if row["method"] == "LoRA in cells"}
    config = lf.models.known_shapes()["t5-small"]
    arrays = crossbar.PRESETS["puma"]
    found = estimates.task_costs(config, arrays, estimates.CostOptions())
    learned = found["LoRA in cells"].learned
    assert float(lora["energy until learned"]["high"]) == pytest.approx(
        learned.high, rel=1e-5
    )
    cells = found["LoRA in cells"].written.cells
    assert float(lora["cells written"]["low"]) == cells
    with refused("no shapes t5-tiny: choose of flan-t5-small"):
        cost.main(["--shapes", "t5-tiny"])


def test_bad_options_are_refused_before_files_are_written(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        ("--crossbar ideal", "dac = None is an ideal converter"),
        ("--modules 0", "modules is 0"),
        ("--bases 321", "321 directions: expected 1 to 320, the pool's rank"),
        (
            "--bases 600 --modules 40 --shape t5-small",
            "600 directions, but encoder.self.q is 512 x",
        ),
        ("--json cost.txt", "expected a file ending in .json"),
        ("--constants none.yaml", "none.yaml: no such file of constants"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["cost", *arguments.split()])
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
