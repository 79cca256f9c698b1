"""Linear layers for a few rows at a time on a CPU: weights laid out once for oneDNN's small products.

torch's ordinary CPU product reads the weights again for almost every row when there are few (MKL, fp32,
384 x 2048 on two Zen 4 cores: 0.30 ms for one row, 0.44 ms for four); on packed weights it takes 0.10 ms
for one to four, so rows in flight are nearly free. The operators are the ones that torch.compile's
freezing emits; they need no compiler. Where they are missing, layers stay as they are.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED_FOR_ROWS = 16  # the layout is chosen for so many rows; measured best for 1 to 256
PACKABLE = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """x @ weight.T + bias with a packed weight; inference only, CPU only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), PACKED_FOR_ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._call = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, in_features) -> (rows, out_features)."""
        extra = padded_rows(x.shape[0]) - x.shape[0] if x.dim() == 2 else 0
        return self.product(F.pad(x, (0, 0, 0, extra)))[: x.shape[0]] if extra else self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """The same, with exactly these rows: `forward` may add some for the sake of few sizes."""
        out: Tensor = self._call(x, self._weight, self._bias, "none", [], "")
        return out


def padded_rows(rows: int) -> int:
    """Rows that a product of `rows` rows is padded to: few sizes in all.

    oneDNN compiles and keeps a kernel for every size that it meets; with every prompt length its own
    size the process grew by 50 to 100 KB a request. Up to 16 rows, where waves live, nothing is padded.
    """
    if rows <= PACKED_FOR_ROWS:
        return rows
    step = PACKED_FOR_ROWS if rows <= 4 * PACKED_FOR_ROWS else 4 * PACKED_FOR_ROWS
    return -(-rows // step) * step


def pack_linears(module: nn.Module) -> int:
    """Replaces every nn.Linear below `module` by a packed one, in place; how many were replaced.

    Nothing is replaced on another device, in another dtype, or where torch lacks the operators. The
    module can no longer be trained, moved or saved.
    """
    if not can_pack(module):
        return 0
    places = [
        (parent, name)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    for parent, name in places:  # one after the other: the old weight is freed before the next is packed
        setattr(parent, name, PackedLinear(getattr(parent, name)))
    return len(places)


def can_pack(module: nn.Module) -> bool:
    """Whether this machine has the operators, for the device and dtype of the module's weights."""
    weight = next(module.parameters())
    if weight.device.type != "cpu" or weight.dtype not in PACKABLE:
        return False
    probe = nn.Linear(32, 32, dtype=weight.dtype)
    try:
        packed = PackedLinear(probe)(torch.eye(32, dtype=weight.dtype))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return bool(torch.allclose(packed, probe(torch.eye(32, dtype=weight.dtype)), atol=1e-2))


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 products are worth having on a device: on a CPU only with instructions of its own.

    Without (AVX2; EPYC, 2048 x 512 x 1536 by one thread) torch's run at 1 GFLOPS, fp32's at 60.
    """
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
