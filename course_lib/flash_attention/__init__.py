"""Exact attention in memory that grows with the length, not with its square."""

from .ops import flash_attention
from .reference import reference_attention

__all__ = ["flash_attention", "reference_attention"]
