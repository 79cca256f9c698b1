"""One thread: the models are tiny, and two threads would only wait for each other on a small machine.

Triton kernels run in its interpreter where there is no GPU; it has to be asked before the first import.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
