"""Exact attention in memory that grows with the length, not with its square."""

from .decode import flash_attention_decode
from .merge import merge_attention_states
from .ops import flash_attention, flash_attention_varlen
from .reference import reference_attention, reference_attention_varlen

__all__ = [
    "flash_attention",
    "flash_attention_decode",
    "flash_attention_varlen",
    "merge_attention_states",
    "reference_attention",
    "reference_attention_varlen",
]
