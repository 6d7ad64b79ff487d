"""Loading and converting adapters of FLAN-T5-large's shape: time against PEFT, memory against the output.

    python benchmarks/convert.py [--json]

The 20 adapters (rank 16 on q and v, float32, random) are written to a temporary folder first, so the page
cache is warm. PEFT attaches them to a PyTorch base that is in memory already; here they become the device
arrays of a pool. Needs the `peft` extra, 8 GB of memory and 5 GB of disk.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import _measure
import jax
import numpy as np
from _measure import case

from lorafusion_jax.io.peft import write_adapter
from lorafusion_jax.io.pool import read_pool
from lorafusion_jax.models.sites import linear_shapes, locate
from lorafusion_jax.models.t5 import T5Config

_SHAPE = T5Config(
    vocab_size=32128, d_model=1024, d_kv=64, d_ff=2816, num_heads=16, num_layers=24, num_decoder_layers=24
)
_FIELDS = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers")
_JSON: dict[str, Any] = {field: getattr(_SHAPE, field) for field in _FIELDS} | {"feed_forward_proj": "gated-gelu"}
_RANK = 16
_ADAPTERS = 20
_CONVERTED = 196
_REPEATS = 7

# Run in a process of its own, whose peak is that of the conversion: prints seconds and bytes.
_CONVERT = """
import pathlib, sys, time
import tqdm
from orbax.checkpoint import v1
from lorafusion_jax.io.convert import ConvertOptions, convert

def memory(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

base, out, *adapters = sys.argv[1:]
before, began = memory("VmRSS"), time.perf_counter()
convert(ConvertOptions(base=base, out=pathlib.Path(out), adapters=tuple(adapters)))
seconds = time.perf_counter() - began
print(seconds, memory("VmHWM") - before, sum(p.stat().st_size for p in pathlib.Path(out).rglob("*") if p.is_file()))
"""


def main() -> None:
    options = _measure.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = _write_adapters(folder)
        cases = [_against_peft(sources), _peak_memory(folder, sources)]
    _measure.show(cases, as_json=options.json)


def _write_adapters(folder: Path) -> list[str]:
    (folder / "base").mkdir()
    (folder / "base/config.json").write_text(json.dumps(_JSON | {"model_type": "t5"}))
    rng, sources = np.random.default_rng(0), []
    for n in range(_ADAPTERS):
        tensors = {}
        for path, (d_in, d_out) in linear_shapes(_SHAPE).items():
            if path.endswith((".q", ".v")):
                key = f"base_model.model.{path}.lora_"
                tensors[f"{key}A.weight"] = rng.standard_normal((_RANK, d_in), np.float32)
                tensors[f"{key}B.weight"] = rng.standard_normal((d_out, _RANK), np.float32)
        adapter = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 32, "target_modules": ["q", "v"]}
        adapter |= {"task_type": "SEQ_2_SEQ_LM", "inference_mode": True}
        write_adapter(folder / f"adapter_{n:02d}", adapter, tensors)
        sources.append(str(folder / f"adapter_{n:02d}"))
    return sources


def _against_peft(sources: list[str]) -> dict[str, Any]:
    """Time both from 20 folders to weights in memory, and check that they are the same weights."""
    theirs, model = _peft(sources)
    jax.devices()  # starts the backend, as PyTorch's has been
    ours = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(read_pool(sources, _SHAPE))
        ours.append(time.perf_counter() - began)
    pool = jax.device_get(read_pool(sources, _SHAPE))
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A") and (place := locate(name)) is not None:
            site, index = place
            for n in range(_ADAPTERS):
                a, b = (factor[str(n)].weight.numpy(force=True) for factor in (layer.lora_A, layer.lora_B))
                assert np.array_equal(np.asarray(pool.A[site])[index, n], a.T)
                assert np.array_equal(np.asarray(pool.B[site])[index, n], layer.scaling[str(n)] * b.T)
    seconds = float(np.median(ours))
    return case(
        "20 adapters of FLAN-T5-large's shape, from PEFT folders to arrays: PEFT's seconds / ours",
        theirs / seconds,
        20.0,
        40.0,
        higher_is_better=True,
        peft_seconds=theirs,
        our_seconds_median=seconds,
        our_seconds=ours,  # the first also gets its memory from the system for the first time
        cores=len(os.sched_getaffinity(0)),
    )


def _peft(sources: list[str]) -> tuple[float, Any]:
    import peft
    import torch
    import transformers

    # Without the time that initialising 783 million numbers takes: they play no part.
    with torch.device("meta"):
        base = transformers.T5ForConditionalGeneration(transformers.T5Config(**_JSON))
    base = base.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.fill_(0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        began = time.perf_counter()
        model = peft.PeftModel.from_pretrained(base, sources[0], adapter_name="0")
        for n, source in enumerate(sources[1:], 1):
            model.load_adapter(source, adapter_name=str(n))
        return time.perf_counter() - began, model


def _peak_memory(folder: Path, sources: list[str]) -> dict[str, Any]:
    """Convert 196 adapters, hard links to the 20 files, in a process of its own."""
    adapters = [folder / f"link_{n:03d}" for n in range(_CONVERTED)]
    for n, adapter in enumerate(adapters):
        adapter.mkdir()
        for file in Path(sources[n % len(sources)]).iterdir():
            os.link(file, adapter / file.name)
    command = [sys.executable, "-c", _CONVERT, str(folder / "base"), str(folder / "pool"), *map(str, adapters)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak, written = map(float, done.stdout.splitlines()[-1].split())
    return case(
        "196 adapters of FLAN-T5-large's shape converted: peak memory above the imports / output bytes",
        peak / written,
        2.0,
        0.1,
        peak_bytes=peak,
        output_bytes=written,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
