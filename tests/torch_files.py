"""Files as `torch.save` writes them, made byte by byte without torch."""

import io
import pickle
import zipfile
from collections import OrderedDict


class Global:
    """Pickles as a bare reference to `module.name`, which need not exist here."""

    def __init__(self, module, name):
        self.module = module
        self.name = name


class Call:
    """Pickles as the call of a global."""

    def __init__(self, function, *args):
        self.function = function
        self.args = args


class Pickler(pickle._Pickler):
    """Writes the pickles of torch.save without torch: globals by name, storages as persistent ids."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_global_by_name(self, obj):
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())

    def save_call(self, obj):
        self.save(obj.function)
        self.save(obj.args)
        self.write(pickle.REDUCE)

    dispatch[Global] = save_global_by_name
    dispatch[Call] = save_call

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Persistent) else None


class Persistent:
    def __init__(self, pid):
        self.pid = pid


_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


def pickled(obj):
    file = io.BytesIO()
    Pickler(file, 2).dump(obj)
    return file.getvalue()


def storage_of(kind, key, numel):
    return Persistent(("storage", Global("torch", kind), key, "cuda:0", numel))


def tensor_of(storage, offset, size, stride, *metadata):
    return Call(
        _REBUILD, storage, offset, size, stride, False, OrderedDict(), *metadata
    )


def write_zip(path, content, storages, *, members=()):
    """Write a file as torch.save does; bytes as content are the pickle itself."""
    content = content if isinstance(content, bytes) else pickled(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("anything/data.pkl", content)
        archive.writestr("anything/version", "3")
        for name, data in (
            *members,
            *((f"data/{key}", data) for key, data in storages.items()),
        ):
            archive.writestr(f"anything/{name}", data)
    return path


def write_tensors(path, tensors):
    """Write arrays by name, each with its own storage."""
    kinds = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage"}
    content = {}
    for key, (name, array) in enumerate(tensors.items()):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        of_array = storage_of(kinds[str(array.dtype)], str(key), array.size)
        content[name] = tensor_of(of_array, 0, array.shape, strides)
    write_zip(
        path,
        content,
        {str(key): array.tobytes() for key, array in enumerate(tensors.values())},
    )
