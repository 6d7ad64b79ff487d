"""Checkpoints: exact round trips, every damage noticed by name, and nothing lost when a save is killed."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lorafusion_jax as lf
from lorafusion_jax.io import checkpoint


class _State(NamedTuple):
    step: jax.Array
    params: dict
    moments: tuple


def _state(seed=0.0):
    return _State(
        step=jnp.int32(7),
        params={
            "coefficients": jnp.full((2, 3), seed),
            "m": jnp.arange(4, dtype=jnp.bfloat16),
        },
        moments=(np.array([True, False]), {}, jnp.uint32(9)),
    )


def _loaded(folder, abstract=None):
    """Load a single folder; damage is an error instead of a note."""

    def refuse(note: str) -> None:
        raise ValueError(note)

    found = checkpoint.load_newest([folder], abstract, note=refuse)
    assert found is not None
    return found


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(
        tmp_path / "saved",
        _state(0.5),
        {"epoch": 3, "note": "[ 1 ]", "curve": [1.5, -2e-5]},
    )
    return tmp_path / "saved"


@pytest.mark.parametrize(
    "abstract", [_state, lambda: jax.eval_shape(_state)], ids=["arrays", "shapes"]
)
def test_a_tree_and_its_metadata_come_back_exactly(saved, abstract):
    tree, metadata = _loaded(saved, abstract())
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))
    jax.tree.map(
        partial(np.testing.assert_array_equal, strict=True),
        tree,
        jax.tree.map(np.asarray, _state(0.5)),
    )
    assert metadata == {"epoch": 3, "note": "[ 1 ]", "curve": [1.5, -2e-5]}


def test_without_an_abstract_tree_dicts_and_lists_are_loaded(saved):
    tree, _ = _loaded(saved)
    assert tree["params"]["m"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tree["params"]["coefficients"], np.full((2, 3), 0.5))
    assert tree["moments"][0].tolist() == [True, False] and tree["step"] == 7


def test_arrays_spread_over_devices_are_saved_whole(tmp_path):
    mesh = jax.make_mesh((4,), ("seed",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("seed"))
    spread = jax.device_put(jnp.arange(8.0), sharding)
    checkpoint.save(tmp_path / "saved", {"spread": spread}, {})
    tree, _ = _loaded(tmp_path / "saved")
    np.testing.assert_array_equal(tree["spread"], np.arange(8.0))


def test_every_file_is_guarded(saved):
    files = json.loads((saved / "manifest.json").read_text())["files"]
    on_disk = {
        path.relative_to(saved).as_posix()
        for path in saved.rglob("*")
        if path.is_file()
    }
    assert files.keys() == on_disk - {"manifest.json"}
    for name in files:
        content = (saved / name).read_bytes()
        middle = len(content) // 2
        flipped = (
            content[:middle]
            + bytes([content[middle] ^ 1 if content else 0])
            + content[middle + 1 :]
        )
        (saved / name).write_bytes(flipped)
        with pytest.raises(ValueError, match=f"{name}: damaged or altered"):
            _loaded(saved)
        (saved / name).unlink()
        with pytest.raises(
            ValueError, match=f"{name}: no such file, though the manifest lists it"
        ):
            _loaded(saved)
        (saved / name).write_bytes(content)
    _loaded(saved)


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
def test_another_tree_is_refused(saved, change, message):
    state = _state()
    with pytest.raises(ValueError, match=message):
        _loaded(saved, state._replace(params=state.params | change))


def test_what_exists_is_not_overwritten(saved):
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match="exists: give a new folder, or remove it first"
    ):
        checkpoint.save(saved, _state(1.0), {})
    assert {
        path: path.read_bytes() for path in saved.rglob("*") if path.is_file()
    } == before


def test_the_last_steps_are_kept(tmp_path):
    assert checkpoint.steps(tmp_path / "checkpoints") == []
    for step in (5, 20, 1_000_000):
        checkpoint.save_step(
            tmp_path / "checkpoints", step, _state(step), {"step": step}, keep=2
        )
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_000020",
        "step_1000000",
    ]
    assert _loaded(checkpoint.steps(tmp_path / "checkpoints")[-1])[1] == {
        "step": 1_000_000
    }


def _truncate(folder: Path) -> None:
    files = [path for path in (folder / "arrays").rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])


def _replace_by_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


_DAMAGES = {
    "no manifest": (
        lambda folder: (folder / "manifest.json").unlink(),
        "not a complete checkpoint: it has no man",
    ),
    "no JSON": (
        lambda folder: (folder / "manifest.json").write_text('{"metadata": '),
        r"manifest.json: not JSON",
    ),
    "another manifest": (
        lambda folder: (folder / "manifest.json").write_text("[]"),
        "Expected `object`, got `array`",
    ),
    "truncated": (_truncate, "damaged or altered"),
    "a file": (
        _replace_by_a_file,
        "not a complete checkpoint: it has no manifest.json",
    ),
}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    for step in (1, 2):
        checkpoint.save_step(
            folder, step, {"x": np.full(3, step)}, {"step": step}, keep=2
        )
    return folder


@pytest.mark.parametrize("name", _DAMAGES)
def test_the_newest_sound_step_is_loaded_and_a_damaged_one_is_named(
    name, two_steps, tmp_path
):
    damage, message = _DAMAGES[name]
    folder = tmp_path / "steps"
    shutil.copytree(two_steps, folder)
    for earlier in ("step_000002.damaged", "step_000002.damaged-2"):
        (folder / earlier).mkdir()
        (folder / earlier / "file").write_text(earlier)
    damage(folder / "step_000002")
    notes: list[str] = []
    found = checkpoint.load_newest(checkpoint.steps(folder), note=notes.append)
    assert found is not None and found[1] == {"step": 1}
    np.testing.assert_array_equal(found[0]["x"], np.ones(3))
    (note,) = notes
    assert str(folder / "step_000002") in note and message in note
    assert note.endswith("It is kept as step_000002.damaged-3")
    kept = [f"step_000002.damaged{number}" for number in ("", "-2", "-3")]
    assert sorted(path.name for path in folder.iterdir()) == ["step_000001", *kept]
    assert [(folder / name / "file").read_text() for name in kept[:2]] == kept[:2]
    damage(folder / "step_000001")
    assert (
        checkpoint.load_newest(checkpoint.steps(folder), note=notes.append) is None
        and len(notes) == 2
    )


class _Step(TypedDict):
    step: int


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"metadata": {"step": 2, "clock": 1.0}},
            "metadata.clock is unknown: remove it",
        ),
        ({"files": []}, r"Expected `object`, got `array` - at `\$\.files`"),
    ],
)
def test_a_step_of_a_newer_version_is_not_damaged(change, message, two_steps, tmp_path):
    folder = tmp_path / "steps"
    shutil.copytree(two_steps, folder)
    path = folder / "step_000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["versions"] == {"lorafusion-jax": lf.__version__}
    path.write_text(
        json.dumps(manifest | {"versions": {"lorafusion-jax": "9.9"}} | change)
    )
    versions = rf"\(written by version '9\.9', this is {lf.__version__}\)"
    with pytest.raises(ValueError, match=rf"{path}: {message}.*{versions}"):
        checkpoint.load_newest(checkpoint.steps(folder), metadata=_Step, note=print)
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_000001",
        "step_000002",
    ]
    del manifest["versions"]  # of a time before versions were recorded
    path.write_text(json.dumps(manifest))
    assert _loaded(folder / "step_000002")[1] == {"step": 2}


def test_a_sound_step_of_another_run_is_not_passed_over(two_steps):
    with pytest.raises(ValueError, match="x is int64.* resume the run that saved it"):
        checkpoint.load_newest(
            checkpoint.steps(two_steps), {"x": np.ones(3, np.float32)}, note=print
        )
    assert len(checkpoint.steps(two_steps)) == 2
