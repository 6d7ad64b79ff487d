"""The original's training command, with its arguments, on its protocol (the preset `reference`).

    python experiments/train.py --epoch 20 --batch_size 10 --lr 0.02 --lora_num 20

runs as it stands on the embedded small pool. With FLAN-T5-large and LoraHub's adapters:

    python experiments/train.py --base google/flan-t5-large --pool POOL --task bbh/snarks.json --load_in_4bit
"""

import argparse
import dataclasses
from pathlib import Path

import _script

from lorafusion_jax import PRESETS, FuseOptions, fuse
from lorafusion_jax.cli.fuse import report
from lorafusion_jax.parts import run_path

_SMALL = Path(__file__).resolve().parent.parent / "examples" / "small"
_REFERENCE = PRESETS["reference"]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--epoch", type=int, default=_REFERENCE.epochs, help="passes over the training rows")
    parser.add_argument("--batch_size", type=int, default=_REFERENCE.batch_size, help="rows in a step")
    parser.add_argument("--lr", type=float, default=_REFERENCE.lr_coefficients, help="of the coefficients")
    parser.add_argument("--lora_num", type=int, default=_REFERENCE.modules, help="modules that a seed draws")
    parser.add_argument(
        "--load_in_4bit", action="store_true", help="base and pool in NF4 (the original: the base only)"
    )
    parser.add_argument("--base", default=str(_SMALL / "base"), help="folder, hub id or GGUF file")
    parser.add_argument("--pool", default=str(_SMALL / "adapters"), help="converted pool, or PEFT adapter folders")
    parser.add_argument("--task", default=str(_SMALL / "tasks" / "double_digit"), help="as in `lorafusion fuse`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="all in one program")
    parser.add_argument("--name", help="the run is written to runs/NAME; by default a new one of the task's name")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    given = parser.parse_args(arguments)
    recipe = dataclasses.replace(
        _REFERENCE,
        epochs=given.epoch,
        batch_size=given.batch_size,
        lr_coefficients=given.lr,
        modules=given.lora_num,
    )
    options = FuseOptions(
        base=given.base,
        pool=given.pool,
        task=given.task,
        seeds=tuple(given.seeds),
        name=given.name,
        recipe=recipe,
        load_in="nf4" if given.load_in_4bit else "full",
        resume=given.resume,
    )
    print(report(fuse(options), run_path(options)))


if __name__ == "__main__":
    _script.run(main)
