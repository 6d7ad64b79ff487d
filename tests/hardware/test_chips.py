"""Chips: written once, drawn by key, evaluated at ages, trained on, several in one program."""

import functools
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import one_block
import pytest
import recipes
import tiny
from flax import nnx
from json_files import read_json, write_json
from numpy.testing import assert_allclose, assert_array_equal
from refusals import refused

import lorafusion_jax as lf
from lorafusion_jax import (
    FileError,
    Frozen,
    Fusion,
    crossbar,
    fuse,
    hardware,
    load_run,
    runs,
)
from lorafusion_jax.cli import main
from lorafusion_jax.cli.crossbar import programmed_report
from lorafusion_jax.cli.evaluate import age_table
from lorafusion_jax.crossbar import (
    PRESETS as ARRAYS,
    Device,
    Independent,
    PowerLaw,
    save_config,
)
from lorafusion_jax.hardware.chips import Redrawn, logits_of
from lorafusion_jax.hardware.on_arrays import on_arrays
from lorafusion_jax.runs.evaluate import Evaluation
from lorafusion_jax.trials import read_lines

_DEVICE = Device(programming=Independent(0.02), drift=PowerLaw(0.05, 0.02), time=1.0)
_NOISY = replace(ARRAYS["ideal"], device=_DEVICE)
_GRAPH, _ = nnx.split(tiny.t5())
_DIGITAL = tiny.frozen(tiny.t5())
_KEYS = jax.random.split(jax.random.key(5), 2)
# The values of both stacks and their modules: a program that writes every weight takes five times as long to compile.
_WRITTEN = "*.self.v"


@jax.jit
def _loss(frozen, step=0):
    frozen = frozen.of_step(jnp.int32(step), _GRAPH)
    return tiny.loss(
        {"coefficients": jnp.full((2, 5), 0.4)},
        tiny.problem(Fusion(magnitudes=False), frozen, (2, 1)),
    )


@pytest.mark.long
def test_configurations_that_differ_in_their_device_model_alone_are_different_programs():
    """Trees of registered dataclasses compare equal in jaxlib if only a class differs."""
    devices = [
        Device(programming=model(0.1)) for model in (Independent, crossbar.Proportional)
    ]
    rules = [{_WRITTEN: replace(ARRAYS["ideal"], device=device)} for device in devices]
    drawn = [
        hardware.program_on_arrays(_GRAPH, _DIGITAL, rule, _KEYS[0]) for rule in rules
    ]
    assert _loss(drawn[0]) != _loss(drawn[1])


@pytest.mark.long
@pytest.mark.parametrize(
    "steps", [pytest.param("every", marks=pytest.mark.nightly), "other"]
)
def test_steps_draw_chips_of_their_own_from_the_key(steps):
    rules = {_WRITTEN: _NOISY}

    def chip(key):
        return hardware.program_on_arrays(_GRAPH, _DIGITAL, rules, key, norm="ideal")

    first = chip(_KEYS[0])
    drawing = hardware.redrawn(
        first, _DIGITAL, rules, _KEYS[1], steps=steps, norm="ideal"
    )
    losses = [float(_loss(drawing, step)) for step in range(4)]
    assert losses == [float(_loss(drawing, step)) for step in range(4)]
    first_loss = float(_loss(first))
    if steps == "every":
        assert len({*losses, first_loss}) == 5
    else:
        assert losses[1] == losses[3] == pytest.approx(first_loss, rel=1e-6)
        assert len({*losses}) == 3
    # The chip of a step is the one of its key.
    drawn = chip(jax.random.fold_in(_KEYS[1], 2))
    assert losses[2] == pytest.approx(float(_loss(drawn)), rel=1e-5)


