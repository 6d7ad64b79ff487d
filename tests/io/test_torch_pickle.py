"""`.bin` files without PyTorch: the golden, files written here byte by byte, and files by torch.save."""

import os
import pickle
import tarfile

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from refusals import refused
from safetensors.numpy import load_file
from torch_files import (
    Call,
    Global,
    Persistent,
    pickled,
    storage_of,
    tensor_of,
    write_zip,
)

from lorafusion_jax.io.tensor_files import load_tensors

_NUMBERS = np.arange(24, dtype=np.float32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.bin"


def _refused(path, message):
    with refused(rf"^{path}: .*{message}") as caught:
        load_tensors(path)
    assert len(str(caught.value)) < 500 + len(str(path))


@pytest.mark.smoke
def test_golden_equals_its_safetensors(goldens):
    folder = goldens / "fusion" / "t5a" / "adapters"
    got = load_tensors(folder / "lora_0_bin" / "adapter_model.bin")
    want = load_file(folder / "lora_0" / "adapter_model.safetensors")
    assert got.keys() == want.keys()
    for key, array in want.items():
        assert got[key].dtype == array.dtype
        assert_array_equal(got[key], array)
        assert not got[key].flags.writeable and not got[key].flags.owndata


class _Attack:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_a_pickle_with_a_system_call_is_refused(tmp_path, path):
    witness = tmp_path / "witness"
    attack = {"x": _Attack(os.system, f"touch {witness}")}
    write_zip(path, attack, {})
    _refused(path, r"its pickle names (posix|nt)\.system.*nothing was exec")
    assert not witness.exists()
    pickle.loads(pickle.dumps(attack))  # the attack is a real one
    assert witness.exists()


_X = b"X\1\0\0\0x"


def _zip(content, **more):
    """Return a function that writes content in an archive with a storage of 24 numbers and a member that is secret."""
    more = {"members": [("data/1", b"secret" * 20)]} | more
    return lambda path: write_zip(path, content, {"0": _NUMBERS.tobytes()}, **more)


def _tensor(size=(1,), stride=(1,), offset=0, *more, key="0", numel=24):
    return {
        "x": tensor_of(
            storage_of("FloatStorage", key, numel), offset, size, stride, *more
        )
    }


def _tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))


_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
_OLD = "truncated or corrupt, or older than PyTorch 1.6, .*as safetensors"
_OTHER = "not a flat dict of tensors"
_GLOBALS = (
    "builtins.eval",
    "lorafusion_jax.io.tensor_files.load_tensors",
)
_REFUSED = [
    *(
        (
            _zip({"x": Call(Global(*name.rsplit(".", 1)), "1 + 1")}),
            f"its pickle names {name}, which no plain tensor needs: nothing",
        )
        for name in _GLOBALS
    ),
    (_tar, _OLD),
    # Views that leave their storage.
    (_zip(_tensor((25,))), _OTHER),
    (_zip(_tensor((2, 2), (24, 1))), _OTHER),
    (_zip(_tensor((8,), (1,), -1)), _OTHER),
    # Content that is no dict of tensors.
    (_zip({"epoch": 3}), "entry 'epoch' holds a int"),
    (_zip({7: _tensor()["x"]}), "entry 7 holds"),
    (_zip(_tensor((1,), (1,), 0, {"neg": True})), "resolve_neg"),
    (_zip({"x": Persistent(("module", "torch.nn.Linear"))}), _OTHER),
    (_zip({}, members=[("byteorder", b"big")]), "big-endian machine"),
    (_zip({}, members=[("nested/data.pkl", b"")]), _OTHER),
    # Other files.
    (b"<html>not found</html>", "truncated or corrupt"),
    (b"", "the file is empty: fetch it again"),
    (_LFS, "Git LFS pointer.*git lfs pull"),
]


@pytest.mark.parametrize(("file", "message"), _REFUSED)
def test_files_that_are_refused(path, file, message):
    path.write_bytes(file) if isinstance(file, bytes) else file(path)
    _refused(path, message)
    assert np.dtype(ml_dtypes.bfloat16).byteorder == "="  # a pickle has changed nothing


def test_a_state_dict_loses_its_attributes(path):
    tensor = pickled(tensor_of(storage_of("FloatStorage", "0", 24), 0, (24,), (1,)))[
        2:-1
    ]
    content = (
        b"\x80\2ccollections\nOrderedDict\n)R" + _X + tensor + b"s}" + _X + b"Nsb."
    )
    write_zip(path, content, {"0": _NUMBERS.tobytes()})
    assert_array_equal(load_tensors(path)["x"], _NUMBERS)


@pytest.mark.peft
def test_files_that_torch_writes(tmp_path):
    import torch

    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    layer = torch.nn.Linear(3, 4)
    tensors = {
        "plain": base,
        "transposed": base.T,
        "strided": base[1::2, ::3],
        "shared": base[2],
        "expanded": base[:1].expand(5, 8),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "bf16": base.to(torch.bfloat16).T,
        "fp16": base.half(),
        "float64": base.double(),
        "int8": (base * 10).to(torch.int8),
        "int64": torch.arange(5),
        "bool": base > 0,
        "parameter": layer.weight,
    }
    path = tmp_path / "x.bin"
    torch.save(tensors, path)
    got = load_tensors(path)
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert str(got[name].dtype) == str(tensor.dtype).removeprefix("torch."), name
        assert got[name].shape == tuple(tensor.shape), name
        assert_array_equal(
            got[name].astype(np.float64), tensor.detach().double().numpy(), err_msg=name
        )
    assert np.shares_memory(got["plain"], got["shared"])


@pytest.mark.peft
def test_a_state_dict_of_a_module_is_read_and_the_module_is_refused(path):
    import torch

    layer = torch.nn.Linear(3, 4)
    torch.save(layer.state_dict(), path)
    assert_array_equal(load_tensors(path)["weight"], layer.weight.detach().numpy())
    torch.save(layer, path)
    _refused(path, r"names torch\.nn\.modules\.linear\.Linear")
