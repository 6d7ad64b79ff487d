"""What is to be loaded: a base, a pool and a method, without a task."""

import dataclasses
from typing import Literal, get_args

from ..methods import METHODS, fields_of, find, not_an_option
from ..methods.entry import MethodEntry, recipe_of
from ..methods.fusion import choice_of
from ..support.checks import check_uint32, one_of
from ..support.options import BaseOptions, ChatOptions, ModulesOptions, PrecisionOptions
from ..training.recipe import Recipe

Control = Literal["none", "random-factors", "shuffled", "rotated"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions(PrecisionOptions, ChatOptions, ModulesOptions, BaseOptions):
    """A base model, and the modules that a method fuses onto it.

    Attributes:
      adapters: fuse these modules, by name or index, instead of a draw by seed.
      chat: put the input into the model's own chat template, as the user's message, and learn the assistant's answer;
        rows of the task may be conversations ("messages").
      pool: a converted pool, or a folder of PEFT adapter folders; only for methods that fuse modules.
      seeds: seeds of the run: each draws its modules, its start and its order of rows; all are one program.
      method: name of the method, from the registry (`lorafusion_jax.METHODS`).
      control: `random-factors` replaces every module by a random one of the same norms. `shuffled` shuffles its layers.
        `rotated` keeps the singular values of its updates and draws the singular vectors. With a basis, a control
        replaces the directions on which the modules are projected.
      control_draw: number of the draw of a control; all seeds of a run share a draw.
      recipe: numbers of the method and of its training, of the class that the method names; a recipe of another class
        may have numbers that both share, other than the defaults.
      seed_mode: mode of the seeds: batched, or one after the other (sequential); by default the faster one here.
    """

    pool: str | None = None
    seeds: tuple[int, ...] = (1,)
    method: str = "fusion"
    control: Control = "none"
    control_draw: int = 0
    recipe: Recipe = Recipe()
    seed_mode: Literal["auto", "batched", "sequential"] = "auto"

    def __post_init__(self) -> None:
        if self.method in METHODS:
            object.__setattr__(
                self, "recipe", _recipe_for(METHODS[self.method], self.recipe)
            )

    @property
    def entry(self) -> MethodEntry:
        """The method's entry in the registry; ValueError for an unknown name."""
        return find(self.method)

    def check(self) -> None:
        """Raise ValueError for options that contradict each other, before anything is loaded."""
        entry = self.entry
        recipe = self.recipe
        recipe.check()
        if not self.seeds:
            raise ValueError("no seeds: give at least one, for example --seeds 1 2 3")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"a seed is given twice in {list(self.seeds)}: give each one once"
            )
        for seed in self.seeds:
            check_uint32(seeds=seed)
        check_uint32(control_draw=self.control_draw)
        one_of(get_args(Control), control=self.control)
        if entry.pool and self.pool is None:
            raise ValueError(
                f"the method {self.method} fuses a pool: give one with --pool"
            )
        if self.adapters and not entry.pool:
            raise ValueError(
                f"the method {self.method} fuses no modules: leave out --adapters"
            )
        if "base" in entry.groups and self.load_in != "full":
            raise ValueError(
                f"{self.method} trains weights, not 4 or 8 bits of them: leave out --load-in"
            )
        self._check_control()
        if choice_of(recipe) == "draw":
            return
        if "coefficients" not in entry.groups:
            raise ValueError(
                f"the method {self.method} has no coefficients of single modules, whose gradient would choose them: "
                "leave out --choose, or use the method fusion or coefficients"
            )
        if self.adapters:
            raise ValueError(
                "--adapters names the modules already: leave it out, or --choose"
            )

    def _check_control(self) -> None:
        if self.control == "none":
            if self.control_draw != 0:
                raise ValueError(
                    "--control-draw numbers the draws of a random control: leave it out, or give a --control"
                )
            return
        if self.load_in != "full":
            raise ValueError(
                f"the {self.control} control is drawn in full precision: leave out --load-in"
            )
        if not self.entry.pool:
            raise ValueError(
                f"the method {self.method} has no pool to replace: leave out --control"
            )


def _recipe_for(entry: MethodEntry, recipe: Recipe) -> Recipe:
    """Return a recipe in the class of a method; ValueError for a number that the method lacks."""
    if type(recipe) is entry.recipe:
        return recipe
    known_fields = fields_of(entry)
    for field in dataclasses.fields(recipe):
        if (
            field.name not in known_fields
            and getattr(recipe, field.name) != field.default
        ):
            raise ValueError(f"{field.name} is {not_an_option(field.name, entry.name)}")
    return recipe_of(entry.recipe, vars(recipe))
