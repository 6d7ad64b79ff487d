"""What `lorafusion cost` is asked."""

import dataclasses
from pathlib import Path

from ...runs.options import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostOptions:
    """Print what one new task costs with every method: writes, energy, time, wear; and every token after that.

    Ranges from low to high over the constants' published values; no weights are loaded.

    Examples:
      lorafusion cost --shape flan-t5-large --adapters 20 --preset isaac
      lorafusion cost --preset puma --save-constants mine.yaml
      lorafusion cost --preset puma --constants mine.yaml --tokens-per-task 100000

    Attributes:
      shape: a name, such as flan-t5-large, or the folder or hub id of a base model, of which config.json is read.
      adapters: modules that are fused.
      rank: of every module, and of LoRA and DoRA.
      vera_rank: of VeRA's random matrices.
      targets: the linear maps that are adapted, wherever they occur: of q k v o wi wi_0 wi_1 wo.
      preset: of the arrays: isaac, puma, raella, neurram, or a .yaml or .json file.
      constants: a file that replaces the table of constants.
      save_constants: write the table in use to this .yaml or .json file, to edit it.
      tokens_per_task: tokens that are generated before the next task comes.
      epochs: passes over the training rows.
      train_rows: rows that train and validate.
      batch_size: rows in a step.
      source: tokens of an input.
      target: tokens of an answer.
      evaluations: of LoraHub's search.
      json: write everything to this file.
    """

    shape: str = "flan-t5-large"
    adapters: int = 20
    rank: int = 16
    vera_rank: int = Recipe.vera_rank
    targets: tuple[str, ...] = Recipe.lora_targets
    preset: str = "isaac"
    constants: Path | None = None
    save_constants: Path | None = None
    tokens_per_task: int = 1000
    epochs: int = Recipe.epochs
    train_rows: int = 100
    batch_size: int = Recipe.batch_size
    source: int = 128
    target: int = 8
    evaluations: int = Recipe.evaluations
    json: Path | None = None

    def __post_init__(self):
        numbers = ("adapters", "rank", "vera_rank", "tokens_per_task", "epochs", "train_rows", "batch_size")
        for name in (*numbers, "source", "target", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: wanted at least 1")
        if self.json is not None and self.json.suffix != ".json":
            raise ValueError(f"json is {self.json}: wanted a file ending in .json")

    @property
    def recipe(self) -> Recipe:
        """The recipe that these numbers are of."""
        return Recipe(
            modules=self.adapters,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lora_rank=self.rank,
            lora_targets=self.targets,
            vera_rank=self.vera_rank,
            evaluations=self.evaluations,
        )
