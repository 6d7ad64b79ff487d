"""Files: adapters of PEFT, models of Hugging Face, converted pools, trained arrays."""

from ..support.writing import new_folder as new_folder
from .convert import (
    ConvertOptions as ConvertOptions,
    add_basis as add_basis,
    convert as convert,
)
from .export import fused_adapter as fused_adapter, lora_adapter as lora_adapter
from .hf import open_base as open_base
from .peft.adapter import (
    AdapterError as AdapterError,
    read_adapter as read_adapter,
    resave as resave,
    write_adapter as write_adapter,
)
from .pool import ConvertedPool as ConvertedPool, open_pool as open_pool
from .store import load as _load, save as _save

load_arrays = _load
save_arrays = _save
