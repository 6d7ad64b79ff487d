"""Pools of adapters on disk: converted ones, and folders of PEFT adapter folders.

    manifest.json                        adapters, their sources, a SHA-256 of each other file (see `store`)
    adapters/0000/                       an adapter that PEFT can load:
        adapter_config.json              its configuration, byte for byte
        adapter_model.safetensors        its tensors, with the names of the original file
    basis/                               a shared basis of the modules, if one was made (see `pool.basis`)

In a `LoraPool` the scaling is in B, layers without an adapter are zeros of rank 0, and smaller ranks are padded.
"""

# ruff: noqa: F401 (the imports are the public names)

from .folder import AdapterFolders, ConvertedPool, load_basis, load_pool, open_pool
from .stack import read_pool
