"""T5 1.0, T5 1.1, FLAN-T5 and mT5."""

from ..architecture import Family
from .checkpoint import CHECKPOINT
from .config import SHAPES, T5Config, read_config
from .model import T5

__all__ = ["FAMILY", "T5", "T5Config"]

FAMILY = Family(
    name="t5",
    members="T5 1.0, T5 1.1, FLAN-T5 or mT5",
    model_types=("t5", "mt5", "umt5"),
    names={r"(?<![a-z\d])(by|code)?t5(?!\d)": ("t5",), r"(?<![a-z\d])u?mt5(?!\d)": ("mt5", "umt5")},
    config=T5Config,
    read_config=read_config,
    model=T5,
    checkpoint=CHECKPOINT,
    task_type="SEQ_2_SEQ_LM",
    shapes=SHAPES,
)
