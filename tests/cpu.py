"""What arithmetic this CPU has, and marks for the tests of it.

By torch's word, not by the code under test: that would skip its own failure.
"""

import pytest
import torch

HAS_INTEGER_PRODUCTS: bool = torch.cpu._is_vnni_supported()  # without, sums of int8 saturate at 16 bits

needs_bf16_products = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no packed bf16 products"
)
needs_integer_products = pytest.mark.skipif(
    not HAS_INTEGER_PRODUCTS, reason="this CPU's integer products saturate"
)
