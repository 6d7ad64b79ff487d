"""What a new family gets from the protocol alone: a tiny second one goes through every command.

`second_family.py` describes it; nothing else names its stacks or its sites. It is registered for this file only.
"""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
from flax import nnx
from safetensors.numpy import load_file, save_file
from second_family import FAMILY, Pair, PairConfig

from lorafusion_jax._fuse import fuse
from lorafusion_jax.adapters.coefficients import column_names
from lorafusion_jax.crossbar import PRESETS as ARRAYS
from lorafusion_jax.estimates.bill.activity import activities
from lorafusion_jax.estimates.bill.bill import bills
from lorafusion_jax.estimates.bill.options import CostOptions
from lorafusion_jax.estimates.estimate import Settings
from lorafusion_jax.estimates.flops import Shape, Update, forward_flops
from lorafusion_jax.estimates.memory import weights_bytes
from lorafusion_jax.estimates.params import counts
from lorafusion_jax.estimates.plan import plan
from lorafusion_jax.estimates.workload import uniform
from lorafusion_jax.hardware.evaluate import EvaluateOnChipsOptions
from lorafusion_jax.hardware.report import report_on_chips
from lorafusion_jax.hardware.write import ProgramOptions, write_chips
from lorafusion_jax.io.convert import ConvertOptions, convert
from lorafusion_jax.io.hf import load_base, save_base
from lorafusion_jax.io.pool import load_pool, read_pool
from lorafusion_jax.methods.fusion import FusionRecipe
from lorafusion_jax.models.architecture import kernels, linear_shapes, places
from lorafusion_jax.models.generate import generate
from lorafusion_jax.models.registry import FAMILIES
from lorafusion_jax.runs.export import ExportOptions, export
from lorafusion_jax.runs.prepare import prepare
from lorafusion_jax.runs.run import load_run
from lorafusion_jax.training.mesh import partition, rules

_SMALL = Path(__file__).resolve().parent.parent / "examples" / "small"
_CONFIG = PairConfig(vocab_size=66, d_model=8, d_ff=12, reader_layers=2, writer_layers=3)
_ADAPTED = ("reader.mix.up", "writer.talk.query", "writer.mix.down")
_RANK = 2


