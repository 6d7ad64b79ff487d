"""The path `loop`: one product for each row tile, weight slice and input slice, the ADC in its epilogue."""

import dataclasses

import jax.numpy as jnp

from ....support.platform import for_cpu
from ...chip.columns import Laid, Written
from ...chip.plan import ON_REQUEST, Facts
from ...mapping.bit_fields import FLOAT_BITS
from .by_kernel import KernelPath
from .packed import PackedPath, certificate, fit_words, in_words


class LoopPath(KernelPath):
    """The fastest on a CPU where nothing is saved by tables or words; also elsewhere, if conversions draw noise."""

    name = "loop"

    def chosen(self, facts: Facts) -> str | None:
        if not for_cpu():
            return "one draw of the noise for each conversion, where `definition` draws every cell's"
        return "the ADC quantises each conversion: one product each, with the ADC in its epilogue"

    def form(self, laid: Laid, written: Written) -> Laid:
        """Return the path `packed` unless this one was requested or is equally fast."""
        plan = laid.plan
        config = written.config
        count = len(laid.columns)
        if fit_words(laid, written):
            _, packing = certificate(laid, written, FLOAT_BITS)
            as_fast = (
                packing is None or config.converts_sums or len(packing.words) == count
            )
            if packing is not None and not as_fast and plan.reason != ON_REQUEST:
                reason = f"{count} conversions come out of {len(packing.words)} products of integers"
                plan = dataclasses.replace(plan, path=PackedPath.name, reason=reason)
                return in_words(laid._replace(plan=plan), written, packing)
        if plan.integers and not config.draws_at_conversion:
            laid = laid._replace(occupied=jnp.any(laid.columns != 0, axis=(2, 3)))
        return laid
