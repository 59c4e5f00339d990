"""Attention over a cache's view: the reference, torch's own, and registered kernels."""

from kvist.attention.registry import BACKENDS, attend, check_backend, register

__all__ = ["BACKENDS", "attend", "check_backend", "register"]
