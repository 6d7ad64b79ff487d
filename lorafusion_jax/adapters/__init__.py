"""Pools of LoRA modules: coefficients, compositions, column norms, shared bases, merges."""

from .coefficients import column_names as column_names
from .coefficients import expand as expand
from .merges import MergeKind as MergeKind
