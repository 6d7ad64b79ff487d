"""What every read path has: its needs, when it is chosen, how its columns lie, and its read."""

from jaxtyping import Array, Float

from ...chip.chip import Chip
from ...chip.columns import Laid, Written
from ...chip.plan import Facts, Plan
from ...mapping.adc.quantiser import Converter


class ReadPath:
    """One way to compute a read; the fastest of those that are exact is chosen.

    Attributes:
      name: the path in plans, files and `program(path=...)`.
      converts: column sums are converted; False where slices and tiles telescope.
      single_cells: the chip keeps every cell.
    """

    name: str
    converts = True
    single_cells = False

    def refusal(self, facts: Facts) -> str | None:
        """Return the reason why the path cannot compute a read exactly, or None."""
        return None

    def chosen(self, facts: Facts) -> str | None:
        """Return the reason why the path is the fastest, if no earlier one in the registry is; else None."""
        return None

    def in_models(self, plan: Plan) -> str:
        """Return the path of whole models, which often read one vector; `lookup` reads their large batches."""
        return self.name

    def lay_out(self, written: Written) -> Laid:
        """Return the columns in the form that the read needs."""
        return Laid(written.plan)

    def read(
        self, n: Float[Array, "B d_in"], quantise: Converter | None, chip: Chip
    ) -> Float[Array, "B d_out"]:
        """Return weights times input codes."""
        raise NotImplementedError
