"""What every read path has: its needs, when it is chosen, how its columns lie, and its read."""

from collections.abc import Callable

from jaxtyping import Array, Float

from ...chip.chip import Chip
from ...chip.columns import Laid, Written
from ...chip.plan import Facts, Plan
from ...mapping.adc.quantiser import Converter


class ReadPath:
    """One way to compute a read; the fastest of those that are exact is chosen.

    Attributes:
      name: the path in plans, files and `program(path=...)`.
      needs: functions from the facts of a read to the reason why the path cannot compute it, or None.
      converts: column sums are converted; False where slices and tiles telescope.
      single_cells: the chip keeps every cell.
      without_adc: name of the path of the same cells with an ideal ADC.
    """

    name: str
    needs: tuple[Callable[[Facts], str | None], ...] = ()
    converts = True
    single_cells = False
    without_adc = "product"

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


def narrow(facts: Facts) -> str | None:
    """Input slices have 4 levels at most, or 7 with a sign."""
    return (
        None
        if facts.bits <= 2
        else "takes input slices of up to 2 bits: set dac.slice_bits"
    )


def integers(facts: Facts) -> str | None:
    """Column sums are integers."""
    return (
        None
        if facts.integers
        else "takes integer cells: perfect ones, whose Gmin does not reach the ADC"
    )


def products(facts: Facts) -> str | None:
    """Every conversion is that of a product of slices."""
    return f"cannot compute {facts.unlike_products}" if facts.unlike_products else None
