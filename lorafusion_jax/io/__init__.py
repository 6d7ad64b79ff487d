"""Files: adapters of PEFT, models of Hugging Face, converted pools, trained arrays."""

from ..support.writing import new_folder as new_folder
from .convert import ConvertOptions as ConvertOptions
from .convert import add_basis as add_basis
from .convert import convert as convert
from .export import fused_adapter as fused_adapter
from .export import lora_adapter as lora_adapter
from .hf import open_base as open_base
from .peft.adapter import AdapterError as AdapterError
from .peft.adapter import read_adapter as read_adapter
from .peft.adapter import resave as resave
from .peft.adapter import write_adapter as write_adapter
from .pool import ConvertedPool as ConvertedPool
from .pool import open_pool as open_pool
from .store import load as _load
from .store import save as _save

load_arrays = _load
save_arrays = _save
