"""The read paths by name, and the choice among them. The first one that has a reason to be chosen is.

`product` is one matrix product with the weights as programmed, to which all slices and tiles telescope.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..chip.chip import Chip
from ..chip.plan import (
    ON_REQUEST,
    ColumnLayout,
    Plan,
    ProgrammedCells,
    ReadRequirements,
)
from ..config.schema import CrossbarConfig
from ..devices.normal_draws import normal
from ..devices.physical import like
from ..mapping import decoding, encoding
from ..mapping.adc.quantiser import Converter
from ..mapping.bit_fields import FieldWords
from ..mapping.geometry import Columns, Geometry
from .conversion_noise import root
from .definition import DefinitionPath, ReadPath
from .lookup import LookupPath
from .sliced_products import LoopPath, PackedPath


class ProductPath(ReadPath):
    """Without an ADC, or with one that has a code for every possible sum."""

    name = "product"
    converts = False

    def refusal(self, requirements: ReadRequirements) -> str | None:
        if requirements.telescopes:
            return None
        return f"is not exact here: {requirements.nonlinear or 'the ADC loses bits'}"

    def chosen(self, requirements: ReadRequirements) -> str | None:
        if not requirements.telescopes:
            return None
        lossless = "the ADC loses nothing: integer levels within its range"
        reason = "there is no ADC" if requirements.config.adc is None else lossless
        return f"one matrix product: {reason}, so that all slices and tiles telescope"

    def lay_out(self, programmed: ProgrammedCells) -> ColumnLayout:
        variance = programmed.variance()
        code_variance = (
            None
            if variance is None
            else _telescoped(variance, programmed.geometry, programmed.config)
        )
        return ColumnLayout(programmed.plan, variance=code_variance)

    def read(
        self, n: Float[Array, "B d_in"], quantise: Converter | None, chip: Chip
    ) -> Float[Array, "B d_out"]:
        """Return weights times input codes; read noise, a sum of draws over slices and rows, is one for each output."""
        geometry = chip.geometry
        config = chip.config
        key = chip.key
        tiled = chip.scale.shape[0] > 1
        per_weight = encoding.per_weight(chip.scale, geometry)
        y = jnp.dot(
            n, chip.codes * per_weight if tiled else chip.codes, precision="highest"
        )
        noise = config.device.read_noise
        if noise is not None and chip.variance is not None and key is not None:
            cols = geometry.cols
            d_out = geometry.shape[1]
            variance = chip.variance
            unit = jnp.ones((1, 1), n.dtype)
            if tiled:
                # Over the largest scale, since the square of a small one is zero in float32.
                unit = jnp.max(chip.scale, axis=(0, 1), keepdims=True)
                per_weight = per_weight / unit
                if config.encoding.unit_column:
                    starts = np.cumsum((0, *cols[:-1]))
                    per_weight = jnp.concatenate(
                        [per_weight, per_weight[:, starts]], axis=1
                    )
                variance = variance * jnp.square(per_weight)
            worth = jnp.square(jnp.asarray(geometry.input_significance, n.dtype))
            power = jnp.einsum(
                "j,jbi->bi", worth, jnp.square(encoding.pulses(n, geometry))
            )
            spread = root(jnp.dot(power, variance, precision="highest")) * like(
                noise.sigma, n
            )
            outputs = d_out + (len(cols) if config.encoding.unit_column else 0)
            draws = spread * normal(key, (n.shape[0], outputs), n.dtype)
            if (
                config.encoding.unit_column
            ):  # one draw for each array's unit column, shared by all its outputs
                draws, units = draws[:, :d_out], draws[:, d_out:]
                draws = draws - jnp.repeat(
                    units, np.asarray(cols), axis=1, total_repeat_length=d_out
                )
            y = y + draws * unit
        return y if tiled else y * chip.scale


def _telescoped(
    variance: Float[Array, "K R rows _cols"], geometry: Geometry, config: CrossbarConfig
) -> Float[Array, "_rows _cols"]:
    """Return the variances of weight codes, given those of every slice's columns."""
    worth = jnp.asarray(geometry.significance, variance.dtype)
    if (
        config.device.read_noise is not None
        and config.device.read_noise.kind == "independent"
    ):
        worth = (
            worth
            * jnp.asarray(geometry.levels, variance.dtype)
            / (1 - like(config.g_min, variance))
        )
    code_variance = jnp.einsum("k,krio->rio", jnp.square(worth), variance)
    return encoding.join(code_variance, geometry.rows, 0, front=True)


PATHS: dict[str, ReadPath] = {
    path.name: path
    for path in (
        ProductPath(),
        DefinitionPath(),
        LookupPath(),
        PackedPath(),
        LoopPath(),
    )
}


def choose(
    geometry: Geometry,
    config: CrossbarConfig,
    limits: Array | np.ndarray | None,
    *,
    perfect: bool,
    path: str | None = None,
) -> Plan:
    """Return the fastest exact path for `limits` [_, K, 2]; raises a ValueError if the requested one is not exact."""
    requirements = ReadRequirements.of(geometry, config, limits, perfect=perfect)
    reason = ON_REQUEST
    if path is None:
        reasons = ((name, each.chosen(requirements)) for name, each in PATHS.items())
        path, reason = next(
            (name, reason) for name, reason in reasons if reason is not None
        )
    elif path not in PATHS:
        raise ValueError(
            f"path={path!r} is unknown: choose from {', '.join(PATHS)}, or leave it out"
        )
    elif why := PATHS[path].refusal(requirements):
        raise ValueError(f"path={path!r} {why}; leave path out")
    return Plan(path, reason, requirements.integers, ties=requirements.ties)


def columns_of(chip: Chip) -> Columns:
    """Return the columns that multiply the inputs in the arrays, unit columns last."""
    config = chip.config
    geometry = chip.geometry
    columns = chip.columns
    if columns is not None and not isinstance(columns, FieldWords):
        return columns.astype(chip.codes.dtype)
    # Perfect cells, which follow from the codes; the difference of a pair is the digit.
    digits = encoding.digits(chip.codes, geometry, config)
    if config.encoding.kind == "differential" and not config.converts_each:
        return encoding.split(digits, geometry.rows, 1, front=True)
    cells, _ = encoding.to_arrays(digits, geometry, config)
    return decoding.columns(cells, geometry, config)
