"""The embedded base and pool cut to the first block of either stack: the same files, and half as much to compile."""

import shutil
from pathlib import Path

import numpy as np
from json_files import change_json
from safetensors.numpy import load_file, save_file

SMALL = Path(__file__).resolve().parent.parent / "examples" / "small"


def cut(out, *, adapters=4):
    """Write `out`/base and `out`/pool, the first adapters of the embedded ones (all for None), and return both."""
    base = out / "base"
    pool = out / "pool"
    sources = [
        path.parent
        for path in sorted((SMALL / "adapters").glob("*/*.safetensors"))[:adapters]
    ]
    for source, target in [
        (SMALL / "base", base),
        *((source, pool / source.name) for source in sources),
    ]:
        shutil.copytree(source, target)
        change_tensors(target, _first_blocks)
    change_json(base / "config.json", {"num_layers": 1, "num_decoder_layers": 1})
    return base, pool


def _first_blocks(tensors):
    return {name: value for name, value in tensors.items() if "block.1." not in name}


def change_tensors(folder, change):
    """Replace the tensors of the one file in a folder by what a function makes of them."""
    (file,) = folder.glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def copy_as_dora(adapter, folder):
    """Copy an adapter, and give it magnitudes."""

    def with_magnitudes(tensors):
        sizes = {name: len(b) for name, b in tensors.items() if "lora_B" in name}
        return tensors | {
            name.replace("lora_B.weight", "lora_magnitude_vector"): np.linspace(
                0.1, 2, size, dtype=np.float32
            )
            for name, size in sizes.items()
        }

    shutil.copytree(adapter, folder)
    change_json(folder / "adapter_config.json", {"use_dora": True})
    change_tensors(folder, with_magnitudes)


def examples(folder):
    """Write `folder`/examples, where all is as in examples/ but the base and the adapters, which are cut.

    The two adapters that are pickles are left out.
    """
    cut_examples = folder / "examples"
    small = cut_examples / "small"
    _, pool = cut(small, adapters=None)
    pool.rename(small / "adapters")
    for source, target in ((SMALL.parent, cut_examples), (SMALL, small)):
        for path in source.iterdir():
            if not (target / path.name).exists():
                (target / path.name).symlink_to(path)
    return cut_examples
