"""The registry: a new method is a file and a line, and is then run, counted, planned and billed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import one_block
import pytest
import tiny
from jaxtyping import Array, Int

from lorafusion_jax._fuse import fuse
from lorafusion_jax.adapters.basis import shared_basis
from lorafusion_jax.adapters.updates import Rescaled
from lorafusion_jax.crossbar import PRESETS as CROSSBARS
from lorafusion_jax.estimates.bill import CostOptions, bills
from lorafusion_jax.estimates.estimate import Settings
from lorafusion_jax.estimates.parameters import trainable_count
from lorafusion_jax.estimates.params import counts
from lorafusion_jax.estimates.plan import plan
from lorafusion_jax.estimates.workload import uniform
from lorafusion_jax.methods import METHODS, find, register
from lorafusion_jax.methods.fusion import Fusion
from lorafusion_jax.methods.lora import LoRA
from lorafusion_jax.methods.magnitudes import Magnitudes
from lorafusion_jax.methods.mean import MeanFusion
from lorafusion_jax.methods.merge import Merge
from lorafusion_jax.methods.method import Built, CostLayout, MethodEntry, PlannedPool, Update
from lorafusion_jax.methods.vera import VeRA
from lorafusion_jax.models.t5.config import SHAPES
from lorafusion_jax.runs.options import FuseOptions
from lorafusion_jax.training.problem import Frozen, Method, Params
from lorafusion_jax.training.recipe import Recipe

_SMALL = SHAPES["t5-small"]
_POOL = tiny.pool(2)


@dataclasses.dataclass(frozen=True)
class Gains(Method):
    """One factor for each matrix of some sites."""

    sites: tuple[tuple[str, int, int], ...]
    rate: float = 0.05

    def learning_rates(self, recipe: Recipe) -> dict[str, float]:
        return {"gains": self.rate}

    def init(self, frozen: Frozen, index: Int[Array, " N"], key: Array) -> Params:
        return {"gains": {name: jnp.ones(layers) for name, layers, _ in self.sites}}

    def adapters(
        self, params: Params, frozen: Frozen, index: Int[Array, " N"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        gains = params["gains"]
        return {name: Rescaled(jnp.tile(gains[name][:, None], (1, d_out))) for name, _, d_out in self.sites}, {}


GAINS = MethodEntry(
    name="gains",
    help="train one factor for each matrix",
    title="gains",
    build=lambda built: Gains(tuple((name, site.layers, site.d_out) for name, site in built.sites)),
    update=lambda recipe, modules: Update(kind="magnitudes", targets=recipe.lora_targets),
    groups=("gains",),
    cost_layouts=lambda billed: {
        "gains": CostLayout(
            installed_words=sum(billed.counts.values()), macs=lambda site: site.d_out, words=lambda site: 1
        )
    },
)


@pytest.fixture
def gains():
    register(GAINS)
    yield
    del METHODS["gains"]


@pytest.mark.usefixtures("gains")
def test_a_new_method_is_run_and_does_not_touch_the_recipe(tmp_path):
    base, _ = one_block.cut(tmp_path / "small")
    recipe = Recipe(epochs=2, batch_size=48, max_new_tokens=8)
    options = FuseOptions(
        base=str(base),
        task=str(one_block.SMALL / "tasks" / "double_digit"),
        method="gains",
        recipe=recipe,
        out=tmp_path,
        test_rows=5,
    )
    results = fuse(options)
    assert results["trainable_by_group"] == {"gains": 6}  # q and v of one encoder layer and, twice, of a decoder layer
    assert results["seeds"][0]["steps"] == 4


@pytest.mark.usefixtures("gains")
def test_a_new_method_is_counted_planned_and_billed():
    matrices = 2 * 6 + 4 * 6
    assert counts(_SMALL)["gains"] == matrices
    work = {"task": uniform(Recipe(), source=64, target=8, test_rows=10)}
    row = plan(_SMALL, ["gains"], work, Settings())[0]
    assert row.cost.trainable == matrices and row.cost.training_flops > row.cost.evaluation_flops
    bill = bills(_SMALL, CROSSBARS["isaac"], CostOptions())["gains"]
    assert bill.trainable == matrices and bill.written.energy.typical == 0 < bill.install.typical


@pytest.mark.usefixtures("gains")
def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="there is a method 'gains' already: give this one another name"):
        register(GAINS)


def test_an_unknown_method_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="no method 'gains': choose one of fusion, coefficients"):
        find("gains")
    with pytest.raises(ValueError, match="no method 'gains'"):
        fuse(FuseOptions(base="b", task="t", method="gains"))


@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if entry.learns == "trained"])
def test_the_groups_of_an_entry_are_those_that_its_method_trains(name):
    entry, recipe = METHODS[name], Recipe(modules=2)
    found = trainable_count(entry, _SMALL, recipe, PlannedPool(rank=4, pool=2, targets=("q", "v")))
    assert tuple(found) == entry.groups and all(np.array(list(found.values())) > 0)


@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if entry.learns == "trained"])
def test_every_group_learns_at_its_own_rate_of_the_recipe(name):
    names = [field.name for field in dataclasses.fields(Recipe) if field.name.startswith("lr_")]
    recipe = Recipe(**{rate: number + 0.5 for number, rate in enumerate(names)})
    groups = {"mean": "coefficients", "base": "full"}
    method = METHODS[name].build(Built(config=_SMALL, recipe=recipe, pool=_POOL, modules=2))
    assert set(METHODS[name].groups) <= method.learning_rates(recipe).keys()
    for group, rate in method.learning_rates(recipe).items():
        assert rate == getattr(recipe, f"lr_{groups.get(group, group)}"), group


def test_a_method_is_built_with_the_numbers_of_the_recipe():
    chosen = {"granularity": "site", "start": "twice", "differentiate_norm": True, "lora_rank": 3, "vera_rank": 5}
    recipe = Recipe(**chosen, composition="mix", lora_targets=("q",), merge="ties", density=0.3)

    def built(name, recipe=recipe, pool=_POOL):
        return METHODS[name].build(Built(config=_SMALL, recipe=recipe, pool=pool, modules=2))

    fusion = Fusion(composition="mix", granularity="site", start="twice", differentiate_norm=True)
    assert built("fusion") == fusion
    assert built("coefficients") == dataclasses.replace(fusion, magnitudes=False)
    assert built("mean-fusion") == MeanFusion(**dataclasses.asdict(fusion))
    in_basis = built("fusion", Recipe(basis=3, core=True), shared_basis(_POOL, 4))
    assert in_basis == Fusion(basis=3, core=True)
    assert built("merge") == Merge(kind="ties", density=0.3)
    sites = tuple((name, site) for name, site in _SMALL.sites.items() if name.endswith(".q"))
    assert built("lora") == LoRA(sites=sites, rank=3, alpha=6.0)
    assert built("dora") == LoRA(sites=sites, rank=3, alpha=6.0, dora=True)
    assert built("vera") == VeRA(sites=sites, rank=5)
    assert built("magnitudes") == Magnitudes(tuple(name for name, _ in sites))


def test_numbers_are_counted_for_a_pool_that_is_only_shapes():
    """No weight is made of a model with eleven thousand million numbers."""
    before = len(jax.live_arrays())
    assert counts(SHAPES["flan-t5-xxl"])["LoRAFusion"] == 20 * 48 + 144 * 4096
    assert len(jax.live_arrays()) <= before
