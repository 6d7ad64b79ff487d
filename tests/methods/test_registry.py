"""The registry: a new method is a file and a line, and is then run, shown, counted, planned and priced."""

import dataclasses
import re
import runpy
import types
from dataclasses import replace

import numpy as np
import one_block
import pytest
import recipes
import tiny
from recipes import recipe
from refusals import refused

import lorafusion_jax as lf
from lorafusion_jax.cli import main
from lorafusion_jax.estimates import (
    Settings,
    plan,
    workload,
)
from lorafusion_jax.estimates.params import counts, trainable_count
from lorafusion_jax.methods import Built, Magnitudes, VeRA, fields_of
from lorafusion_jax.methods.entry import PlannedPool
from lorafusion_jax.models.t5.config import SHAPES
from lorafusion_jax.tasks import load_task

_SMALL = SHAPES["t5-small"]
_POOL = tiny.pool(2)


@pytest.fixture
def gains():
    """The example's method, which trains one factor for each matrix and has options of its own."""
    example = types.SimpleNamespace(
        **runpy.run_path(str(one_block.SMALL.parent / "your_own_method.py"))
    )
    lf.register(example.GAINS)
    yield example
    del lf.METHODS["gains"]


@pytest.mark.usefixtures("gains")
def test_a_new_method_is_run_with_its_own_options(small, tmp_path, capsys):
    quick = f"--epochs 2 --batch-size 48 --max-new-tokens 8 --test-rows 5 --out {tmp_path}".split()
    own = "--method gains --first-gain 0.5 --lr-gains 0".split()
    main([*f"fuse --base {small[0]} --task {recipes.TASK}".split(), *own, *quick])
    # q and v of one encoder layer and, twice, of a decoder layer.
    assert "gains, 6 trainable parameters" in capsys.readouterr().out
    options, params, _ = lf.load_run(tmp_path / "double_digit-gains")
    assert (
        options.recipe.first_gain,
        options.recipe.lr_gains,
        options.recipe.epochs,
    ) == (0.5, 0.0, 2)
    assert all((gain == 0.5).all() for gain in params["gains"].values())


def test_a_new_method_is_in_the_help_text_with_its_own_options(gains, capsys):
    for arguments, shown, hidden in (
        (
            ["--method", "gains"],
            ("--first-gain", "--lr-gains", "value that all factors start from"),
            "--modules",
        ),
        ([], ("--modules", "gains: train one factor for each"), "--first-gain"),
    ):
        with pytest.raises(SystemExit, match="0"):
            main(["fuse", *arguments, "--help"])
        out = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert all(text in out for text in shown) and hidden not in out
    with pytest.raises(SystemExit, match="2"):
        main("fuse --base owner/b --task t --first-gain 2".split())
    assert (
        "--first-gain is an option of the method gains, not of fusion"
        in capsys.readouterr().err
    )


@pytest.mark.usefixtures("gains")
def test_a_new_method_is_counted_planned_and_priced(capsys):
    matrices = 2 * 6 + 4 * 6
    main(["params", "--shape", "t5-small"])
    assert re.search(rf"\| gains from 1 +\| +{matrices} \|", capsys.readouterr().out)
    assert counts(_SMALL)["gains from 1"] == matrices
    main(f"fuse --base t5-small --task {recipes.TASK} --method gains --plan".split())
    assert re.search(rf"\| gains +\| +1 \| +{matrices} \|", capsys.readouterr().out)
    work = {"task": workload(load_task(recipes.TASK), lf.Recipe())}
    row = plan(_SMALL, ["gains"], work, Settings())[0]
    assert (
        row.cost.trainable == matrices
        and row.cost.training_flops > row.cost.evaluation_flops
    )
    main(["cost", "--shape", "t5-small", "--bases"])
    assert re.search(rf"\| gains +\| +{matrices} \| +0 ", capsys.readouterr().out)


def test_an_entry_that_cannot_be_used_is_refused(gains, capsys):
    with refused("there is a method 'gains' already: give this one another name"):
        lf.register(gains.GAINS)
    with refused("fuses a pool: let GainsRecipe inherit from PoolRecipe"):
        lf.register(replace(gains.GAINS, name="pooled", pool=True))
    wrong = dataclasses.make_dataclass(
        "WrongRecipe",
        [("seeds", int, 1)],
        bases=(lf.Recipe,),
        frozen=True,
        kw_only=True,
    )
    lf.METHODS["gains"] = replace(gains.GAINS, recipe=wrong)
    with pytest.raises(SystemExit, match="2"):
        main("fuse --base owner/b --task t --method gains".split())
    assert (
        "WrongRecipe has a field seeds, which is an option of every run"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "name", [name for name, entry in lf.METHODS.items() if entry.learns == "trained"]
)
def test_every_group_of_an_entry_is_trained_at_its_own_rate_of_the_recipe(name):
    entry = lf.METHODS[name]
    found = trainable_count(
        entry,
        _SMALL,
        recipe(name, modules=2),
        PlannedPool(rank=4, pool=2, targets=("q", "v")),
    )
    assert tuple(found) == entry.groups and all(np.array(list(found.values())) > 0)
    rates = [number for number in fields_of(entry) if number.startswith("lr_")]
    chosen = recipe(name, **{rate: number + 0.5 for number, rate in enumerate(rates)})
    groups = {"base": "full"}
    found = entry.build(
        Built(config=_SMALL, recipe=chosen, pool=_POOL, modules=2)
    ).learning_rates(chosen)
    assert set(entry.groups) <= found.keys() and len(rates) == len(found)
    for group, rate in found.items():
        assert rate == getattr(chosen, f"lr_{groups.get(group, group)}"), group


def test_a_method_is_built_with_the_numbers_of_the_recipe():
    chosen = {
        "granularity": "site",
        "start": "twice",
        "differentiate_norm": True,
        "lora_rank": 3,
        "vera_rank": 5,
    }
    chosen |= {
        "composition": "mix",
        "lora_targets": ("q",),
        "merge": "ties",
        "density": 0.3,
    }

    def built(name, pool=_POOL, **numbers):
        of = recipe(name, **(numbers or chosen))
        return lf.METHODS[name].build(
            Built(config=_SMALL, recipe=of, pool=pool, modules=2)
        )

    fusion = lf.Fusion(
        composition="mix", granularity="site", start="twice", differentiate_norm=True
    )
    assert built("fusion") == fusion
    assert built("coefficients") == replace(fusion, magnitudes=False)
    in_basis = built("fusion", lf.shared_basis(_POOL, 4), basis=3)
    assert in_basis == lf.Fusion(basis=3)
    assert built("merge") == lf.Merge(kind="ties", density=0.3)
    sites = tuple(
        (name, site) for name, site in _SMALL.sites.items() if name.endswith(".q")
    )
    assert built("lora") == lf.LoRA(sites=sites, rank=3, alpha=6.0)
    assert built("dora") == lf.LoRA(sites=sites, rank=3, alpha=6.0, dora=True)
    assert built("vera") == VeRA(sites=sites, rank=5)
    assert built("magnitudes") == Magnitudes(tuple(name for name, _ in sites))
