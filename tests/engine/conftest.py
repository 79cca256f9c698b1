"""One thread: the models are tiny, and two threads would only wait for each other on a small machine.

Triton kernels run in its interpreter where there is no GPU; it has to be asked before the first import. The
native library is put in place before the tests are collected: some run for each level of it.
"""

import os

import pytest
import torch

from tests.native import HAS_LIBRARY, put_in_place

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
put_in_place()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs the native library, or a GPU, where there is none."""
    if item.get_closest_marker("native") and not HAS_LIBRARY:
        pytest.skip("there is no native library here")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
