"""The scripts of examples/ run, with settings that make them small."""

import importlib.util

import bbh_rows
import byte_base
import jax
import one_block
import pytest

import lorafusion_jax as lf
from lorafusion_jax.methods import METHODS
from lorafusion_jax.tasks import write_lorahub_split

# The settings that the README's run has in tests, whose compiled programs are then there already.
_LIKE_THE_README = {
    "task": str(one_block.SMALL / "tasks" / "pairswap_numvow"),
    "recipe": lf.FusionRecipe(modules=4, epochs=1),
    "seeds": (1, 2),
    "train_rows": 20,
    "test_rows": 4,
}
_RECIPE = lf.FusionRecipe(modules=3, epochs=1, batch_size=50, max_new_tokens=8)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Return a function from the name of a script to its module; its base and adapters are cut to one block."""
    folder = one_block.examples(tmp_path_factory.mktemp("cut"))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.long
def test_fuse_in_python_trains_and_answers(example):
    assert 0 <= example("fuse_in_python").main(epochs=1, test_rows=4) <= 1


@pytest.mark.nightly
def test_chips_evaluates_digital_numbers_on_two_chips_and_trains_on_one(
    example, tmp_path
):
    digital = ("decoder.*", "*.ff.*", "encoder.self.[kvo]", "pool.*")
    scores = example("chips").main(tmp_path, digital, **_LIKE_THE_README)
    assert len(scores) == 1 + 2 * 2 + 1


@pytest.mark.nightly
def test_the_paper_is_run_from_adapters_to_exports(example, tmp_path):
    base = byte_base.make(tmp_path / "base", one_block.cut(tmp_path / "small")[0])
    adapters = sorted(map(str, (tmp_path / "small" / "pool").iterdir()))
    rows, index = bbh_rows.write(tmp_path / "rows")
    write_lorahub_split(rows, tmp_path / "data_bbh", index=index)
    small = (
        "--modules",
        "2",
        "--epochs",
        "1",
        "--test-rows",
        "4",
        "--methods",
        "zero-shot",
        "LoRAFusion",
    )
    out = tmp_path / "out"
    example("paper").main(
        tmp_path / "data_bbh",
        str(base),
        tuple(adapters),
        out,
        ("boolean_expressions",),
        (1, 2),
        small,
    )
    assert (out / "report" / "report.html").is_file()
    assert (out / "adapters" / "boolean_expressions" / "adapter_config.json").is_file()


@pytest.mark.nightly
def test_sweep_on_a_mesh_trains_every_seed(example, tmp_path):
    results = example("sweep_on_a_mesh").main(tmp_path, recipe=_RECIPE, test_rows=4)
    assert [seed["seed"] for seed in results.seeds] == [1, 2, 3, 4]


@pytest.mark.long
def test_a_prepared_flax_model_keeps_its_accuracy_on_crossbars(example):
    with jax.numpy_dtype_promotion("standard"):  # optax's
        accuracy = example("crossbar_on_your_model").main(bits=(8,), steps=60)
    assert (
        accuracy["8-bit ADC"]
        < accuracy["8-bit ADC, prepared"]
        > accuracy["digital"] - 0.08
    )


@pytest.mark.nightly
def test_a_method_of_ones_own_is_registered_and_run(example, tmp_path):
    try:
        scores = example("your_own_method").main(
            tmp_path, **_LIKE_THE_README | {"recipe": lf.Recipe(epochs=1)}
        )
    finally:
        METHODS.pop("gains", None)
    assert set(scores) == {"zero-shot", "gains", "magnitudes"}


@pytest.mark.long
def test_an_experiment_of_ones_own_ends_in_a_table(example, tmp_path):
    small = _LIKE_THE_README | {"recipe": lf.Recipe(epochs=1)}
    printed = example("own_experiment").main(tmp_path, ("zero-shot", "fusion"), **small)
    head, _, base, fused = printed.splitlines()
    assert "exact match, %" in head and "zero-shot" in base and "fusion" in fused
