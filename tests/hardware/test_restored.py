"""A model restored on chips from unlabelled text: on disk, in evaluations, and what is refused."""

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import one_block
import pytest
import small_llama
from flax import nnx
from json_files import read_json, write_json
from numpy.testing import assert_allclose, assert_array_equal
from refusals import refused, told
from safetensors.numpy import load_file, save_file

import lorafusion_jax as lf
from lorafusion_jax import cli, crossbar, hardware
from lorafusion_jax.crossbar import Independent, save_config
from lorafusion_jax.hardware.texts import answered, load_base
from lorafusion_jax.support.writing import locked
from lorafusion_jax.tasks import IGNORED, decode
from lorafusion_jax.trials import read_lines

# Values and outputs alone are in arrays: every kind of matrix takes time to compile.
_DIGITAL = ("*.mlp.*", "*.[qk]_proj")
_TEXT = "the cold bold gold is old and the tall wall is small. " * 60


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, a configuration with programming errors, a text, and the corrections of two chips."""
    home = tmp_path_factory.mktemp("restored")
    small_llama.make(home / "base")
    noisy = crossbar.load_config("ideal")
    noisy = replace(noisy, device=crossbar.Device(programming=Independent(0.05)))
    save_config(noisy, home / "noisy.yaml")
    (home / "page.txt").write_text(_TEXT)
    hardware.restore_chips(
        _options(
            home,
            out=home / "restored",
            chip=(0, 2),
            epochs=2,
            method="low-rank",
            rank=2.0,
        )
    )
    return home


def _options(home, **changed):
    given = {
        "base": str(home / "base"),
        "crossbar": str(home / "noisy.yaml"),
        "text": (home / "page.txt",),
        "keep_digital": _DIGITAL,
    }
    return hardware.RestoreOptions(**given | changed)


@pytest.fixture(scope="module")
def loaded(home):
    return load_base(str(home / "base"))


@pytest.fixture(scope="module")
def chips(home):
    return hardware.load_chips(str(home / "noisy.yaml"), digital=_DIGITAL)


@pytest.fixture(scope="module")
def digest(home):
    return lf.io.open_base(str(home / "base")).digest


@pytest.fixture(scope="module")
def ids(loaded):
    return loaded.tokenizer(_TEXT, add_special_tokens=False)["input_ids"]


def _on_chip(loaded, chips, number, *at, restored=None):
    """The base's weights as a chip has them, at an age, with corrections."""
    return hardware.program_on_arrays(
        loaded.problem.graph,
        loaded.problem.frozen,
        chips.rules(*at),
        chips.chip_key(number),
        restored=restored,
    ).base


def test_restoring_brings_the_chips_closer_to_the_digital_model(home):
    for number in (0, 2):
        manifest = read_json(home / "restored" / f"chip_{number}" / "manifest.json")
        before, after = manifest["metadata"]["divergence"]
        assert after < 0.5 * before


