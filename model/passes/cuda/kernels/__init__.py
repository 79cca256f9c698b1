"""Triton kernels of a pass; `operations.py` beside this package launches them."""
