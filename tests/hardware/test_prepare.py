"""A base that is prepared for arrays: its folder, and commands that take it."""

import contextlib
import io
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
import small_llama
import tiny
from flax import nnx
from refusals import refused

import lorafusion_jax as lf
from lorafusion_jax import crossbar, hardware, runs
from lorafusion_jax.cli import main
from lorafusion_jax.hardware.chips import calibration_batches, logits_of
from lorafusion_jax.hardware.texts import load_base
from lorafusion_jax.models import matrices
from lorafusion_jax.models.architecture import sharing_inputs

NOISY = crossbar.CrossbarConfig(
    mapping=crossbar.Mapping(scale="column"),
    device=crossbar.Device(programming=crossbar.Independent(0.05)),
)
DIGITAL = ("head", "*.ff.wi*")
# Values alone are written to chips: every kind of matrix takes time to compile.
NOT_WRITTEN = ("head", "*.ff.*", "*.[qko]")
# Rows of the task of several lengths, and more than a batch has, so that there is padding.
_ROWS = [
    json.loads(row)["context"]
    for row in (recipes.TASK / "train.jsonl").read_text().splitlines()
]
LINES = "\n".join(_ROWS[:20])


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """A folder with preparations of the small base, its configuration, its text, and what the command printed."""
    folder = tmp_path_factory.mktemp("prepare")
    crossbar.save_config(NOISY, folder / "noisy.yaml")
    (folder / "lines.txt").write_text(LINES)
    where = (
        f"--base {small[0]} --text {folder / 'lines.txt'} --out {folder / 'prepared'}"
    )
    noisy = f"--crossbar {folder / 'noisy.yaml'} --keep-digital {' '.join(DIGITAL)}"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(f"crossbar prepare {where} {noisy}".split())
    (folder / "printed").write_text(printed.getvalue())
    return folder


@pytest.fixture(scope="module")
def fused(small, folder):
    lf.fuse(options := recipes.small_run(small, folder / "runs", name="digital"))
    return options


def _options(small, folder, **changes):
    own = {
        "crossbar": str(folder / "noisy.yaml"),
        "text": (folder / "lines.txt",),
        "out": folder / "new",
    }
    return hardware.PrepareOptions(base=str(small[0]), **own | changes)


def test_factors_follow_from_the_models_inputs(small, folder):
    """The queries, keys and values of the encoder meet the embeddings after its first norm."""
    loaded = load_base(str(small[0]))
    model = nnx.merge(loaded.problem.graph, loaded.problem.frozen.base)
    tokens = np.concatenate(loaded.tokenizer(LINES.splitlines())["input_ids"])
    embedded = np.asarray(model.embedding.get_value())[tokens]
    scale = np.asarray(model.encoder.self_norm.scale.get_value())[0]
    normed = (
        embedded
        / np.sqrt(np.mean(embedded**2, axis=-1, keepdims=True) + model.config.eps)
        * scale
    )
    prepared = hardware.load_chips(str(folder / "prepared")).prepared.of_sites
    factors = {name: prepared[f"encoder.self.{name}"].factors for name in "qko"}
    np.testing.assert_array_equal(factors["q"], factors["k"])
    assert not np.array_equal(factors["q"], factors["o"])
    sums = sum(
        np.sum(np.square(lf.kernels(model)[f"encoder.self.{name}"][0]), axis=-1)
        for name in "qkv"
    )
    squares = np.asarray(factors["q"][0]) ** 4 * sums
    expected = np.mean(normed**2, axis=0)
    np.testing.assert_allclose(
        squares / squares.mean(), expected / expected.mean(), rtol=2e-3
    )


def test_outputs_on_prepared_chips_are_closer_to_the_digital_ones(folder, fused):
    setup, _, params = runs.load_to_evaluate(
        runs.EvaluateOptions(run=runs.run_path(fused))
    )
    setup = setup.with_layers(unroll=False)
    prepared = hardware.load_chips(str(folder / "prepared"))
    graph = setup.problem.graph
    method = setup.problem.method
    digital = setup.problem.frozen
    frozen = prepared.checked(setup).problem.frozen
    batch = jax.tree.map(jnp.asarray, next(calibration_batches(setup, params, 8)))
    expected = logits_of(graph, method)(digital, batch)

    def error(frozen, config):
        on_arrays = hardware.program_on_arrays(
            graph, frozen, {"*.ff.wo": config}, jax.random.key(0)
        )
        return float(
            jnp.mean(jnp.square(logits_of(graph, method)(on_arrays, batch) - expected))
        )

    mapping = replace(prepared.config.mapping, weight_bits=None)
    exact = crossbar.CrossbarConfig(
        cell=crossbar.Cell(bits=None), mapping=mapping, dac=None
    )
    unclipped = {
        name: replace(one, ranges=None) for name, one in frozen.preparations.items()
    }
    assert error(replace(frozen, preparations=unclipped), exact) < 1e-6
    assert error(frozen, prepared.config) < 0.8 * error(digital, NOISY)


