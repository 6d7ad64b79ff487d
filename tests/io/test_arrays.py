"""Trained numbers and bases on disk: exact, in a file that other programs read, and every damage noticed by name."""

import functools
import hashlib
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorafusion_jax import FileError
from lorafusion_jax.io import arrays

_TREE = {
    "coefficients": {
        "encoder.q": jnp.arange(6.0).reshape(2, 3).T,
        "encoder.v": np.array([True, False]),
    },
    "step": jnp.uint32(7),
    "half": jnp.arange(4, dtype=jnp.bfloat16),
}


@pytest.fixture
def saved(tmp_path):
    arrays.save(tmp_path / "saved", _TREE, {"steps": [3, 4]})
    return tmp_path / "saved"


def test_a_tree_and_its_metadata_come_back_exactly(saved):
    tree, metadata = arrays.load(saved, what="numbers")
    assert metadata == {"steps": [3, 4]}
    assert tree.keys() == _TREE.keys() and tree["half"].dtype == ml_dtypes.bfloat16
    assert tree["step"].shape == () and tree["step"] == 7
    np.testing.assert_array_equal(
        tree["coefficients"]["encoder.q"], _TREE["coefficients"]["encoder.q"]
    )
    assert tree["coefficients"]["encoder.v"].tolist() == [True, False]
    np.testing.assert_array_equal(tree["half"].astype(np.float32), np.arange(4))


def test_the_file_is_one_that_safetensors_reads(saved):
    by_others = load_file(saved / "arrays.safetensors")
    assert by_others.keys() == {
        "coefficients/encoder.q",
        "coefficients/encoder.v",
        "step",
        "half",
    }
    modes = {
        (saved / name).stat().st_mode
        for name in ("arrays.safetensors", "manifest.json")
    }
    assert (
        len(modes) == 1
    )  # the library alone makes a file that only its owner can read
    assert sorted(path.name for path in saved.iterdir()) == [
        "arrays.safetensors",
        "manifest.json",
    ]


def test_a_name_with_a_slash_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="an array is named 'a/b': expected a name without a slash"
    ):
        arrays.save(tmp_path / "saved", {"group": {"a/b": np.ones(2)}}, {})
    assert list(tmp_path.iterdir()) == []


def test_damage_is_found_and_named(saved):
    path = saved / "arrays.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        FileError,
        match=f"^{path}: damaged or altered, its SHA-256 is not the manifest's",
    ):
        arrays.load(saved, what="numbers")
    path.unlink()
    with pytest.raises(
        FileError, match=f"^{path}: no such file, though the manifest lists it"
    ):
        arrays.load(saved, what="numbers")
    (saved / "manifest.json").unlink()
    with pytest.raises(
        FileError, match=f"^{saved}: not numbers: it has no manifest.json"
    ):
        arrays.load(saved, what="numbers")


@pytest.mark.parametrize(
    "names",
    [("a", "a/b"), ("a/b", "a/b/c"), ("/".join("a" * 50_000),)],
    ids=["leaf first", "leaf last", "deep"],
)
def test_paths_that_make_no_tree_are_refused(names, saved):
    """Even with a digest that is right."""
    path = saved / "arrays.safetensors"
    save_file(dict.fromkeys(names, np.ones(2, np.float32)), path)
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        FileError, match="is not the path of an array in a tree: restore it"
    ):
        arrays.load(saved, what="numbers")


def test_a_manifest_that_lists_no_arrays(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))
    with pytest.raises(
        FileError, match=f"^{saved}: the manifest lists no arrays.safetensors"
    ):
        arrays.load(saved, what="numbers")


def test_a_damaged_folder_is_set_aside_so_that_it_can_be_made_again(saved):
    notes: list[str] = []
    load_sound = functools.partial(
        arrays.load_sound,
        metadata=dict[str, list[int]],
        what="numbers",
        note=notes.append,
    )
    assert load_sound(saved.with_name("none")) is None
    found = load_sound(saved)
    assert found is not None and found[1] == {"steps": [3, 4]} and not notes
    (saved / "manifest.json").write_text("{")
    assert load_sound(saved) is None
    assert notes[0].endswith("It is kept as saved.damaged") and not saved.exists()
