"""The store of arrays, and states of runs in it: exact, readable by safetensors, and every damage noticed by name."""

import shutil
from functools import partial
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from json_files import change_json, read_json, write_json
from numpy.testing import assert_array_equal
from refusals import refused
from safetensors.numpy import load_file

import lorafusion_jax as lf
from lorafusion_jax.io import store

_TREE = {
    "coefficients": {
        "encoder.q": jnp.arange(6.0).reshape(2, 3).T,
        "encoder.v": np.array([True, False]),
    },
    "step": jnp.uint32(7),
    "half": jnp.arange(4, dtype=jnp.bfloat16),
}


class _State(NamedTuple):
    step: jax.Array
    params: dict
    moments: tuple


class _Step(TypedDict):
    step: int


def _state(seed=0.0):
    return _State(
        step=jnp.int32(7),
        params={
            "coefficients": jnp.full((2, 3), seed),
            "m": jnp.arange(4, dtype=jnp.bfloat16),
        },
        moments=(np.array([True, False]), {}, jnp.uint32(9)),
    )


@pytest.fixture
def saved(tmp_path):
    store.save(tmp_path / "saved", "thing", _TREE, {"steps": [3, 4]})
    return tmp_path / "saved"


@pytest.fixture
def checkpoints(tmp_path):
    folder = tmp_path / "steps"
    for step in (1, 2):
        store.save_step(folder, step, _state(float(step)), {"step": step}, keep=2)
    return folder


def _newest(folder, note, state=_state):
    steps = [*store.steps(folder).values()]
    return store.load_newest(steps, state(), metadata=_Step, note=note)


def test_a_tree_and_its_metadata_come_back_exactly(saved):
    tree, metadata = store.load(saved, "thing")
    assert metadata == {"steps": [3, 4]}
    assert tree.keys() == _TREE.keys() and tree["half"].dtype == ml_dtypes.bfloat16
    jax.tree.map(
        partial(assert_array_equal, strict=True),
        tree,
        jax.tree.map(np.asarray, _TREE),
    )
    names = {"coefficients/encoder.q", "coefficients/encoder.v", "step", "half"}
    assert load_file(saved / "arrays.safetensors").keys() == names
    # The library alone makes a file that only its owner can read.
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1
    with refused("exists: give a new folder, or remove it"):
        store.save(saved, "thing", {}, {})


def _manifest(**changes):
    def damage(folder):
        path = folder / "manifest.json"
        change_json(path, changes)

    return damage


def _flip(folder):
    path = folder / "arrays.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def _earlier_format(folder):
    path = folder / "manifest.json"
    manifest = read_json(path)
    del manifest["kind"]
    write_json(path, manifest)


_DAMAGES = {
    "a flipped bit": (_flip, "arrays.safetensors: damaged or altered"),
    "no arrays": (
        lambda folder: (folder / "arrays.safetensors").unlink(),
        "no such file, though the manifest lists it",
    ),
    "no manifest": (
        lambda folder: (folder / "manifest.json").unlink(),
        "not a thing: it has no manifest.json",
    ),
    "no JSON": (
        lambda folder: (folder / "manifest.json").write_text('{"metadata": '),
        "manifest.json: not JSON",
    ),
    "another kind": (_manifest(kind="pool"), "kind is 'pool': expected 'thing'"),
    "other metadata": (_manifest(metadata=[]), "Expected `object`, got `array`"),
    "a file outside": (_manifest(files={"../x": "0"}), "not a file inside this folder"),
    "an earlier format": (
        _earlier_format,
        f"of an earlier format: .* .written by version {lf.__version__}",
    ),
}


@pytest.mark.parametrize("name", _DAMAGES)
def test_damage_is_found_and_named(name, saved):
    damage, message = _DAMAGES[name]
    damage(saved)
    with pytest.raises(lf.FileError, match=f"^{saved}.*{message}"):
        store.load(saved, "thing")


@pytest.mark.parametrize(
    "state", [_state, lambda: jax.eval_shape(_state)], ids=["arrays", "shapes"]
)
def test_a_state_comes_back_exactly(state, checkpoints):
    newest = _newest(checkpoints, pytest.fail, state)
    assert newest is not None and newest[1] == {"step": 2}
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(newest[0]))
    jax.tree.map(
        partial(assert_array_equal, strict=True),
        newest[0],
        jax.tree.map(np.asarray, _state(2.0)),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"coefficients": jnp.ones((2, 4))},
            r"params/coefficients is float32\[2, 3\]: expected float32\[2, 4\]",
        ),
        ({"m": jnp.ones(4)}, r"params/m is bfloat16\[4\]: expected float32\[4\]"),
        ({"new": jnp.ones(1)}, r"params/new is absent: expected float32\[1\]"),
        ({"m": {}}, r"params/m is bfloat16\[4\]: expected no such array"),
    ],
)
def test_a_state_of_another_run_is_refused_and_kept(checkpoints, change, message):
    state = _state()
    with refused(f"{message}; resume the run that saved it"):
        _newest(
            checkpoints,
            pytest.fail,
            lambda: state._replace(params=state.params | change),
        )
    assert len(store.steps(checkpoints)) == 2


def test_the_last_steps_are_kept(checkpoints):
    for step in (20, 1_000_000):
        store.save_step(checkpoints, step, _state(), {"step": step}, keep=2)
    names = [path.name for path in store.steps(checkpoints).values()]
    assert names == ["step_000020", "step_1000000"]


def test_the_newest_sound_step_is_loaded_and_a_damaged_one_is_kept_aside(checkpoints):
    for earlier in ("step_000002.damaged", "step_000002.damaged-2"):
        (checkpoints / earlier).mkdir()
    _flip(checkpoints / "step_000002")
    notes = []
    newest = _newest(checkpoints, notes.append)
    assert newest is not None and newest[1] == {"step": 1}
    (note,) = notes
    assert note.endswith("It is kept as step_000002.damaged-3")
    assert (checkpoints / "step_000002.damaged-3" / "manifest.json").is_file()
    shutil.rmtree(checkpoints / "step_000001")
    (checkpoints / "step_000001").write_text("")
    assert _newest(checkpoints, notes.append) is None and len(notes) == 2
    assert (
        store.newest_sound([checkpoints / "none"], "checkpoint", dict, note=pytest.fail)
        is None
    )


@pytest.mark.parametrize(
    "change",
    [{"metadata": {"step": 2, "clock": 1.0}}, {"files": []}, {"kind": "state"}],
)
def test_a_step_of_a_newer_version_is_not_damaged(change, checkpoints):
    _manifest(versions={"lorafusion-jax": "9.9"}, **change)(checkpoints / "step_000002")
    versions = rf"\(written by version '?9\.9'?, this is {lf.__version__}\)"
    with refused(versions):
        _newest(checkpoints, pytest.fail)
    assert len(store.steps(checkpoints)) == 2