def test_ages_in_seconds_need_a_unit_and_a_drift_model():
    ages = {"0": 0, "90": 90, "1s": 1, "2min": 120, "1h": 3600, "1.5days": 129_600}
    ages["1month"] = 2_592_000
    assert {age: hardware.aged(_NOISY, age).device.time for age in ages} == ages
    for age in ("", "h", "1 fortnight", "-1h", "1e", "NaN", "1e400"):
        with refused("an age of"):
            hardware.aged(_NOISY, age)
    ideal = ARRAYS["ideal"]
    no_drift = "but these cells have no drift model: give device.drift"
    with refused(f"an age of 1h, {no_drift}"):
        hardware.aged(ideal, "1h")
    with refused(f"--compensate, {no_drift}"):
        hardware.aged(ideal, None, compensate=True)
    assert hardware.aged(ideal, "0").device.time == 0
    assert hardware.aged(_NOISY, "1h", compensate=True).device.compensate
    assert not hardware.aged(_NOISY, "1h").device.compensate


def test_keys_and_numbers_of_chips_have_bounds():
    with refused("chip_key is 4294967296: "):
        hardware.load_chips("isaac", key=2**32)
    chips = hardware.load_chips("isaac")
    assert chips.config == ARRAYS["isaac"]
    for number in (-1, 2**32 - 1):  # the latter is that of the steps' chips
        with refused("chips are numbered from 0 to 4,294,967,294"):
            chips.chip_key(number)


# Folders and runs.

# Weights that stay digital in most of what follows: of those written there are three kinds, all in the pool too.
_NOT_WRITTEN = ("head", "*.ff.*", "*.q", "*.k", "*.o")
_V = "encoder.self.v"
_TRAIN = one_block.SMALL / "tasks" / "double_digit" / "train.jsonl"


@pytest.fixture(scope="module")
def chips(small, tmp_path_factory):
    """A folder with an analogue configuration, and a file of two chips of all `v`; further files of tests go there."""
    folder = tmp_path_factory.mktemp("chips")
    save_config(_NOISY, folder / "noisy.yaml")
    hardware.write_chips(_programming(small, folder, chips=2, chip_key=7))
    return folder


def _programming(small, folder, **changes):
    values = {
        "crossbar": str(folder / "noisy.yaml"),
        "out": folder / "two.json",
        "keep_digital": _NOT_WRITTEN,
    } | changes
    return hardware.ProgramOptions(base=str(small[0]), pool=str(small[1]), **values)


def _fusing(small, chips, name, **changes):
    return recipes.small_run(small, chips / "runs", **{"name": name} | changes)


def _evaluating(options, **changes):
    return hardware.EvaluateOnChipsOptions(run=runs.run_path(options), **changes)


def _on_chips(options, **changes):
    return hardware.evaluate_on_chips(_evaluating(options, **changes))


@pytest.fixture(scope="module")
def fused(small, chips):
    fuse(options := _fusing(small, chips, "digital"))
    return options


@pytest.mark.long
def test_runs_are_evaluated_and_trained_on_restored_chips(small, chips, fused):
    folder = str(chips / "two.json")
    lines = chips / "lines.txt"
    lines.write_text("\n".join(row["context"] for row in read_lines(_TRAIN)[:24]))
    restore = hardware.RestoreOptions(
        base=str(small[0]),
        crossbar=folder,
        chip=(0, 1),
        text=(lines,),
        method="low-rank",
        rank=1.0,
        epochs=1,
        out=chips / "restored",
    )
    hardware.restore_chips(restore)
    corrections = str(chips / "restored")
    evaluate = functools.partial(_on_chips, fused, crossbar=folder, chips=2)
    plain = evaluate()
    restored = evaluate(restore=corrections)
    assert (plain["restore"], restored["restore"]) == (None, corrections)
    losses = [[row["loss"] for row in results["rows"]] for results in (plain, restored)]
    assert np.abs(np.subtract(*losses)).min() > 1e-5
    with refused("corrects chips with another configuration"):
        evaluate(restore=corrections, read_noise=0.01)
    # One chip after the other: each has the corrections of its own number.
    report = hardware.report_on_chips(
        _evaluating(fused, crossbar=folder, chips=2, restore=corrections)
    )
    alone = [seed["loss"] for chip in report["chips"] for seed in chip["seeds"]]
    assert_allclose(alone, losses[1], rtol=1e-4)
    arrays = runs.OnArrays(
        crossbar=folder, train_chip="chip", chip=1, restore=corrections
    )
    trained = _fusing(small, chips, "restored", arrays=arrays)
    assert fuse(trained).seeds == fuse(replace(trained, resume=True)).seeds
    fresh = replace(arrays, train_chip="fresh")
    with refused("corrects chip 1 alone: train with --train-chip chip"):
        fuse(_fusing(small, chips, "fresh", arrays=fresh))


