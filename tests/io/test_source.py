"""Where files come from, and safetensors as views of a mapped file."""

import numpy as np
import pytest
from refusals import refused
from safetensors.numpy import save_file

from lorafusion_jax import read_config
from lorafusion_jax.io import read_adapter, source
from lorafusion_jax.io.tensor_files import load_tensors


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c", "", "~nosuchuser/x"]
)
def test_neither_folder_nor_hub_id(name):
    for read in (
        lambda name: source.resolve(name, patterns=None),
        read_config,
        read_adapter,
    ):
        with refused("neither a folder here nor a hub id: give a path, owner/name"):
            read(name)


def test_local_folders_are_used_and_files_refused(tmp_path):
    (tmp_path / "x").write_text("x")
    assert source.resolve(str(tmp_path), patterns=None) == tmp_path
    with refused("is a file: give the folder that holds it"):
        source.resolve(str(tmp_path / "x"), patterns=None)
    with refused(r"x\.safetensors: no such file"):
        load_tensors(tmp_path / "x.safetensors")


def test_safetensors_are_views_with_the_library_s_values(tmp_path):
    numbers = np.random.default_rng(0).standard_normal((3, 2, 5))
    dtypes = "float64 float32 float16 bfloat16 float8_e4m3fn int64 bool".split()
    arrays = {dtype: numbers.astype(dtype) for dtype in dtypes}
    arrays |= {"scalar": np.array(1.5), "empty": np.zeros((0, 3), np.float32)}
    path = tmp_path / "x.safetensors"
    save_file(arrays, path, metadata={"format": "pt"})
    got = load_tensors(path)
    assert got.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(got[key], array, strict=True)
        assert not got[key].flags.owndata and not got[key].flags.writeable
