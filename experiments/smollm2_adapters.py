"""Train the three adapters of SmolLM2 that `make demo-llm` fuses, one for each task of inflection but the last.

    python experiments/smollm2_adapters.py --out examples/smollm2/adapters

LoRA of rank 4 on queries and values, three passes over the task's training rows; ten minutes on two cores.
"""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tyro
from _smollm2 import EXAMPLES, HUB_ID, PROMPTS, UNSEEN, base

from lorafusion_jax import PRESETS, FuseOptions, cli, fuse
from lorafusion_jax.files import write_text
from lorafusion_jax.runs.export import ExportOptions, export

RANK, EPOCHS, BATCH = 4, 3, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the script.

    Attributes:
      out: folder for a PEFT adapter folder of each task.
    """

    out: Path


def main(arguments: Sequence[str] = ()) -> None:
    """Train, export and score one adapter for each task."""
    options = tyro.cli(Options, args=list(arguments), description=__doc__)
    recipe = dataclasses.replace(PRESETS["default"], epochs=EPOCHS, batch_size=BATCH, lora_rank=RANK, max_new_tokens=8)
    for name, prompt in PROMPTS.items():
        if name == UNSEEN:
            continue
        with tempfile.TemporaryDirectory() as folder:
            results = fuse(
                FuseOptions(
                    base=str(base()),
                    task=str(EXAMPLES / "tasks" / name),
                    prompt=prompt,
                    method="lora",
                    recipe=recipe,
                    seeds=(1,),
                    train_rows=1000,
                    out=Path(folder),
                    name=name,
                )
            )
            export(ExportOptions(run=Path(folder) / name, out=options.out / name))
        # The file's path on this machine means nothing elsewhere.
        config = options.out / name / "adapter_config.json"
        said = json.loads(config.read_text()) | {"base_model_name_or_path": HUB_ID}
        write_text(config, json.dumps(said, indent=2, sort_keys=True) + "\n")
        print(f"{name}: {results['exact_match']:.1f} % of {results['test_rows']} test rows")


if __name__ == "__main__":
    cli.run(main)
