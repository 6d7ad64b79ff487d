"""Loading adapters of FLAN-T5-large's shape: time against PEFT.

    python benchmarks/convert.py [--json]

The 20 adapters (rank 16 on q and v, float32, random) are written to a temporary folder first, so the page
cache is warm. PEFT attaches them to a PyTorch base that is in memory already; here they become the device
arrays of a pool. Needs the `peft` extra and 8 GB of memory.
"""

import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import _measure
import jax
import numpy as np
from _adapters import write_adapters
from _measure import case
from _model import config_of, hf_config

from lorafusion_jax import places, read_pool

_SHAPE = config_of("flan-t5-large")
_ADAPTERS = 20
_REPEATS = 7


def main() -> None:
    options = _measure.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = _against_peft(list(map(str, write_adapters(folder, _SHAPE, _ADAPTERS))))
    _measure.show([found], as_json=options.json)


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
        if hasattr(layer, "lora_A") and (place := places(_SHAPE).get(name)) is not None:
            site, index = place
            for n in range(_ADAPTERS):
                a = layer.lora_A[str(n)].weight.numpy(force=True)
                b = layer.lora_B[str(n)].weight.numpy(force=True)
                assert np.array_equal(np.asarray(pool.A[site])[index, n], a.T)
                assert np.array_equal(
                    np.asarray(pool.B[site])[index, n], layer.scaling[str(n)] * b.T
                )
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
        config = transformers.AutoConfig.for_model(**hf_config(_SHAPE))
        base = transformers.AutoModelForSeq2SeqLM.from_config(config)
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


if __name__ == "__main__":
    main()