def test_a_file_records_its_chips_and_refuses_others(small, chips, fused):
    """Digests of the cells depend on the key alone, and another one is refused with the versions that wrote it."""
    file = chips / "all.json"
    options = _programming(small, chips, out=file, chips=2, chip_key=7, keep_digital=())
    written = hardware.write_chips(options)
    again = hardware.write_chips(replace(options, out=chips / "again.json"))
    assert read_json(file) == written == again
    assert list(written["modules"]) == sorted(p.name for p in small[1].iterdir())
    two = read_json(chips / "two.json")
    assert two["cells_sha256"].items() < written["cells_sha256"].items()
    # Every weight is two cells: attention of a block of either stack, gated feed-forward.
    sites = 96 * 96 * (8 + 4) + 3 * 96 * 384 * 2
    assert written["one_chip"]["cells"] == pytest.approx(2 * sites, rel=0.5)
    assert 0 < written["one_chip"]["utilisation"] <= 1
    assert f"{written['one_chip']['cells']:,} written" in programmed_report(written)
    for changes, message in (
        (
            {"cells_sha256": {_V: "0"}},
            f"written by lorafusion-jax .* and jax {jax.__version__}, and its key draws other cells of {_V}",
        ),
        ({"sha256": "0"}, "not the configuration or the preparations that the chips"),
    ):
        write_json(chips / "changed.json", two | changes)
        with refused(message):
            _on_chips(fused, crossbar=str(chips / "changed.json"))


def test_what_cannot_be_programmed_is_refused_before_anything_is_written(small, chips):
    before = sorted(chips.iterdir())
    with refused("two.json exists: give another --out; chips are never overwritten"):
        hardware.write_chips(_programming(small, chips))
    digital = "the digital weights"
    for changes, message in (
        ({"chips": 0}, "chips is 0: "),
        ({"crossbar": "isaac", "chips": 2}, "is not random in isaac, so 2 chips"),
        ({"keep_digital": ("nowhere.*",)}, r"the rule 'nowhere.\*' matches no weight"),
        ({"keep_digital": ("*",)}, rf"{digital} '\*' leave none for arrays"),
        ({"keep_digital": ("**",)}, rf"{digital} '\*\*', '\*' leave none for arrays"),
    ):
        with refused(message):
            options = _programming(small, chips, out=chips / "new", **changes)
            hardware.write_chips(options)
    assert sorted(chips.iterdir()) == before


@pytest.mark.nightly
def test_a_run_on_chips_at_several_ages(chips, fused):
    file = str(chips / "two.json")
    found = _on_chips(fused, crossbar=file, ages=("1s", "1year"), compensate="off")
    losses = {
        (row["age"], row["chip"], row["seed"]): row["loss"] for row in found["rows"]
    }
    assert len(losses) == 2 * 2 * 2
    assert losses["1s", 0, 1] != losses["1s", 1, 1]
    # A chip of the same key from the configuration is the same chip, with modules in other places or alone.
    alone = _on_chips(
        fused,
        crossbar=str(chips / "noisy.yaml"),
        ages=("1s",),
        compensate="off",
        chip_key=7,
        keep_digital=_NOT_WRITTEN,
    )
    for row in alone["rows"]:
        assert row["loss"] == pytest.approx(losses["1s", 0, row["seed"]], rel=1e-4)


@pytest.mark.long
def test_a_run_of_other_weights_is_not_evaluated_on_these_chips(
    small, chips, fused, tmp_path
):
    pool = tmp_path / "pool"
    module = sorted(path.name for path in small[1].iterdir())[0]
    shutil.copytree(small[1], pool)
    one_block.change_tensors(
        pool / module, lambda tensors: {name: t + 1 for name, t in tensors.items()}
    )
    other = _fusing(
        small, chips, "other", pool=str(pool), adapters=(module,), seeds=(1,)
    )
    fuse(other)
    file = str(chips / "two.json")
    with refused(f"fuses the module {module} .* programmed with another pool"):
        _on_chips(other, crossbar=file)
    arrays = runs.OnArrays(crossbar=file)
    with refused("programmed with another pool"):
        fuse(replace(other, name="refused", arrays=arrays))
    assert not (chips / "runs" / "refused").exists()


