"""A base that is prepared for arrays: its folder, and commands that take it."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
import tiny
from flax import nnx

import lorafusion_jax as lf
from lorafusion_jax import crossbar
from lorafusion_jax.cli import main
from lorafusion_jax.hardware.chips import calibration_batches, logits_of
from lorafusion_jax.models import matrices
from lorafusion_jax.models.architecture import sharing_inputs

NOISY = crossbar.CrossbarConfig(
    mapping=crossbar.Mapping(scale="column"),
    device=crossbar.Device(programming=crossbar.Independent(0.05)),
)
DIGITAL = ("head", "*.ff.*")
# Rows of the task of several lengths, and more than a batch has, so that there is padding.
_ROWS = [
    json.loads(row)["context"]
    for row in (recipes.TASK / "train.jsonl").read_text().splitlines()
]
LINES = "\n".join(_ROWS[:20])


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """A folder with preparations of the small base, its configuration and its text."""
    folder = tmp_path_factory.mktemp("prepare")
    crossbar.save_config(NOISY, folder / "noisy.yaml")
    (folder / "lines.txt").write_text(LINES)
    lf.hardware.prepare(_options(small, folder))
    return folder


@pytest.fixture(scope="module")
def fused(small, folder):
    lf.fuse(options := recipes.small_run(small, folder / "runs", name="digital"))
    return options


def _options(small, folder, **changes):
    own = {
        "crossbar": str(folder / "noisy.yaml"),
        "text": (folder / "lines.txt",),
        "out": folder / "prepared",
    }
    return lf.hardware.PrepareOptions(base=str(small[0]), **own | changes)


def test_factors_follow_from_the_models_inputs(small, folder):
    """The queries, keys and values of the encoder meet the embeddings after its first norm."""
    loaded = lf.loading.load_model(
        lf.LoadOptions(base=str(small[0]), method="zero-shot")
    )
    model = nnx.merge(loaded.problem.graph, loaded.problem.frozen.base)
    tokens = np.concatenate(loaded.tokenizer(LINES.splitlines())["input_ids"])
    embedded = np.asarray(model.embedding.get_value())[tokens]
    scale = np.asarray(model.encoder.self_norm.scale.get_value())[0]
    normed = (
        embedded
        / np.sqrt(np.mean(embedded**2, axis=-1, keepdims=True) + model.config.eps)
        * scale
    )
    prepared = lf.hardware.load_chips(str(folder / "prepared")).prepared.of_sites
    q = prepared["encoder.self.q"]
    k = prepared["encoder.self.k"]
    o = prepared["encoder.self.o"]
    np.testing.assert_array_equal(q.factors, k.factors)
    assert not np.array_equal(q.factors, o.factors)
    sums = sum(
        np.sum(np.square(lf.kernels(model)[f"encoder.self.{name}"][0]), axis=-1)
        for name in "qkv"
    )
    squares = np.asarray(q.factors[0]) ** 4 * sums
    expected = np.mean(normed**2, axis=0)
    np.testing.assert_allclose(
        squares / squares.mean(), expected / expected.mean(), rtol=2e-3
    )


def test_outputs_on_prepared_chips_are_closer_to_the_digital_ones(folder, fused):
    setup, _, params = lf.runs.load_to_evaluate(
        lf.runs.EvaluateOptions(run=lf.runs.run_path(fused))
    )
    setup = setup.with_layers(unroll=False)
    prepared = lf.hardware.load_chips(str(folder / "prepared"))
    graph = setup.problem.graph
    method = setup.problem.method
    digital = setup.problem.frozen
    frozen = prepared.checked(setup).problem.frozen
    batch = jax.tree.map(jnp.asarray, next(calibration_batches(setup, params, 8)))
    expected = logits_of(graph, method)(digital, batch)

    def error(frozen, config):
        on_arrays = lf.hardware.program_on_arrays(
            graph, frozen, {"*.ff.wo": config}, jax.random.key(0)
        )
        return float(
            jnp.mean(jnp.square(logits_of(graph, method)(on_arrays, batch) - expected))
        )

    mapping = dataclasses.replace(prepared.config.mapping, weight_bits=None)
    exact = crossbar.CrossbarConfig(
        cell=crossbar.Cell(bits=None), mapping=mapping, dac=None
    )
    unclipped = {
        name: dataclasses.replace(one, ranges=None)
        for name, one in frozen.preparations.items()
    }
    assert error(dataclasses.replace(frozen, preparations=unclipped), exact) < 1e-6
    assert error(frozen, prepared.config) < 0.8 * error(digital, NOISY)


@pytest.mark.long
def test_programmed_chips_keep_their_preparation(small, folder, fused):
    out = folder / "chips.json"
    lf.hardware.write_chips(
        lf.hardware.ProgramOptions(
            base=str(small[0]),
            pool=str(small[1]),
            out=out,
            crossbar=str(folder / "prepared"),
            keep_digital=DIGITAL,
            chip_key=3,
        )
    )
    run = lf.runs.run_path(fused)
    written = lf.hardware.evaluate_on_chips(
        lf.hardware.EvaluateOnChipsOptions(run=run, crossbar=str(out))
    )["rows"]
    drawn = lf.hardware.evaluate_on_chips(
        lf.hardware.EvaluateOnChipsOptions(
            run=run, crossbar=str(folder / "prepared"), keep_digital=DIGITAL, chip_key=3
        )
    )["rows"]
    assert [row["loss"] for row in written] == [row["loss"] for row in drawn]
    assert lf.hardware.load_chips(str(out)).sha256 != crossbar.config_hash(
        lf.hardware.load_chips(str(out)).config
    )


@pytest.mark.long
def test_corrections_belong_to_a_preparation(small, folder):
    options = lf.hardware.RestoreOptions(
        base=str(small[0]),
        text=(folder / "lines.txt",),
        epochs=1,
        out=folder / "restored",
        crossbar=str(folder / "prepared"),
        keep_digital=DIGITAL,
    )
    settings = lf.hardware.restore_chips(options)[0]["settings"]
    assert settings["rate"] == 0.0015
    plain = lf.hardware.load_chips(str(folder / "noisy.yaml"), digital=DIGITAL)
    prepared = lf.hardware.load_chips(options.crossbar, digital=DIGITAL)
    lf.hardware.load_restored(str(options.out), prepared, [0], settings["base_sha256"])
    with pytest.raises(ValueError, match="another configuration or preparation"):
        lf.hardware.load_restored(str(options.out), plain, [0], settings["base_sha256"])


def test_the_command_says_what_it_gains(small, folder, capsys):
    out = folder / "again"
    args = [
        "--base",
        str(small[0]),
        "--crossbar",
        str(folder / "noisy.yaml"),
        "--text",
        str(folder / "lines.txt"),
    ]
    args += ["--keep-digital", *DIGITAL]
    main(["crossbar", "prepare", *args, "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    (query,) = [line.split() for line in lines if line.startswith("encoder.self.q")]
    assert float(query[2]) < 0.95 * float(query[1])
    again = lf.hardware.load_chips(str(out))
    identity = again.prepared.of_sites["encoder.self.q"].identity
    assert (
        identity
        == lf.hardware.load_chips(str(folder / "prepared"))
        .prepared.of_sites["encoder.self.q"]
        .identity
    )
    assert again.digital == DIGITAL and not [
        name for name in again.prepared.of_sites if ".ff." in name
    ]


def test_wrong_preparations_are_refused(small, folder, tmp_path):
    with pytest.raises(ValueError, match="exists: give another --out"):
        lf.hardware.prepare(_options(small, folder))
    crossbar.save_config(
        crossbar.CrossbarConfig(device=NOISY.device), tmp_path / "matrix.yaml"
    )
    with pytest.raises(ValueError, match="set it to column"):
        lf.hardware.prepare(
            _options(
                small,
                folder,
                crossbar=str(tmp_path / "matrix.yaml"),
                out=tmp_path / "new",
            )
        )
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="the text has 0 lines: give at least a line"):
        lf.hardware.prepare(
            _options(
                small, folder, text=(tmp_path / "empty.txt",), out=tmp_path / "new"
            )
        )
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="prepares another base model"):
        lf.hardware.load_chips(str(folder / "prepared")).prepared.check("0" * 64, {})
    changed = shutil.copytree(folder / "prepared", tmp_path / "changed")
    sound, manifest = lf.io.load_arrays(changed / "preparations", "preparation")
    loaded = lf.loading.load_model(
        lf.LoadOptions(base=str(small[0]), method="zero-shot")
    )
    for part, values, message in (
        (
            "ranges",
            np.ones((1, 96), np.float32),
            "encoder.self.q' is arrays with another identity",
        ),
    ):
        shutil.rmtree(changed / "preparations")
        tree = sound | {"encoder.self.q": sound["encoder.self.q"] | {part: values}}
        lf.io.save_arrays(changed / "preparations", "preparation", tree, manifest)
        with pytest.raises(ValueError, match=message):
            lf.hardware.load_chips(str(changed)).checked(loaded)
    crossbar.save_config(NOISY, changed / "config.yaml")
    with pytest.raises(
        ValueError, match="not the configuration that the base was prepared for"
    ):
        lf.hardware.load_chips(str(changed))
    config = folder / "prepared" / "config.yaml"
    with pytest.raises(ValueError, match="need a preparation"):
        rules = {"*": crossbar.load_config(config)}
        lf.hardware.program_on_arrays(
            loaded.problem.graph, loaded.problem.frozen, rules, jax.random.key(0)
        )
    with pytest.raises(
        ValueError,
        match="run `lorafusion crossbar prepare --crossbar .*config.yaml` with text",
    ):
        lf.hardware.load_chips(str(config)).checked(loaded)
    with pytest.raises(ValueError, match="leave none for arrays: name fewer"):
        lf.hardware.prepare(
            _options(small, folder, keep_digital=("*",), out=tmp_path / "new")
        )


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
    on_arrays = lf.hardware.program_on_arrays(
        graph, frozen, {"encoder.*": config}, jax.random.key(0)
    )
    program, _ = tiny.compiled(
        lf.hardware.logits_of_base(graph), on_arrays.base, tiny.batch()
    )
    products_of_attention = 2 * 3
    assert program.as_text().count(" dot(") == len(weights) + products_of_attention + 4