@pytest.mark.long
def test_programmed_chips_keep_their_preparation(small, folder, fused):
    out = folder / "chips.json"
    prepared = str(folder / "prepared")
    base, pool = map(str, small)
    hardware.write_chips(
        hardware.ProgramOptions(
            base=base,
            pool=pool,
            out=out,
            crossbar=prepared,
            keep_digital=NOT_WRITTEN,
            chip_key=3,
        )
    )

    def losses(**chips):
        options = hardware.EvaluateOnChipsOptions(run=runs.run_path(fused), **chips)
        return [row["loss"] for row in hardware.evaluate_on_chips(options)["rows"]]

    drawn = losses(crossbar=prepared, keep_digital=NOT_WRITTEN, chip_key=3)
    assert losses(crossbar=str(out)) == drawn
    chips = hardware.load_chips(str(out))
    assert chips.sha256 != crossbar.config_hash(chips.config)


@pytest.mark.long
def test_corrections_belong_to_a_preparation(small, folder):
    options = hardware.RestoreOptions(
        base=str(small[0]),
        text=(folder / "lines.txt",),
        epochs=1,
        out=folder / "restored",
        crossbar=str(folder / "prepared"),
        keep_digital=NOT_WRITTEN,
    )
    settings = hardware.restore_chips(options)[0]["settings"]
    assert settings["rate"] == 0.0015
    plain = hardware.load_chips(str(folder / "noisy.yaml"), digital=NOT_WRITTEN)
    prepared = hardware.load_chips(options.crossbar, digital=NOT_WRITTEN)
    hardware.load_restored(str(options.out), prepared, [0], settings["base_sha256"])
    with refused("another configuration or preparation"):
        hardware.load_restored(str(options.out), plain, [0], settings["base_sha256"])


def test_the_command_prints_what_it_gains(folder):
    lines = (folder / "printed").read_text().splitlines()
    (query,) = [line.split() for line in lines if line.startswith("encoder.self.q")]
    assert float(query[2]) < 0.95 * float(query[1])
    chips = hardware.load_chips(str(folder / "prepared"))
    assert chips.digital == DIGITAL
    assert not [name for name in chips.prepared.of_sites if ".ff.wi" in name]


def test_a_causal_model_needs_a_window_of_text(folder, tmp_path):
    small_llama.make(tmp_path / "base")
    with refused("the text has 100 tokens: give at least a window of 128"):
        hardware.prepare(_options((tmp_path / "base",), folder, tokens=100))


def test_wrong_preparations_are_refused(small, folder, tmp_path):
    matrix = tmp_path / "matrix.yaml"
    crossbar.save_config(crossbar.CrossbarConfig(device=NOISY.device), matrix)
    (tmp_path / "empty.txt").write_text("")
    for changes, message in (
        ({"out": folder / "prepared"}, "exists: give another --out"),
        ({"crossbar": str(matrix)}, "set it to column"),
        ({"text": (tmp_path / "empty.txt",)}, "the text has 0 lines: give at least"),
        ({"keep_digital": ("*",)}, "leave none for arrays: name fewer"),
    ):
        with refused(message):
            hardware.prepare(_options(small, folder, **changes))
    assert not (folder / "new").exists()
    with refused("prepares another base model"):
        hardware.load_chips(str(folder / "prepared")).prepared.check("0" * 64, {})
    changed = shutil.copytree(folder / "prepared", tmp_path / "changed")
    sound, manifest = lf.io.load_arrays(changed / "preparations", "preparation")
    loaded = load_base(str(small[0]))
    ranges = {"ranges": np.ones((1, 96), np.float32)}
    shutil.rmtree(changed / "preparations")
    tree = sound | {"encoder.self.q": sound["encoder.self.q"] | ranges}
    lf.io.save_arrays(changed / "preparations", "preparation", tree, manifest)
    with refused("encoder.self.q' is arrays with another identity"):
        hardware.load_chips(str(changed)).checked(loaded)
    crossbar.save_config(NOISY, changed / "config.yaml")
    with refused("not the configuration that the base was prepared for"):
        hardware.load_chips(str(changed))
    config = folder / "prepared" / "config.yaml"
    with refused("need a preparation"):
        rules = {"*": crossbar.load_config(config)}
        hardware.program_on_arrays(
            loaded.problem.graph, loaded.problem.frozen, rules, jax.random.key(0)
        )
    with refused(
        "run `lorafusion crossbar prepare --crossbar .*config.yaml` with text"
    ):
        hardware.load_chips(str(config)).checked(loaded)


def test_an_input_that_several_matrices_meet_is_transformed_once():
    """The 7 matrices of an encoder's layer have 4 inputs: queries, keys and values share one, and so do gates."""
    graph, base = nnx.split(tiny.t5())
    config = crossbar.CrossbarConfig(
        mapping=crossbar.Mapping(factors=True, transform="hadamard")
    )
    weights = matrices(nnx.merge(graph, base))
    found = {}
    for names in sharing_inputs(
        tiny.CONFIG.sites, [name for name in weights if name.startswith("encoder.")]
    ):
        found |= crossbar.prepare({name: weights[name] for name in names}, None, config)
    frozen = lf.Frozen(base, preparations=found)
    on_arrays = hardware.program_on_arrays(
        graph, frozen, {"encoder.*": config}, jax.random.key(0)
    )
    program, _ = tiny.compiled(
        hardware.logits_of_base(graph), on_arrays.base, tiny.batch()
    )
    products_of_attention = 2 * 3
    assert program.as_text().count(" dot(") == len(weights) + products_of_attention + 4
