"""Damaged copies of real files, drawn from a seed: fields of JSON and YAML, headers of binary files, bytes."""

import copy
import json

import ml_dtypes
import numpy as np
import yaml

# In C where PyYAML has it, ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

_FLOATS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}

_HOSTILE = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        7,
        10**9,
        2**63,
        10**30,
        -(2**63),
        0.5,
        1e308,
        -1e-300,
    ),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "../x",
        "/etc/passwd",
        "..\\x",
        "x" * 300,
        "a\0b",
        "\x1b[31mred",
        "\ud800",
    ),
    *("é", "9" * 5000, "float32[9999999, 99]"),
    *([], {}, [[]], [None], {"": 0}, [0] * 50, ["x"] * 3, {"a": {"b": [1]}}),
)


def damaged(content, suffix, draw):
    """Return the content of a file with one to three faults; nine of ten keep its format."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        structured = _STRUCTURED.get(suffix)
        try:
            content = (
                _bytes(content, draw)
                if structured is None or draw.random() < 0.1
                else structured(content, draw)
            )
        except Exception:  # an earlier fault took the format away
            content = _bytes(content, draw)
    return content


def _bytes(content, draw):
    at, other = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    start = content[:at]
    changed = (
        start,
        start + content[other:],
        start + draw.randbytes(draw.randrange(1, 9)) + content[at:],
    )
    changed += (
        start + bytes([draw.randrange(256)]) + content[at + 1 :],
        content + content[at:other],
        b"",
    )
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    return draw.choice((*changed, b"[" * 3000, b"\xff\xfe" + content, pointer))


def value(content, draw):
    """Return a value of JSON in which one place holds something else."""
    root = [copy.deepcopy(content)]
    holder, key = draw.choice([*_places(root)])
    action = draw.random()
    if action < 0.15:
        del holder[key]
    elif action < 0.25 and isinstance(holder, dict):
        holder[draw.choice(("colour", "../x", f"{key} ", ""))] = holder.pop(key)
    elif action < 0.3:
        deep = holder[key]
        for _ in range(draw.choice((3, 200, 900))):
            deep = [deep] if draw.random() < 0.5 else {"x": deep}
        holder[key] = deep
    elif action < 0.45:
        holder[key] = copy.deepcopy(draw.choice([*_places(root)])[0])
    elif action < 0.55 and isinstance(holder[key], int | float):
        holder[key] = holder[key] * draw.choice(
            (-1, 2, 1000, 10**6, 10**12)
        ) + draw.choice((0, 1, -1))
    elif action < 0.65 and isinstance(holder[key], str | list):
        holder[key] = holder[key] * draw.choice((2, 30, 1000))
    else:
        holder[key] = copy.deepcopy(draw.choice(_HOSTILE))
    return root[0] if root else None


def _places(content):
    keys = [*content] if isinstance(content, dict) else ()
    if isinstance(content, list):
        keys = range(len(content))
    for key in keys:
        yield content, key
        yield from _places(content[key])


def _json(content, draw):
    return json.dumps(value(json.loads(content), draw)).encode()


def _lines(content, draw):
    lines = content.splitlines(keepends=True)
    n = draw.randrange(len(lines))
    lines[n] = _json(lines[n], draw) + draw.choice((b"\n", b"\n", b"", b"\r\n"))
    return b"".join(lines)


def _yaml(content, draw):
    if draw.random() < 0.1:
        tags = (
            "!!int ''",
            "!!bool x",
            "!!timestamp x",
            "!!python/object/apply:os.getcwd []",
            "&a [*a]",
            "1e5",
        )
        return content + f"\nx: {draw.choice(tags)}\n".encode()
    return yaml.dump(value(yaml.load(content, _LOADER), draw), Dumper=_DUMPER).encode()


def _safetensors(content, draw):
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size]
    numbers = content[8 + size :]
    if draw.random() < 0.3:
        header, numbers = _tensor(json.loads(header), numbers, draw)
    else:
        header = _json(header, draw)
    return len(header).to_bytes(8, "little") + header + numbers


def _tensor(header, numbers, draw):
    """Give a tensor a number that is not finite, or replace its numbers by 8-bit ones without scales."""
    name = draw.choice(
        [name for name in header if header[name].get("dtype") in _FLOATS]
    )
    start, end = header[name]["data_offsets"]
    tensor = np.frombuffer(numbers[start:end], _FLOATS[header[name]["dtype"]]).copy()
    if draw.random() < 0.5:
        header[name]["dtype"] = "F8_E4M3"
        tensor = tensor.astype(ml_dtypes.float8_e4m3fn)
    else:
        tensor[draw.randrange(len(tensor))] = draw.choice((np.nan, np.inf, -np.inf))
    saved = end - start - tensor.nbytes
    for entry in header.values():
        if "data_offsets" in entry:
            entry["data_offsets"] = [
                at - saved if at >= end else at for at in entry["data_offsets"]
            ]
    return json.dumps(header).encode(), numbers[:start] + tensor.tobytes() + numbers[
        end:
    ]


def _gguf(content, draw):
    """Overwrite a number of the header: a count, a type, the length of a text or a list, a size or a place."""
    end = max(
        at
        for name in (b"output_norm.weight", b"attention.head_count")
        if (at := content.find(name)) > 0
    )
    # Numbers have four or eight bytes, and most of eight bytes are small: seven zeros follow.
    small = [at for at in range(4, end) if content[at + 1 : at + 4] == bytes(3)]
    at = draw.choice(small)
    size = 8 if content[at + 4 : at + 8] == bytes(4) else 4
    number = (
        draw.choice((0, 1, 2, 7, 12, 255, 2**31, 2**32 - 1, 10**6, 2**63, 2**64 - 1))
        % 256**size
    )
    return content[:at] + number.to_bytes(size, "little") + content[at + size :]


_STRUCTURED = {
    ".json": _json,
    ".jsonl": _lines,
    ".yaml": _yaml,
    ".safetensors": _safetensors,
    ".gguf": _gguf,
}