def test_what_chips_cannot_do_is_refused(small, chips, fused):
    for changes, message in (
        ({"chips": 3}, "two.json has no chip 2: it has 0 to 1"),
        ({"chips": 0}, "chips is 0: "),
        ({"chip_key": 1}, "has its own key and digital weights"),
        ({"crossbar": "isaac", "ages": ("1h",)}, "no drift model"),
        ({"crossbar": "isaac", "chips": 2}, "nothing in isaac is random"),
        ({"adc_bits": 4}, "has no ADC to give 4 bits"),
        ({"lora_in": "cells"}, "trained no LoRA"),
    ):
        with refused(message):
            _on_chips(fused, **({"crossbar": str(chips / "two.json")} | changes))
    folder = hardware.load_chips(str(chips / "two.json"))
    control = replace(fused, control="random-factors")
    with refused("two.json holds no random-factors control"):
        folder.checked(runs.load_setup(control), control.control)


@pytest.mark.long
def test_what_a_run_trains_on(small, chips, fused):
    setup = runs.load_setup(fused)
    params = load_run(runs.run_path(fused))[1]

    def asked(noise):
        options = replace(
            fused,
            arrays=runs.OnArrays(
                crossbar=str(chips / "two.json"), train_chip=noise, chip=1
            ),
        )
        placed = on_arrays(setup, options, params)
        return placed.training.problem.frozen, placed.tested(params).problem.frozen

    def value(frozen):
        weights = lf.models.matrices(nnx.merge(setup.problem.graph, frozen.base))
        return np.asarray(lf.models.dense(weights[_V], jnp.float32))

    digital = value(setup.problem.frozen)
    key = hardware.load_chips(str(chips / "two.json")).chip_key(1)
    alone = crossbar.program_tree({_V: jnp.asarray(digital)}, {_V: _NOISY}, key)[_V]
    chip = asked("chip")[0]
    assert_allclose(
        value(chip), crossbar.programmed_weights(alone), rtol=1e-5, atol=1e-6
    )
    training, tested = asked("none")
    assert_allclose(value(training), digital, rtol=1e-5, atol=1e-6)
    assert_array_equal(value(tested), value(chip))
    for noise, steps in (("fresh", "every"), ("both", "other")):
        training, tested = asked(noise)
        assert isinstance(training, Redrawn) and training.steps == steps
        assert type(tested) is Frozen
        assert_array_equal(value(training), value(tested))


@pytest.mark.nightly
def test_a_lora_in_cells_is_the_lora_where_cells_are_ideal(small, chips):
    options = _fusing(small, chips, "lora", method="lora", pool=None)
    wanted = [row["loss"] for row in fuse(options).seeds]
    for lora_in in ("sram", "cells"):
        rows = _on_chips(
            options, crossbar="ideal", lora_in=lora_in, keep_digital=_NOT_WRITTEN
        )["rows"]
        assert [row["loss"] for row in rows] == pytest.approx(wanted, rel=1e-4)
    noisy = {
        lora_in: _on_chips(
            options,
            lora_in=lora_in,
            crossbar=str(chips / "noisy.yaml"),
            keep_digital=_NOT_WRITTEN,
        )["rows"]
        for lora_in in ("sram", "cells")
    }
    assert noisy["sram"] != noisy["cells"]


