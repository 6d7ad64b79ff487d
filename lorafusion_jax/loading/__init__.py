"""What a run loads: a base, a pool and a method, without its task."""

from ..support.options import LoadIn as LoadIn
from .model import (
    LoadedModel as LoadedModel,
    Texts as Texts,
    load_model as load_model,
    load_texts as load_texts,
    packing_of as packing_of,
    pays_unrolled as pays_unrolled,
)
