"""What the experiments share: the embedded small pool, the methods by name, a folder to start afresh in."""

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorafusion_jax import FuseOptions, Recipe, fuse
from lorafusion_jax.train.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
SMALL = ROOT / "examples" / "small"

METHODS: dict[str, dict[str, Any]] = {
    "zero-shot": {"method": "zero-shot"},
    "LoraHub": {"method": "lorahub"},
    "coefficients only": {"method": "coefficients"},
    "LoRAFusion": {"method": "fusion"},
    "random pool": {"method": "fusion", "control": "random"},
    "LoRA": {"method": "lora"},
}


@contextlib.contextmanager
def fresh_folder(folder: Path) -> Iterator[None]:
    """Make an empty folder and keep other processes out of it; what was there is kept beside it, with a number.

    Raises:
      ValueError: another process is writing to it.
    """
    if folder.exists():
        with RunFolder(folder).locked():
            number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.{n}").exists())
            folder.rename(folder.with_name(f"{folder.name}.{number}"))
    with RunFolder(folder).locked():
        yield


def convert_small_pool(out: Path) -> None:
    """Convert the embedded adapters as a user would."""
    adapters = sorted(map(str, (SMALL / "adapters").iterdir()))
    script = [sys.executable, ROOT / "convert_peft_weights.py"]
    subprocess.run([*script, "--base", SMALL / "base", "--out", out, "--adapters", *adapters], check=True)


def fuse_small(
    task: str, method: str, recipe: Recipe, *, pool: Path, seeds: tuple[int, ...], out: Path, name: str
) -> dict[str, Any]:
    """Run one of METHODS on one of the embedded tasks, all seeds in one program, and return the results."""
    options = FuseOptions(
        base=str(SMALL / "base"),
        pool=str(pool),
        task=str(SMALL / "tasks" / task),
        seeds=seeds,
        out=out,
        name=name,
        recipe=recipe,
        **METHODS[method],
    )
    return fuse(options)
