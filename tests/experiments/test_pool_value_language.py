"""The pool's value on language: its draw, its rows and tables, and all arms on a small Llama."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pool_value_language as experiment
import pytest
import small_llama
from json_files import write_json
from lab.language import SOURCES, TUNING, load
from refusals import refused

from lorafusion_jax import LowRank, read_config
from lorafusion_jax.io import lora_adapter, write_adapter

_NAMES = [name for family in SOURCES.values() for name in family]
_FIXED = "rotated, magnitudes at 0.0333"  # its rates are not tuned


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return small_llama.make(
        tmp_path_factory.mktemp("base") / "llama", max_position_embeddings=1024
    )


@pytest.fixture(scope="module")
def pool(llama, tmp_path_factory):
    """A pool of random adapters with the names of the sources."""
    folder = tmp_path_factory.mktemp("pool")
    config = read_config(llama)
    rng = np.random.default_rng(0)

    def factor(*size):
        return jnp.asarray(rng.normal(0.0, 0.1, size), jnp.float32)

    sites = {
        name: site
        for name, site in config.sites.items()
        if name.rpartition(".")[2] in ("q_proj", "v_proj")
    }
    for name in _NAMES:
        adapters = {
            site: LowRank(factor(of.layers, of.d_in, 2), factor(of.layers, 2, of.d_out))
            for site, of in sites.items()
        }
        write_adapter(folder / name, *lora_adapter(config, adapters, base="llama"))
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task whose answer is the colour that its input names."""
    path = tmp_path_factory.mktemp("tasks") / "colours.json"
    rows = [
        {"input": f"{n} {colour}", "output": colour}
        for n in range(95)
        for colour in ("red", "blue")
    ]
    write_json(path, rows)
    return path


def test_every_kind_of_arm_is_measured(llama, pool, task):
    lab = experiment.Lab(llama, pool)
    numbers = {"LoRAFusion": 48, "zero-shot": 0, "LoRA, rank 8": None}
    found = {}
    for name in (*numbers, "5 examples and LoRAFusion"):
        rates = dict.fromkeys(experiment.ARMS[name].rates, 0.01)
        found[name] = lab.measure(name, task, 20, 2, rates)
        assert found[name]["test_rows"] == 90
        assert found[name]["steps"] == (40 if rates else 0)
        assert numbers.get(name) in (None, found[name]["numbers"])
    losses = {name: row["test_loss"] for name, row in found.items()}
    assert len({f"{loss:.3f}" for loss in losses.values()}) == len(losses)
    assert losses["LoRA, rank 8"] < losses["LoRAFusion"] < losses["zero-shot"]


def test_seeds_have_rows_that_no_other_seed_has(llama, pool, task):
    model = experiment.Lab(llama, pool).model("zero-shot", 0)
    everything = load(task)

    def rows(number, seed, shots=0):
        setup = experiment.setup_of(model, everything, number, seed, shots)
        assert setup.split is not None and len(setup.test) == 90
        texts = [example.input for example in setup.task.train]
        return [[texts[i] for i in part[0]] for part in setup.split]

    texts = [example.input for example in everything.train]
    assert rows(20, 1) == [texts[:20], texts[20:25]] and rows(20, 3) == [
        texts[50:70],
        texts[70:75],
    ]
    assert rows(95, 1) == [texts[:95], texts[95:]]
    train, validation = rows(20, 2, shots=5)
    assert (len(train), len(validation)) == (15, 5)
    for text, own in zip([*train, *validation], texts[30:50], strict=True):
        assert text.endswith(f"\n\n{own}") and all(
            shown in text for shown in texts[25:30]
        )


def test_a_pool_that_lacks_adapters_is_refused(llama, pool, tmp_path):
    (tmp_path / "past").mkdir()
    with refused("lacks the adapters plural, comparative, .*--own-seeds trains them"):
        experiment.Lab(llama, tmp_path)
    (tmp_path / "unknown").mkdir()
    with refused("has other adapters, unknown: expected only those of the design"):
        experiment.Lab(llama, tmp_path)


class _Recorded:
    """A lab with made-up losses, which records its cells and stops after a number of them."""

    arms = experiment.ARMS
    tuning_seeds = experiment.TUNING_SEEDS
    untuned = experiment.Lab.untuned

    def __init__(self, cells):
        self.left = cells
        self.asked = []

    def measure(self, name, path, rows, seed, rates, *, answer=True):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked.append((name, rows, path, seed))
        distance = sum(np.log(rate / 0.03) ** 2 for rate in rates.values())
        return {
            "numbers": 7,
            "steps": 40,
            "test_rows": 100,
            "test_loss": 1.0 + distance,
            "exact_match": 50.0,
        }


def test_a_tuning_continues_and_ends_at_the_best_rate(tmp_path):
    file = tmp_path / "language_tune.jsonl"
    paths = {name: Path(name) for name in TUNING}
    first = _Recorded(7)
    second = _Recorded(1000)
    third = _Recorded(0)
    with pytest.raises(KeyboardInterrupt):
        experiment.tuned(first, "LoRA, rank 8", 20, paths, tmp_path)
    found = experiment.tuned(second, "LoRA, rank 8", 20, paths, tmp_path)
    assert (
        found
        == {"lr_lora": 0.045}
        == experiment.tuned(third, "LoRA, rank 8", 20, paths, tmp_path)
    )
    # Powers -1 to 3 of 3, two tasks and two seeds.
    assert (
        len(first.asked) + len(second.asked)
        == 5 * 2 * 2
        == len(file.read_text().splitlines())
    )
    assert experiment.tuned(third, "zero-shot", 20, paths, tmp_path) == {}
    fixed = {"lr_coefficients": 0.01, "lr_magnitudes": 0.0333}
    assert experiment.tuned(third, _FIXED, 20, paths, tmp_path) == fixed
