"""Marks for tests of arithmetic that not every CPU has."""

import pytest
import torch

from model.quantize import integer_products_are_exact

# By torch's word, not by the code under test: that would skip its own failure.
needs_bf16_products = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no packed bf16 products"
)
needs_integer_products = pytest.mark.skipif(
    not integer_products_are_exact(), reason="this CPU's integer products saturate"
)
