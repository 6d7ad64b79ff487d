"""Assumptions of a cost: the base model, the arrays, the pool and the new task."""

import dataclasses
from typing import Any

from ...methods.lorahub import LoraHubRecipe
from ...methods.vera import VeRARecipe
from ...support.checks import at_least
from ...training.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostOptions:
    """Assumptions of the cost of one new task.

    Attributes:
      shape: name of a known shape, such as flan-t5-large, or the folder, hub id or GGUF file of a base model, whose
        configuration is read.
      modules: number of modules that are fused.
      pool_size: number of modules that are ranked by one backward pass over the training rows, to choose those that are
        fused; by default there are no more than these, and none is ranked.
      bases: numbers of directions of shared bases (`lorafusion convert --basis`); each has a cost.
      rank: rank of every module, and of LoRA and DoRA.
      vera_rank: rank of VeRA's random matrices.
      targets: the linear maps that are adapted, wherever they occur; by default the family's own choice.
      crossbar: configuration of the arrays: isaac, puma, raella, neurram, aihwkit, a .yaml or .json file, or a folder
        of chips or preparations.
      tokens_per_task: number of tokens that are generated for a task.
      epochs: passes over the training rows.
      train_rows: number of rows for training and validation.
      batch_size: number of rows in a step.
      source: number of tokens of an input.
      target: number of tokens of an answer.
      evaluations: number of evaluations in LoraHub's search.
    """

    shape: str = "flan-t5-large"
    modules: int = 20
    pool_size: int | None = None
    bases: tuple[int, ...] = (16, 32)
    rank: int = 16
    vera_rank: int = VeRARecipe.vera_rank
    targets: tuple[str, ...] | None = None
    crossbar: str = "isaac"
    tokens_per_task: int = 1000
    epochs: int = Recipe.epochs
    train_rows: int = 100
    batch_size: int = Recipe.batch_size
    source: int = 128
    target: int = 8
    evaluations: int = LoraHubRecipe.evaluations

    def __post_init__(self):
        numbers = (
            "modules",
            "rank",
            "vera_rank",
            "tokens_per_task",
            "epochs",
            "train_rows",
            "batch_size",
        )
        at_least(
            1,
            **{
                name: getattr(self, name)
                for name in (*numbers, "source", "target", "evaluations")
            },
        )
        if self.stored < self.modules:
            raise ValueError(
                f"pool_size is {self.pool_size}: expected at least {self.modules}, the number of modules"
            )
        for k in self.bases:
            if not 1 <= k <= self.stored * self.rank:
                raise ValueError(
                    f"a basis of {k} directions: expected 1 to {self.stored * self.rank}, the pool's rank"
                )

    @property
    def stored(self) -> int:
        """Number of modules in the pool."""
        return self.modules if self.pool_size is None else self.pool_size

    @property
    def numbers(self) -> dict[str, Any]:
        """Numbers of recipes by name; a method has those that its own recipe has."""
        return {
            "modules": self.modules,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "lora_rank": self.rank,
            "lora_targets": self.targets,
            "vera_rank": self.vera_rank,
            "evaluations": self.evaluations,
        }