@pytest.mark.long
def test_loaded_corrections_are_on_the_chips_bit_by_bit(
    home, loaded, chips, digest, ids
):
    digital = loaded.problem.frozen.base
    run = hardware.logits_of_base(loaded.problem.graph)
    batches = hardware.windows(loaded, ids)
    train = batches[: -max(1, len(batches) // 8)]
    weights = _on_chip(loaded, chips, 2)
    numbers = 2 * crossbar.numbers_per_rank(crossbar.chips_in(weights))
    how = lf.Restoring(method="low-rank", numbers=numbers, epochs=2)
    targets = [run(digital, batch) for batch in train]
    found = lf.restore(
        run, weights, hardware.digital_matrices(loaded, weights), train, targets, how
    )
    (of_disk,) = hardware.load_restored(str(home / "restored"), chips, [2], digest)
    for site, correction in found.items():
        of_site = of_disk.corrections[site]
        assert_allclose(of_site.scale, correction.scale, rtol=1e-4)
        assert_allclose(of_site.U @ of_site.V, correction.U @ correction.V, atol=1e-4)
    restored = run(_on_chip(loaded, chips, 2, restored=of_disk), batches[0])
    assert_array_equal(restored, run(of_disk.on(weights), batches[0]))
    target = run(digital, batches[0])
    assert hardware.divergence(restored, target) < hardware.divergence(
        run(weights, batches[0]), target
    )


def test_windows_of_text_begin_with_the_token_that_the_model_expects_before_a_text(
    loaded, ids
):
    rows = [
        np.concatenate([batch.input_ids[0], batch.labels[0]])
        for batch in hardware.windows(loaded, ids)
    ]
    assert {len(row) for row in rows} == {128}
    assert {row[0] for row in rows} == {loaded.tokenizer.bos_token_id}
    assert_array_equal(
        np.concatenate([row[1:] for row in rows]), ids[: 127 * len(rows)]
    )
    assert (
        len(hardware.sampled(loaded, 200, 0)) == 2 * 127
    )  # rows that fill a window each, without that token


def test_a_text_on_which_the_tokenizer_panics_is_a_fault_of_the_base(home, tmp_path):
    base = shutil.copytree(home / "base", tmp_path / "base")
    content = read_json(base / "tokenizer.json")
    write_json(
        base / "tokenizer.json",
        content | {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    )
    with refused(f"the tokenizer of {base} rejects a text .it panics: .*non-zero"):
        hardware.restore_chips(_options(home, base=str(base), out=tmp_path / "out"))


def test_outputs_are_computed_where_they_are_read():
    calls = []

    def run(weights, batch):
        calls.append(batch)
        return weights * batch

    outputs = hardware.Outputs(run, 2, [1, 3, 5])
    assert (len(outputs), calls) == (3, [])
    assert (outputs[1], [*outputs], calls) == (6, [2, 6, 10], [3, 1, 3, 5])


def test_an_encoder_decoder_reads_lines_and_answers_them_itself(home, tmp_path):
    base, _ = one_block.cut(tmp_path, adapters=1)
    rows = read_lines(one_block.SMALL / "tasks" / "double_digit" / "train.jsonl")
    lines = [row["context"] for row in rows[:32]]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    options = _options(
        home,
        base=str(base),
        text=(tmp_path / "lines.txt",),
        out=tmp_path / "restored",
        keep_digital=("head", "*.ff.*", "*.[qko]"),
    )
    (tmp_path / "few.txt").write_text("\n".join(lines[:16]))
    for changed, found in (
        ({"tokens": 100}, 32),
        ({"text": (tmp_path / "few.txt",)}, 16),
    ):
        with refused(
            f"text has {found} lines: give more than 16 lines with --text, without"
        ):
            hardware.restore_chips(replace(options, **changed))
    manifests = hardware.restore_chips(replace(options, epochs=2))
    before, after = manifests[0]["divergence"]
    assert after < before
    # Answers are shorter than the batch is wide; only their tokens count.
    loaded = load_base(str(base))
    (batch,) = answered(loaded, lines[::8])  # the text that is left out
    chips = hardware.load_chips(str(home / "noisy.yaml"), digital=options.keep_digital)

    def log_probabilities(weights):
        logits = hardware.logits_of_base(loaded.problem.graph)(weights, batch)
        return np.asarray(jax.nn.log_softmax(logits), float)[batch.labels != IGNORED]

    on_chip = log_probabilities(_on_chip(loaded, chips, 0))
    wanted = log_probabilities(loaded.problem.frozen.base)
    assert before == pytest.approx(
        np.mean(np.sum(np.exp(wanted) * (wanted - on_chip), axis=1)), rel=1e-2
    )


def test_corrections_of_other_chips_are_refused_by_name(home, chips, digest):
    restored = str(home / "restored")
    ideal = replace(chips, config=crossbar.load_config("ideal"))
    other_key = replace(chips, key=jax.random.key(3))
    for folder, of_chips, number, base, message in (
        (restored, ideal, 0, digest, "with another configuration"),
        (restored, other_key, 0, digest, "with another key"),
        (restored, chips, 0, "0" * 64, "with another base model"),
        (restored, chips, 1, digest, "corrects 0, 2, not chip 1: run `lorafusion res"),
        ("nowhere", chips, 0, digest, "nowhere has no corrections of a chip: give a"),
    ):
        with refused(message):
            hardware.load_restored(folder, of_chips, [number], base)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": -1}, "epochs is -1: expected at least 0"),
        ({"rate": float("nan")}, "rate is nan: expected a finite number"),
        ({"tokens": 200}, "the text has 200 tokens: give at least two windows of 128"),
        ({"chip": ()}, "chips is 0: expected at least 1"),
        (
            {"out": Path(__file__)},
            "test_restored.py is a file: give a folder with --out",
        ),
        (
            {"rank": 4.0},
            "--rank: without effect on the method scales: leave it out, or choose another one",
        ),
        (
            {"method": "offsets", "rate_low_rank": 0.1},
            "--rate-low-rank: without effect on the method offsets",
        ),
        ({"method": "lora", "rate": 0.1}, "--rate: without effect on the method lora"),
        (
            {"method": "low-rank", "rank": float("inf")},
            "rank is inf: expected a finite number above 0",
        ),
        (
            {"method": "low-rank", "rank": 0.0},
            "rank is 0.0: expected a finite number above 0",
        ),
        (
            {"method": "lora", "epochs": 0},
            "lora starts as zeros and has no closed form: give 1 epoch or more",
        ),
        (
            {"method": "lora", "rank": 0.5},
            "less than one rank for each matrix: give at least",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(home, tmp_path, changed, message):
    with refused(message):
        hardware.restore_chips(
            _options(home, **{"out": tmp_path / "restored"} | changed)
        )
    assert not list((tmp_path / "restored").glob("chip_*"))


def test_an_unknown_kind_of_corrections_is_refused():
    how = lf.Restoring()
    object.__setattr__(
        how, "method", "offset"
    )  # which the type checks of the tests refuse in a constructor
    with refused("method is 'offset': expected one of scales, offsets, low-rank, lora"):
        how.__post_init__()


def test_the_command_prints_the_divergence_and_never_overwrites(home, tmp_path, capsys):
    digital = f"--keep-digital {' '.join(_DIGITAL)}"
    command = (
        f"restore --base {home / 'base'} --crossbar {home / 'noisy.yaml'} {digital}"
        f" --tokens 256 --epochs 1 --out {tmp_path / 'restored'}"
    )
    cli.main(command.split())
    printed = capsys.readouterr().out
    assert (
        "digital parameters a chip" in printed
        and "KL from the digital model" in printed
    )
    message = "another rate (0.01, now 0.02): give another --out; corrections are never"
    assert message in told(capsys, f"{command} --rate 0.02".split())


def test_chips_that_are_finished_are_not_computed_again(home, tmp_path):
    options = _options(home, chip=(1,), out=tmp_path / "restored", epochs=1)
    first = hardware.restore_chips(options)
    times = {
        path: path.stat().st_mtime_ns for path in options.out.rglob("*.safetensors")
    }
    both = hardware.restore_chips(replace(options, chip=(0, 1)))
    assert list(both) == [0, 1] and both[1] == first[1]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    alone = replace(options, chip=(0,), out=tmp_path / "alone")
    assert both[0] == hardware.restore_chips(alone)[0]
    with refused(r"chip_0 has corrections with another method \(scales, now offsets\)"):
        hardware.restore_chips(replace(options, chip=(2,), method="offsets"))


def test_two_processes_do_not_write_into_one_folder(home, tmp_path):
    with locked(out := tmp_path / "restored", "another --out"):
        with refused(f"restored is in use by process {os.getpid()}: wait for it, or"):
            hardware.restore_chips(_options(home, out=out))
    assert [path.name for path in out.iterdir()] == [".lock"]


def _scale(arrays):
    return next(name for name in arrays if name.endswith("/scale"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: {"loose": a[_scale(a)]},
            "'loose' is other arrays: expected float32 without NaN in scale, offset",
        ),
        (
            lambda a: a | {_scale(a): a[_scale(a)] * np.nan},
            "expected float32 without NaN",
        ),
        (
            lambda a: a | {_scale(a): a[_scale(a)].astype(int)},
            "is other arrays: expected float32",
        ),
        (
            lambda a: a | {_scale(a) + "/deeper": a[_scale(a)]},
            "no tree of arrays",
        ),
        (
            lambda a: {n: x for n, x in a.items() if not n.endswith("/V")},
            r"U \[d_in, r\] with V \[r, d_out\]",
        ),
        (
            lambda a: {n: x[:-1] if n.endswith("/V") else x for n, x in a.items()},
            "expected float32",
        ),
        (
            lambda a: {_scale(a): a[_scale(a)][..., :3]},
            r"has shape \(1, 3\): expected \(1, ",
        ),
        (
            lambda a: {
                _scale(a): a[_scale(a)],
                _scale(a)[:-5] + "limits": np.ones(3, np.float32),
            },
            "limits of .* shape",
        ),
        (
            lambda a: {"elsewhere/scale": a[_scale(a)]},
            "a correction of 'elsewhere': expected one of the chips",
        ),
    ],
)
def test_other_arrays_under_a_right_digest_are_refused(
    home, loaded, chips, digest, tmp_path, change, message
):
    folder = shutil.copytree(
        home / "restored" / "chip_0", tmp_path / "restored" / "chip_0"
    )
    save_file(
        change(load_file(folder / "arrays.safetensors")), folder / "arrays.safetensors"
    )
    manifest = read_json(folder / "manifest.json")
    manifest["files"]["arrays.safetensors"] = hashlib.sha256(
        (folder / "arrays.safetensors").read_bytes()
    ).hexdigest()
    write_json(folder / "manifest.json", manifest)
    with refused(f"{tmp_path / 'restored'}.*{message}"):
        (restored,) = hardware.load_restored(
            str(tmp_path / "restored"), chips, [0], digest
        )
        _on_chip(loaded, chips, 0, restored=restored)


def test_corrections_of_two_chips_are_not_exchanged_nor_mixed(
    home, chips, digest, tmp_path
):
    for number, other in ((0, 2), (2, 0)):
        shutil.copytree(
            home / "restored" / f"chip_{number}",
            tmp_path / "exchanged" / f"chip_{other}",
        )
    message = r"chip_0: chip is 2: expected 0; rename it to chip_2"
    with refused(message):
        hardware.load_restored(str(tmp_path / "exchanged"), chips, [0, 2], digest)
    with refused(message):
        hardware.restore_chips(_options(home, out=tmp_path / "exchanged"))
    shutil.copytree(home / "restored", tmp_path / "mixed")
    file = tmp_path / "mixed" / "chip_2" / "manifest.json"
    file.write_text(file.read_text().replace('"epochs": 2', '"epochs": 3'))
    with refused("chip_2: computed with other settings than chip 0: run `lorafusion"):
        hardware.load_restored(str(tmp_path / "mixed"), chips, [0, 2], digest)


def test_chips_whose_pool_stays_digital_are_restored(home, tmp_path):
    digital = ("pool.*", *_DIGITAL)
    options = _options(home, keep_digital=digital, epochs=0, out=tmp_path / "restored")
    assert hardware.restore_chips(options)[0]["settings"]["digital"] == [*digital]


def test_corrections_made_in_advance_help_a_chip_that_drifts_otherwise(
    home, loaded, digest, ids, tmp_path
):
    drifting = crossbar.load_config("ideal")
    drifting = replace(
        drifting, device=crossbar.Device(drift=crossbar.PowerLaw(0.05, 0.02))
    )
    save_config(drifting, tmp_path / "drifting.yaml")
    early = _options(
        home,
        crossbar=str(tmp_path / "drifting.yaml"),
        epochs=0,
        in_advance=True,
        out=tmp_path / "early",
    )
    with refused("in advance for an age of chips that drift: give --age"):
        hardware.restore_chips(early)
    chips = hardware.load_chips(early.crossbar, digital=_DIGITAL)
    run = hardware.logits_of_base(loaded.problem.graph)
    aged_chip = _on_chip(loaded, chips, 0, hardware.aged(chips.config, "1year"))
    batch = hardware.windows(loaded, ids)[0]
    target = run(loaded.problem.frozen.base, batch)
    off = [hardware.divergence(run(aged_chip, batch), target)]
    for in_advance in (True, False):
        out = tmp_path / f"{in_advance}"
        hardware.restore_chips(
            replace(early, age="1year", in_advance=in_advance, out=out)
        )
        (restored,) = hardware.load_restored(str(out), chips, [0], digest)
        off.append(hardware.divergence(run(restored.on(aged_chip), batch), target))
    assert off[2] < off[1] < 0.8 * off[0]


def test_generate_answers_on_the_restored_chip(
    home, loaded, chips, digest, tmp_path, capsys
):
    (tmp_path / "lines.txt").write_text("the cold bold\nuser assistant\n")
    digital = f"--keep-digital {' '.join(_DIGITAL)}"
    chip = f"--crossbar {home / 'noisy.yaml'} --chip 2 {digital} --restore"
    command = f"generate --base {home / 'base'} --max-new-tokens 6 {chip}"
    cli.main(f"{command} {home / 'restored'} --file {tmp_path / 'lines.txt'}".split())
    printed = capsys.readouterr().out.splitlines()
    (restored,) = hardware.load_restored(str(home / "restored"), chips, [2], digest)
    weights = _on_chip(loaded, chips, 2)
    model = nnx.merge(loaded.problem.graph, restored.on(weights))
    ids = jnp.array(loaded.tokenizer.encode("the cold bold")[:-1])[
        None
    ]  # without the token that ends a text
    wanted = lf.generate(model, ids, jnp.ones_like(ids, bool), max_new_tokens=6)
    (said,) = decode(loaded.tokenizer, np.asarray(wanted), loaded.text_format)
    assert printed[0] == said and len(printed) == 2
    # The text is read before the chip is loaded.
    missing = f"{command} nowhere --file {tmp_path / 'missing.txt'}"
    assert "missing.txt" in told(capsys, missing.split())