@pytest.fixture(autouse=True, scope="module")
def _registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, FAMILY.name, FAMILY)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with random weights and the embedded base's tokenizer, which has 66 tokens too."""
    folder = tmp_path_factory.mktemp("second")
    shutil.copytree(_SMALL / "base", folder / "source", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = {"vocab_size": 66, "d_model": 8, "d_ff": 12, "reader_layers": 2, "writer_layers": 3}
    (folder / "source" / "config.json").write_text(json.dumps(sizes | {"model_type": "pair"}))
    save_base(Pair(_CONFIG, rngs=nnx.Rngs(0)), folder / "base", folder / "source")
    return folder / "base"


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> Path:
    """A folder of three PEFT adapters."""
    folder, rng = tmp_path_factory.mktemp("adapters"), np.random.default_rng(0)
    for number in range(3):
        tensors = {}
        for path, (d_in, d_out) in linear_shapes(_CONFIG).items():
            if places(_CONFIG)[path][0] in _ADAPTED:
                for factor, shape in (("lora_A", (_RANK, d_in)), ("lora_B", (d_out, _RANK))):
                    tensors[f"base_model.model.{path}.{factor}.weight"] = rng.standard_normal(shape, np.float32)
        (folder / f"adapter_{number}").mkdir()
        config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 4, "target_modules": ["up", "query", "down"]}
        (folder / f"adapter_{number}" / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / f"adapter_{number}" / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def pool(base, adapters, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "pool"
    convert(ConvertOptions(base=str(base), adapters=tuple(str(a) for a in sorted(adapters.iterdir())), out=out))
    return out


@pytest.fixture(scope="module")
def fused(base, pool, tmp_path_factory):
    """A function from options to a short run's folder: fusion with two seeds on the converted pool."""
    out = tmp_path_factory.mktemp("runs")

    def run(name: str, **options) -> Path:
        recipe = {"modules": 2, "epochs": 1, "batch_size": 32, "max_new_tokens": 4} | options.pop("recipe", {})
        asked = recipes.options(
            recipe,
            **{
                "base": str(base),
                "pool": str(pool),
                "task": str(_SMALL / "tasks" / "double_digit"),
                "seeds": (1, 2),
                "test_rows": 4,
                "out": out,
                "name": name,
            }
            | options,
        )
        fuse(asked)
        return out / name

    return run


@pytest.fixture(scope="module")
def run(fused) -> Path:
    return fused("fusion")


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_saved_base_is_read_back(base):
    tensors = load_file(base / "model.safetensors")
    assert {"tokens.weight", "output.weight", "last.weight", "model.writers.2.talk.back.weight"} <= tensors.keys()
    model, wanted = load_base(base), kernels(Pair(_CONFIG, rngs=nnx.Rngs(0)))
    assert model.config == _CONFIG
    for site, kernel in kernels(model).items():
        np.testing.assert_array_equal(kernel, wanted[site])


def test_generation_follows_the_logits_of_labels():
    """The cache's pass over one token after the other says what all tokens at once do."""
    model = Pair(_CONFIG, rngs=nnx.Rngs(1))
    ids, mask = jnp.array([[5, 6, 7], [8, 9, 0]]), jnp.array([[True, True, True], [True, True, False]])
    said = generate(model, ids, mask, max_new_tokens=5)
    again = jnp.argmax(model.label_logits(ids, mask, said, {}), axis=-1)
    for row, wanted in zip(np.asarray(said), np.asarray(again), strict=True):
        length = int(np.argmax(row == 1)) + 1 if (row == 1).any() else len(row)
        np.testing.assert_array_equal(row[:length], wanted[:length])


def test_a_converted_pool_is_the_adapters(pool, adapters):
    manifest = json.loads((pool / "manifest.json").read_text())
    assert manifest["base"]["family"] == "pair"
    loaded, folders = load_pool(pool), sorted(adapters.iterdir())
    straight = read_pool([str(folder) for folder in folders], _CONFIG)
    assert list(loaded.A) == list(loaded.sites) == list(_ADAPTED)
    for site in _ADAPTED:
        np.testing.assert_array_equal(loaded.A[site], straight.A[site])
        np.testing.assert_array_equal(loaded.B[site], straight.B[site])
    file = _tensors(folders[1])
    a, b = (file[f"base_model.model.model.writers.2.talk.query.lora_{factor}.weight"] for factor in "AB")
    np.testing.assert_array_equal(loaded.A["writer.talk.query"][2, 1], a.T)
    np.testing.assert_array_equal(loaded.B["writer.talk.query"][2, 1], 2 * b.T)


def test_coefficients_have_a_column_for_each_block_and_site(pool):
    loaded = load_pool(pool)
    assert column_names(loaded, "block") == ["reader.0", "reader.1", "writer.0", "writer.1", "writer.2"]
    writers = [f"writer.{layer}.{site}" for layer in range(3) for site in ("talk.query", "mix.down")]
    assert column_names(loaded, "site") == ["reader.0.mix.up", "reader.1.mix.up", *writers]


@pytest.mark.nightly
def test_seeds_are_trained_and_evaluated(run):
    results = json.loads((run / "results.json").read_text())
    # 2 modules x 5 blocks, and a magnitude for each column of the adapted matrices.
    assert results["trainable_by_group"] == {"coefficients": 10, "magnitudes": 2 * 12 + 3 * 8 + 3 * 8}
    assert len(results["seeds"]) == 2
    _, params, _ = load_run(run)
    assert params["coefficients"].shape == (2, 2, 5)


@pytest.mark.long
def test_methods_without_a_pool_adapt_the_family_s_own_choice(fused):
    run = fused("lora", method="lora", pool=None, seeds=(1,), recipe={"lora_rank": 2})
    assert json.loads((run / "config.json").read_text())["options"]["recipe"]["lora_targets"] == ["up", "query"]
    results = json.loads((run / "results.json").read_text())
    wanted = 2 * 2 * (8 + 12) + 3 * 2 * (8 + 12) + 3 * 2 * (8 + 8)
    assert results["trainable"] == wanted == counts(_CONFIG, rank=2, basis=None)["LoRA, rank 2"]


@pytest.mark.nightly
def test_a_mesh_gives_the_numbers_of_one_device(run, fused):
    (_, alone, _), (_, spread, _) = load_run(run), load_run(fused("mesh", mesh="seed=2,model=2"))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_mesh_splits_matrices_as_the_sites_say():
    split = rules(_CONFIG)
    names = {
        "base/writer/mix/down/kernel": ("model", None),
        "base/writer/query/kernel": (None, "model"),
        "base/embedding": ("model", None),
        "base/head": (None, "model"),
        "pool/A/writer.mix.down": ("model", None),
        "pool/A/writer.talk.query": (None, None),
        "pool/B/writer.talk.query": (None, "model"),
        "base/writer/mix/norm/scale": (None, None),
    }
    assert {name: tuple(partition(name, 2, split)) for name in names} == names


@pytest.mark.nightly
def test_chips_hold_every_matrix(base, pool, run, tmp_path):
    manifest = write_chips(ProgramOptions(base=str(base), pool=str(pool), out=tmp_path / "chips", crossbar="isaac"))
    assert list(manifest["modules"]) == ["adapter_0", "adapter_1", "adapter_2"]
    files = {path.stem for path in (tmp_path / "chips" / "chip_0").iterdir()}
    assert files == {*_CONFIG.sites, "head", *(f"pool.{factor}.{site}" for factor in "AB" for site in _ADAPTED)}
    results = report_on_chips(EvaluateOnChipsOptions(run=run, crossbar="isaac", calibration_rows=4, test_rows=4))
    query = next(site for site in results["sites"] if site["site"] == "writer.talk.query")
    assert (query["matrices"], query["arrays"]) == (3, 3 * 8)  # layers, and weight slices of each
    for digital, on_chip in zip(results["digital"], results["chips"][0]["seeds"], strict=True):
        assert on_chip["loss"] == pytest.approx(digital["loss"], rel=1e-2)


@pytest.mark.long
def test_an_exported_fusion_is_read_as_an_adapter_and_merged(run, tmp_path):
    export(ExportOptions(out=tmp_path / "adapter", run=run, seed=2))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "FEATURE_EXTRACTION" and config["use_dora"]
    assert "model.readers.1.mix.up" in config["target_modules"] and len(config["target_modules"]) == 2 + 3 + 3
    again = read_pool([str(tmp_path / "adapter")], _CONFIG)
    assert again.magnitude is not None and list(again.sites) == list(_ADAPTED)

    export(ExportOptions(out=tmp_path / "merged", run=run, seed=2, format="merged"))
    options, params, _ = load_run(run)
    problem = prepare(options).problem
    of_seed = jax.tree.map(lambda p: p[1], params)
    adapters, _ = problem.method.adapters(of_seed, problem.frozen, problem.index[1])
    ids, labels = jnp.array([[5, 6, 7]]), jnp.array([[4, 9, 1]])
    fused_model = nnx.merge(problem.graph, problem.frozen.base)
    wanted = jax.jit(lambda ids: fused_model.label_logits(ids, ids > 0, labels, adapters))(ids)
    merged_model = load_base(tmp_path / "merged")
    merged = jax.jit(lambda ids: merged_model.label_logits(ids, ids > 0, labels, {}))(ids)
    np.testing.assert_allclose(merged, wanted, atol=1e-4)


def test_parameters_and_flops_are_the_model_s():
    found = counts(_CONFIG, modules=2, rank=3, basis=4)
    maps = 2 * 2 * 8 * 12 + 3 * (3 * 8 * 8 + 2 * 8 * 12)
    assert found["full fine-tuning"] == maps + 2 * 66 * 8 + (2 + 3 + 3 + 1) * 8
    assert found["LoRAFusion"] == found["LoRAFusion, basis of 4"] == 2 * 5 + 5 * 12 + 3 * 8
    assert weights_bytes(_CONFIG) == 4 * found["full fine-tuning"]

    rows, source, target = shape = Shape(2, 5, 3)
    of_source = 2 * 2 * 8 * 12 + 3 * 8 * 8  # the reader, and the writer's memory of the source
    of_target = 3 * (2 * 8 * 8 + 2 * 8 * 12) + 8 * 66
    attention = 3 * 2 * source * target * 8
    wanted = 2 * rows * (source * of_source + target * of_target + attention)
    assert forward_flops(_CONFIG, shape, Update()) == wanted


def test_a_plan_has_a_row_for_each_method():
    recipe = FusionRecipe(modules=2, epochs=1)
    work = uniform(recipe, source=8, target=4, train_rows=20, test_rows=8)
    rows = plan(_CONFIG, ["zero-shot", "fusion", "lora", "full"], {"task": work}, Settings(recipe=recipe, rank=2))
    assert [row.method for row in rows] == ["zero-shot", "fusion", "lora", "full"]
    assert all(math.isfinite(row.cost.peak_bytes) and row.cost.evaluation_flops > 0 for row in rows)
    assert rows[3].cost.trainable == weights_bytes(_CONFIG) // 4


def test_a_bill_follows_the_writer_s_stages():
    options = CostOptions(
        modules=2, rank=2, epochs=1, train_rows=20, source=8, target=4, targets=("query",), bases=(3,)
    )
    found = {activity.method: activity for activity in activities(_CONFIG, ARRAYS["isaac"], options)}
    stages = found["LoRAFusion"].stages
    # ask (query and its modules; the memory is the source's), answer, mix, mixed in each of 3 layers; then the head.
    assert stages == {
        frozenset({((8, 8),), ((8, 2), (2, 8))}): 3,
        frozenset({((8, 8),)}): 3,
        frozenset({((8, 12),)}): 3,
        frozenset({((12, 8),)}): 3,
        frozenset({((8, 66),)}): 1,
    }
    assert frozenset({((8, 8),), ((8, 3), (3, 8))}) in found["LoRAFusion, basis of 3"].stages
    priced = bills(_CONFIG, ARRAYS["isaac"], options)
    assert all(bill.learning.typical > 0 < bill.inference.typical for bill in priced.values())
