"""Ops, one folder each: a reference in plain Python or torch, and faster implementations beside it.

Kernels know no models. Importing this package loads neither torch nor the native library and starts no CUDA.
"""
