"""What a run loads: a base, a pool and a method, without its task."""

from ..support.options import LoadIn as LoadIn
from .model import LoadedModel as LoadedModel
from .model import Texts as Texts
from .model import load_model as load_model
from .model import load_texts as load_texts
from .model import packing_of as packing_of
from .model import pays_unrolled as pays_unrolled