def test_results_of_other_options_are_other_files(tmp_path, monkeypatch):
    first = hardware.EvaluateOnChipsOptions(run=tmp_path, crossbar="a/noisy.yaml")
    changes = [
        {},
        {"crossbar": "b/noisy.yaml"},
        {"crossbar": "x" * 300},
        {"task": "a/one"},
        {"task": "b/one"},
        {"ages": tuple(f"{n}day" for n in range(45))},
        {"keep_digital": ("a/b",)},
    ]
    paths = {
        hardware.results_path(replace(first, **change), kind)
        for change in changes
        for kind in ("chips", "crossbar")
    }
    for folder in ("c", "d"):  # the same name in two folders
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "noisy.yaml").touch()
        monkeypatch.chdir(tmp_path / folder)
        paths.add(hardware.results_path(replace(first, crossbar="noisy.yaml")))
    assert len(paths) == 2 * len(changes) + 2
    assert {path.parent for path in paths} == {tmp_path}
    assert max(len(path.name) for path in paths) < 80
    assert hardware.results_path(replace(first, eval_batch=2)) in paths


def test_a_file_of_results_that_cannot_be_written_is_named_before_anything_is_computed(
    chips, fused, monkeypatch
):
    options = _evaluating(fused, crossbar=str(chips / "two.json"), calibration_rows=7)
    monkeypatch.setattr("lorafusion_jax.hardware.evaluate.on_every_chip", pytest.fail)
    hardware.results_path(options).mkdir()
    with pytest.raises(FileError, match="chips-two.json-.*: a folder: give a file"):
        hardware.evaluate_on_chips(options)


def test_options_of_chips_without_chips_are_refused(small, chips, fused, capsys):
    for noise in (runs.OnArrays(train_chip="chip"), runs.OnArrays(age="1h")):
        with refused("only for simulated chips: name them with --crossbar"):
            fuse(replace(fused, name="without", arrays=noise))
    assert not (chips / "runs" / "without").exists()
    with pytest.raises(SystemExit, match="2"):
        main(f"evaluate --run {runs.run_path(fused)} --ages 1h --lora-in cells".split())
    assert (
        "--ages, --lora-in: only for simulated chips: name them with --crossbar"
        in capsys.readouterr().err
    )


def test_a_control_has_the_places_of_the_modules_that_it_replaces(small, chips):
    options = _fusing(small, chips, "control", control="random-factors", seeds=(1,))
    setup = runs.load_setup(options)
    there = sorted(path.name for path in small[1].iterdir())
    wanted = [there.index(name) for name in there if name in setup.modules[0]]
    numbers = hardware.module_numbers(setup, options, hardware.load_chips("isaac"))
    assert numbers.tolist() == wanted


def test_examples_in_prompts_need_a_report_on_chips(small, chips):
    few = _fusing(small, chips, "few-shot", method="few-shot", pool=None, seeds=(1,))
    fuse(few)
    with refused("few-shot has other examples in its prompts .* give --report"):
        _on_chips(few, crossbar="isaac")


def test_a_loss_that_is_not_finite_is_null():
    found = Evaluation(
        [["a"]] * 2, np.ones((2, 1), bool), np.array([np.nan, 1.5]), None
    )
    rows = [
        {"age": None, "compensate": None, "chip": chip} | row
        for chip, row in enumerate(runs.seed_rows((4, 4), found))
    ]
    assert [row["loss"] for row in rows] == [None, 1.5]
    line = age_table({"rows": rows, "chips": 2}).splitlines()[1]
    assert line.split() == "- - 100.0 ± 0.0 -".split()


def test_methods_without_a_frozen_model_have_no_place_on_arrays(small, chips):
    isaac = runs.OnArrays(crossbar="isaac")
    for method in ("full", "constant"):
        options = _fusing(
            small, chips, f"no-{method}", method=method, pool=None, arrays=isaac
        )
        with refused(f"the method {method} leaves no frozen model to program"):
            fuse(options)
    fresh = replace(isaac, train_chip="fresh")
    with refused("programming is not random in isaac"):
        fuse(_fusing(small, chips, "no-noise", arrays=fresh))


def test_calibration_compiles_once_for_a_model():
    """A function of its own for every chip would compile, and be kept, every time."""
    assert logits_of(_GRAPH, Fusion()) is logits_of(nnx.split(tiny.t5())[0], Fusion())
    assert logits_of(_GRAPH, Fusion()) is not logits_of(
        _GRAPH, Fusion(composition="mix")
    )
