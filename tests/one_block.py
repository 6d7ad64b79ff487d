"""The embedded base and pool cut to the first block of either stack: the same files, and half as much to compile."""

import shutil
from pathlib import Path

from json_files import read_json, write_json
from safetensors.numpy import load_file, save_file

SMALL = Path(__file__).resolve().parent.parent / "examples" / "small"


def cut(out: Path, *, adapters: int | None = 4) -> tuple[Path, Path]:
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
        (weights,) = target.glob("*.safetensors")
        kept = {
            name: tensor
            for name, tensor in load_file(weights).items()
            if "block.1." not in name
        }
        save_file(kept, weights, metadata={"format": "pt"})
    config = read_json(base / "config.json")
    write_json(
        base / "config.json", config | {"num_layers": 1, "num_decoder_layers": 1}
    )
    return base, pool


def examples(folder: Path) -> Path:
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
