"""Memory Aware Synapses for PyTorch."""

from mas_ext import functional, reference
from mas_ext._native import build_info

__all__ = ["build_info", "functional", "reference"]
