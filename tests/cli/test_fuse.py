"""`lorafusion fuse`: from arguments to options, and the plan of a run."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from refusals import refused, told

import lorafusion_jax as lf
from lorafusion_jax.cli import fuse, main

_SMALL = Path(__file__).resolve().parents[2] / "examples" / "small"
_COUNTED = """
import sys
import jax
from lorafusion_jax.cli import main
compiled = []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name.rpartition("/")[2]))
main(sys.argv[1:])
print(compiled.count("backend_compile_duration"))
"""


@pytest.fixture
def asked(monkeypatch):
    """The options that a command line asks for, without running it."""
    found = []

    def take(options, task):
        found.append(dataclasses.replace(options, task=" ".join(task)))
        raise ValueError("stop here")

    def ask(arguments=""):
        monkeypatch.setattr(fuse, "fuse", take)
        with pytest.raises(SystemExit, match="2"):
            main(f"fuse --base owner/b --task t {arguments}".split())
        return found.pop()

    return ask


def test_options_in_every_group_reach_the_run(asked):
    assert asked() == lf.FuseOptions(base="owner/b", task="t")
    assert asked("--task t u").task == "t u"
    options = asked("--method lora --lr-lora 0.5 --age 1day --from .. --seeds 3 4")
    assert (options.method, options.recipe.lr_lora, options.arrays.age) == (
        "lora",
        0.5,
        "1day",
    )
    assert (options.start_from, options.seeds) == (Path(".."), (3, 4))


def test_a_preset_gives_the_numbers_that_the_other_options_do_not(asked):
    reference = lf.PRESETS["reference"]
    assert asked("--preset reference").recipe == reference
    # An option that repeats the default recipe's number overrides the preset's all the same.
    changed = asked("--composition sum --preset reference --lr-coefficients 0.1")
    assert changed.recipe == dataclasses.replace(
        reference, composition="sum", lr_coefficients=0.1
    )
    # Another method has some of these numbers.
    dora = asked("--preset reference --method dora --lora-rank 4").recipe
    shared = {
        name: value for name, value in vars(reference).items() if hasattr(dora, name)
    }
    assert dora == lf.DoRARecipe(**shared, lora_rank=4) and shared.keys() >= {
        "lr_magnitudes",
        "protocol",
        "clip",
    }


def test_a_recipe_of_another_method_is_accepted_only_with_common_numbers():
    options = lf.FuseOptions(
        base="b", task="t", method="lora", recipe=lf.FusionRecipe(epochs=3)
    )
    assert options.recipe == lf.LoRARecipe(epochs=3)
    with refused("modules is an option of the methods fusion, .* not of lora"):
        lf.FuseOptions(
            base="b", task="t", method="lora", recipe=lf.FusionRecipe(modules=3)
        )


def test_a_plan_shows_what_a_run_needs_and_runs_nothing(capsys, tmp_path):
    task = f"--task {_SMALL / 'tasks' / 'double_digit'} --plan"
    command = f"fuse --base {_SMALL / 'base'} --pool {_SMALL / 'adapters'} {task}"
    main(f"{command} --crossbar isaac --out {tmp_path}".split())
    out = capsys.readouterr().out
    assert "1 methods and 1 tasks, looped; 1 seeds" in out
    assert "double_digit: training in 200 batches" in out
    assert "| fusion |" in out and "lengths tokenised" in out
    assert "counted digitally: simulated arrays (isaac) take more" in out
    main(f"fuse --base t5-small --pool none --preset reference {task}".split())
    assert "lengths estimated from characters" in capsys.readouterr().out
    assert "nobody" in told(capsys, f"{command} --adapters nobody".split())
    assert "no tasks: give" in told(capsys, "fuse --base owner/b --task".split())
    two = "fuse --base owner/b --task owner/c owner/d --plan --name mine".split()
    assert "--name: only for one task" in told(capsys, two)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_run_of_two_seeds_has_at_most_twelve_programs(small, tmp_path):
    """Single operations outside of compiled functions would be programs of their own."""
    base, pool = map(str, small)
    where = f"--base {base} --pool {pool} --task {_SMALL / 'tasks' / 'double_digit'} --out {tmp_path}".split()
    command = [
        sys.executable,
        "-c",
        _COUNTED,
        "fuse",
        *where,
        "--seeds",
        "1",
        "2",
        "--epochs",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout.split()[-1]) <= 12
