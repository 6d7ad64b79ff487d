"""Model families, their matrices, and generation."""

from .architecture import (
    Model as Model,
    linear_shapes as linear_shapes,
    matrices as matrices,
    rough_operations as rough_operations,
    set_matrices as set_matrices,
    stack_of as stack_of,
    targeted as targeted,
)
from .decoder import Decoder as Decoder, DecoderConfig as DecoderConfig
from .generate import GREEDY as GREEDY, advance as advance, begin as begin
from .registry import (
    abstract_model as abstract_model,
    family_of as family_of,
    known_shapes as known_shapes,
)
from .t5 import T5 as T5, T5Config as T5Config
from .t5.model import decoder_inputs as decoder_inputs
from .weights import PerLayerWeights as PerLayerWeights, dense as dense
