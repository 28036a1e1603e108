"""Exact attention in memory that grows with the length, not with its square."""

from .ops import flash_attention, flash_attention_varlen
from .reference import reference_attention, reference_attention_varlen

__all__ = [
    "flash_attention",
    "flash_attention_varlen",
    "reference_attention",
    "reference_attention_varlen",
]
