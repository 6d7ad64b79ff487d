"""`.bin` files without PyTorch: the golden, files written here byte by byte, and files by torch.save."""

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from lorafusion_jax.io import torch_pickle

_ROOT = Path(__file__).resolve().parents[2]


class _Global:
    """Pickles as a bare reference to `module.name`, which need not exist here."""

    def __init__(self, module, name, storage=None):
        self.module, self.name, self.storage = module, name, storage


class _Call:
    """Pickles as the call of a global."""

    def __init__(self, function, *args):
        self.function, self.args = function, args


class _Pickler(pickle._Pickler):
    """Writes the pickles of torch.save without torch: globals by name, storages as persistent ids."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_global_by_name(self, obj):
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())

    def save_call(self, obj):
        self.save(obj.function)
        self.save(obj.args)
        self.write(pickle.REDUCE)

    dispatch[_Global] = save_global_by_name
    dispatch[_Call] = save_call

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, _Persistent) else None


class _Persistent:
    def __init__(self, pid):
        self.pid = pid


_REBUILD = _Global("torch._utils", "_rebuild_tensor_v2")


def _pickled(obj):
    file = io.BytesIO()
    _Pickler(file, 2).dump(obj)
    return file.getvalue()


def _storage(kind, key, numel, *view):
    return _Persistent(("storage", _Global("torch", kind), key, "cuda:0", numel, *view))


def _tensor(storage, offset, size, stride, *metadata):
    return _Call(_REBUILD, storage, offset, size, stride, False, OrderedDict(), *metadata)


def _write_zip(path, content, storages, *, members=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("anything/data.pkl", _pickled(content))
        archive.writestr("anything/version", "3")
        for name, data in members:
            archive.writestr(f"anything/{name}", data)
        for key, data in storages.items():
            archive.writestr(f"anything/data/{key}", data)


def _write_legacy(path, content, storages):
    """Storages: {key: (numel, bytes)}."""
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    with path.open("wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, info, content, list(storages)):
            file.write(_pickled(part))
        for numel, data in storages.values():
            file.write(struct.pack("<q", numel) + data)


_NUMBERS = np.arange(24, dtype=np.float32)


def test_golden_equals_its_safetensors(goldens):
    folder = goldens / "fusion" / "t5a" / "adapters"
    got = torch_pickle.load(folder / "lora_0_bin" / "adapter_model.bin")
    want = load_file(folder / "lora_0" / "adapter_model.safetensors")
    assert got.keys() == want.keys()
    for key, array in want.items():
        assert got[key].dtype == array.dtype
        np.testing.assert_array_equal(got[key], array)
        assert not got[key].flags.writeable and not got[key].flags.owndata


def test_zip_views_share_one_storage(tmp_path):
    storage = _storage("FloatStorage", "0", 24)
    content = OrderedDict(
        whole=_tensor(storage, 0, (4, 6), (6, 1)),
        transposed=_tensor(storage, 0, (6, 4), (1, 6)),
        part=_tensor(storage, 7, (2, 3), (6, 2), None),
        scalar=_tensor(storage, 5, (), ()),
        expanded=_tensor(storage, 3, (2, 2), (0, 1)),
        empty=_tensor(storage, 0, (0, 6), (6, 1)),
        parameter=_Call(
            _Global("torch._utils", "_rebuild_parameter"),
            _tensor(storage, 6, (6,), (1,)),
            True,
            OrderedDict(),
        ),
    )
    path = tmp_path / "x.bin"
    members = [("byteorder", b"little"), (".format_version", b"1"), ("unheard_of", b"?")]
    _write_zip(path, content, {"0": _NUMBERS.tobytes()}, members=members)
    got = torch_pickle.load(path)
    whole = _NUMBERS.reshape(4, 6)
    np.testing.assert_array_equal(got["whole"], whole)
    np.testing.assert_array_equal(got["transposed"], whole.T)
    np.testing.assert_array_equal(got["part"], whole[1:3, 1::2])
    np.testing.assert_array_equal(got["scalar"], np.float32(5))
    np.testing.assert_array_equal(got["expanded"], [[3, 4], [3, 4]])
    assert got["scalar"].shape == () and got["empty"].shape == (0, 6)
    np.testing.assert_array_equal(got["parameter"], whole[1])
    assert np.shares_memory(got["whole"], got["transposed"])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("HalfStorage", np.float16),
        ("DoubleStorage", np.float64),
        ("LongStorage", np.int64),
        ("BoolStorage", np.bool_),
    ],
)
def test_dtypes(tmp_path, kind, dtype):
    values = np.array([0, 1, 1, 0, 1, 0]).astype(dtype)
    path = tmp_path / "x.bin"
    _write_zip(path, {"x": _tensor(_storage(kind, "0", 6), 0, (2, 3), (3, 1))}, {"0": values.tobytes()})
    got = torch_pickle.load(path)["x"]
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, values.reshape(2, 3))


def test_typed_rebuild_reads_float8(tmp_path):
    values = np.array([0.5, -2, 448, 0], ml_dtypes.float8_e4m3fn)
    untyped = _Persistent(("storage", _Global("torch.storage", "UntypedStorage"), "0", "cpu", 4))
    rebuild = _Global("torch._utils", "_rebuild_tensor_v3")
    dtype = _Global("torch", "float8_e4m3fn")
    path = tmp_path / "x.bin"
    content = {"x": _Call(rebuild, untyped, 1, (3,), (1,), False, OrderedDict(), dtype)}
    _write_zip(path, content, {"0": values.tobytes()})
    got = torch_pickle.load(path)["x"]
    assert got.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(got, values[1:])


def test_legacy_pickles_with_a_storage_view(tmp_path):
    other = np.array([9, 8], np.float16)
    content = OrderedDict(
        a=_tensor(_storage("FloatStorage", "17", 24, None), 2, (2, 3), (1, 4)),
        b=_tensor(_storage("HalfStorage", "5", 2, None), 0, (2,), (1,)),
        c=_tensor(_storage("FloatStorage", "17", 24, ("view", 6, 12)), 1, (3,), (2,)),
    )
    path = tmp_path / "x.bin"
    _write_legacy(path, content, {"5": (2, other.tobytes()), "17": (24, _NUMBERS.tobytes())})
    got = torch_pickle.load(path)
    np.testing.assert_array_equal(got["a"], [[2, 6, 10], [3, 7, 11]])
    np.testing.assert_array_equal(got["b"], other)
    np.testing.assert_array_equal(got["c"], [7, 9, 11])


def test_a_tar_archive_is_refused(tmp_path):
    path = tmp_path / "x.bin"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    with pytest.raises(ValueError, match=r"x\.bin: a tar archive, .* save it as safetensors"):
        torch_pickle.load(path)


class _Attack:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("container", ["zip", "legacy", "bare pickle"])
def test_pickle_asking_for_a_system_call_is_refused(tmp_path, container):
    witness = tmp_path / "witness"
    attack = {"x": _Attack(os.system, f"touch {witness}")}
    path = tmp_path / "x.bin"
    {
        "zip": lambda: _write_zip(path, attack, {}),
        "legacy": lambda: _write_legacy(path, attack, {}),
        "bare pickle": lambda: path.write_bytes(pickle.dumps(attack)),
    }[container]()
    with pytest.raises(ValueError, match=r"x\.bin: its pickle asks for (posix|nt)\.system.*nothing was exec"):
        torch_pickle.load(path)
    assert not witness.exists()
    pickle.loads(pickle.dumps(attack))  # the attack is a real one
    assert witness.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("__builtin__", "getattr"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_wrapper_subclass"),
        ("collections", "namedtuple"),
        ("lorafusion_jax.io.torch_pickle", "load"),
    ],
)
def test_any_other_global_is_refused_by_name(tmp_path, module, name):
    path = tmp_path / "x.bin"
    _write_zip(path, {"x": _Call(_Global(module, name), "1 + 1")}, {})
    with pytest.raises(ValueError, match=f"asks for {module}.{name}, which no tensor needs: refused"):
        torch_pickle.load(path)


def _entry(key, value=b"N"):
    return b"\x80\2}" + key + value + b"s."


_X = b"U\1x"
_TWICE = b"q\0h\0"  # keep the top of the stack and push it once more
_LIST_BOMB = b"]q\0" + b"]h\0ah\0aq\0" * 90
_BFLOAT16 = b"ctorch\nbfloat16\n"
# What np.dtype.__setstate__ takes, with another byte order.
_DTYPE_STATE = b"(K\3U\1>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0t"
_ORDERED_DICT = b"ccollections\nOrderedDict\nq\1"
_PAIRS = b"](" + (_X + b"N\x86") * 50_000 + b"eq\0"
_LARGE = {
    "a deep key": (_entry(b")" + b"\x85" * 150_000), "entry <tuple> holds a NoneType"),
    "deep": (_entry(_X, b"}" + b"U\1y}" * 150_000 + b"s" * 150_000), "'x' holds a dict: expected a flat"),
    "a far memo": (_entry(_X, b"Nr" + struct.pack("<I", 250_000_000)), "'x' holds a NoneType"),
    "pairs": (_entry(_X, b"(" + _PAIRS + _ORDERED_DICT + b"h\1h\0\x85R" * 20_000 + b"t"), "'x' holds a tuple"),
    "opcodes": (_entry(_X, b"(" + b"}" * (1 << 21) + b"t"), "more than 1,048,576 opcodes"),
}
_LOAD_ALL = """
import json, resource, sys
from pathlib import Path
from lorafusion_jax.io import torch_pickle
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
messages = {}
for path in map(Path, sys.argv[1:]):
    try:
        torch_pickle.load(path)
    except ValueError as error:
        messages[path.name] = str(error)
kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([messages, kilobytes]))
"""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(_entry(_X, _BFLOAT16 + _DTYPE_STATE + b"b"), "wants torch.bfloat16 changed", id="a dtype"),
        pytest.param(
            _entry(_X, b"ctorch._utils\n_rebuild_tensor_v2\n}b"), "wants torch._utils._rebuild.* changed", id="a method"
        ),
        pytest.param(
            _entry(_X, _BFLOAT16 + b")R"), "a call of torch.bfloat16 that does not rebuild a tensor", id="a call"
        ),
        pytest.param(_entry(_X, b"U\1y)R"), "wants a str called", id="a call of no function"),
        pytest.param(_entry(_X, _BFLOAT16 + b")\x81"), "the opcode b'.x81'", id="a new object"),
        pytest.param(_entry(b")" + (_TWICE + b"\x86") * 90), "entry <tuple> holds a NoneType", id="a key of 2 ** 90"),
        pytest.param(_entry(_X, b")" + (_TWICE + b"\x86") * 90), "'x' holds a tuple", id="a value of 2 ** 90"),
        pytest.param(_entry(_X, b"(" + _LIST_BOMB + b"t"), "'x' holds a tuple", id="a list of 2 ** 90"),
        pytest.param(
            b"\x80\2((" + _LIST_BOMB + b"tctorch\nFloatStorage\nU\0010U\3cpuK\1tQ.",
            "refers to a <tuple>",
            id="a tag of 2 ** 90 lists",
        ),
        pytest.param(b"\x80\2]q\0h\0aQ.", "a storage is described by 5 or 6 values", id="a list in itself"),
        pytest.param(_entry(b"X" + struct.pack("<I", 1 << 31)), "a string of 2,147,483,648 bytes", id="a long string"),
        pytest.param(_entry(b"U\xff" + b"k" * 255), "entry 'kkkkk.{,30}kkk' holds", id="a long name"),
    ],
)
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_hostile_pickles_cost_little_and_change_nothing(tmp_path, container, content, message):
    path = tmp_path / "x.bin"
    if container == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", content)
    else:
        head = [_pickled(part) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        path.write_bytes(b"".join(head) + content + b"\x80\2].")
    with pytest.raises(ValueError, match=rf"x\.bin: .*{message}") as caught:
        torch_pickle.load(path)
    assert len(str(caught.value)) < 500
    assert np.dtype(ml_dtypes.bfloat16).byteorder == "="


def test_large_hostile_pickles_end_soon_in_little_memory(tmp_path):
    # In a process of their own: Python's unpickler dies of the first, and types are not checked at run time there.
    paths = [tmp_path / name for name in _LARGE]
    for path, (content, _message) in zip(paths, _LARGE.values(), strict=True):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", content)
    command = [sys.executable, "-c", _LOAD_ALL, *paths]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    messages, kilobytes = json.loads(done.stdout)
    for path, (_content, message) in zip(paths, _LARGE.values(), strict=True):
        assert message in messages[path.name]
        assert len(messages[path.name]) < 500
    assert kilobytes < 300_000


@pytest.mark.parametrize(
    ("size", "stride"),
    [((2_000_000_000, 96), (0, 1)), ((1 << 61,), (0,)), ((1 << 40, 1 << 40), (0, 0)), ((2,) * 60, (0,) * 60)],
)
def test_strides_cannot_make_a_small_file_large(tmp_path, size, stride):
    path = tmp_path / "x.bin"
    _write_zip(path, {"x": _tensor(_storage("FloatStorage", "0", 96), 0, size, stride)}, {"0": bytes(4 * 96)})
    with pytest.raises(ValueError, match=r"x\.bin: its [\d,]+ bytes claim to be tensors of|60 dimensions"):
        torch_pickle.load(path)


def test_compressed_members_are_refused_unread(tmp_path):
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        content = {"x": _tensor(_storage("FloatStorage", "0", 24), 0, (24,), (1,))}
        archive.writestr("x/data.pkl", _pickled(content), zipfile.ZIP_STORED)
        archive.writestr("x/data/0", bytes(50_000_000))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"x\.bin: 'x/data/0' is compressed or encrypted, unlike torch.save's"):
        torch_pickle.load(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize("numel", [-3, -(1 << 40), 1 << 61])
def test_storages_cannot_lead_back_into_the_file(tmp_path, numel):
    path = tmp_path / "x.bin"
    content = {"x": _tensor(_storage("FloatStorage", "0", 24, None), 0, (24,), (1,))}
    _write_legacy(path, content, {"0": (numel, _NUMBERS.tobytes())})
    with pytest.raises(ValueError, match=f"{path}: truncated or corrupt"):
        torch_pickle.load(path)


def test_a_state_dict_keeps_no_attributes_and_python_2_spells_it_by_pairs(tmp_path):
    tensor = _pickled(_tensor(_storage("FloatStorage", "0", 24), 0, (24,), (1,)))[2:-1]
    content = b"\x80\2ccollections\nOrderedDict\n]](" + _X + tensor + b"ea\x85R}U\t_metadataNsb."
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", content)
        archive.writestr("x/data/0", _NUMBERS.tobytes())
    np.testing.assert_array_equal(torch_pickle.load(path)["x"], _NUMBERS)


@pytest.mark.parametrize(
    ("size", "stride", "offset", "numel"),
    [
        ((25,), (1,), 0, 24),
        ((4,), (1,), 21, 24),
        ((2, 2), (24, 1), 0, 24),
        ((2,), (-1,), 0, 24),
        ((8,), (1,), -1, 24),
        ((24,), (1,), 0, 23),
        ((25,), (1,), 0, 1 << 40),
    ],
)
def test_a_view_cannot_leave_its_storage(tmp_path, size, stride, offset, numel):
    path = tmp_path / "x.bin"
    content = {"x": _tensor(_storage("FloatStorage", "0", numel), offset, size, stride)}
    _write_zip(path, content, {"0": _NUMBERS.tobytes()}, members=[("data/1", b"secret" * 20)])
    with pytest.raises(ValueError, match=r"x\.bin: truncated or corrupt"):
        torch_pickle.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list: expected a dict of tensors"),
        ({"epoch": 3}, "entry 'epoch' holds a int: expected a flat dict"),
        ({"state": {"x": 1}}, "entry 'state' holds a dict: expected a flat dict"),
        ({7: _tensor(_storage("FloatStorage", "0", 1), 0, (1,), (1,))}, "entry 7 holds a tensor"),
        ({"x": _tensor(_storage("FloatStorage", "0", 1), 0, (1,), (1,), {"neg": True})}, "resolve_neg"),
        ({"x": _tensor(_storage("FloatStorage", "1", 1), 0, (1,), (1,))}, "truncated or corrupt"),
        ({"x": _Persistent(("module", "torch.nn.Linear"))}, "truncated or corrupt"),
        ({"x": _Persistent(("module", _Global("torch", "float32"), "0", "cpu", 1))}, "refers to a 'module'"),
    ],
)
def test_content_that_is_no_dict_of_tensors(tmp_path, content, message):
    path = tmp_path / "x.bin"
    _write_zip(path, content, {"0": b"\0\0\0\0"})
    with pytest.raises(ValueError, match=message):
        torch_pickle.load(path)


def test_big_endian_files_are_refused(tmp_path):
    path = tmp_path / "x.bin"
    _write_zip(path, {}, {}, members=[("byteorder", b"big")])
    with pytest.raises(ValueError, match="big-endian machine: re-save"):
        torch_pickle.load(path)


def test_zip_without_pickle_and_other_files(tmp_path):
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(ValueError, match=r"0 members data\.pkl"):
        torch_pickle.load(path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"truncated or corrupt, not a file that torch\.save wrote"):
        torch_pickle.load(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="the file is empty: fetch it again"):
        torch_pickle.load(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(ValueError, match="Git LFS pointer.*git lfs pull"):
        torch_pickle.load(path)


def _both_containers(folder):
    def content(*view):
        storage = _storage("FloatStorage", "0", 24, *view)
        return OrderedDict(a=_tensor(storage, 0, (4, 6), (6, 1)), b=_tensor(storage, 3, (2, 3), (1, 2)))

    _write_zip(folder / "zip", content(), {"0": _NUMBERS.tobytes()})
    _write_legacy(folder / "legacy", content(None), {"0": (24, _NUMBERS.tobytes())})
    return [folder / name for name in ("zip", "legacy")]


def test_truncated_files_say_so(tmp_path):
    for path in _both_containers(tmp_path):
        whole = path.read_bytes()
        assert torch_pickle.load(path)["a"].shape == (4, 6)
        for length in (4, len(whole) // 3, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match="truncated or corrupt|asks for"):
                torch_pickle.load(path)


def test_damaged_bytes_give_values_or_a_clear_error(tmp_path):
    draw = random.Random(0)
    for path in _both_containers(tmp_path):
        whole = path.read_bytes()
        outcomes = set()
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(draw.randint(1, 3)):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            path.write_bytes(damaged)
            try:
                torch_pickle.load(path)
                outcomes.add("values")
            except ValueError as error:
                assert str(error).startswith(f"{path}: ")
                outcomes.add("error")
        assert outcomes == {"values", "error"}


@pytest.mark.peft
@pytest.mark.parametrize("zipped", [True, False])
def test_files_that_torch_writes(tmp_path, zipped):
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
        "float8": base.to(torch.float8_e5m2),
        "int8": (base * 10).to(torch.int8),
        "int64": torch.arange(5),
        "uint16": torch.arange(5).to(torch.uint16),
        "bool": base > 0,
        "parameter": layer.weight,
    }
    if not zipped:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in ("float8", "uint16")}
    path = tmp_path / "x.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    got = torch_pickle.load(path)
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert str(got[name].dtype) == str(tensor.dtype).removeprefix("torch."), name
        assert got[name].shape == tuple(tensor.shape), name
        np.testing.assert_array_equal(got[name].astype(np.float64), tensor.detach().double().numpy(), err_msg=name)
    assert np.shares_memory(got["plain"], got["shared"])


@pytest.mark.peft
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_of_a_module(tmp_path, zipped):
    import torch

    layer = torch.nn.Linear(3, 4)
    torch.save(layer.state_dict(), tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    got = torch_pickle.load(tmp_path / "x.bin")
    np.testing.assert_array_equal(got["weight"], layer.weight.detach().numpy())
    torch.save(layer, tmp_path / "y.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        torch_pickle.load(tmp_path / "y.bin")


@pytest.mark.peft
def test_torch_reads_the_files_written_by_hand_alike(tmp_path):
    import torch

    for path in _both_containers(tmp_path):
        want = torch.load(path, map_location="cpu", weights_only=False)
        for name, array in torch_pickle.load(path).items():
            np.testing.assert_array_equal(array, want[name].numpy())
