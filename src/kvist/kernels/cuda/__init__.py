"""Kernels in CUDA C++: shipped as source, compiled when first needed, kept for the next run.

`build` compiles and finds what was compiled, `one_launch` binds the library of the kernel that
computes a decode step in one launch. Neither imports torch. Called by `kvist.runner`.
"""
