"""One thread: the models are tiny, and two threads would only wait for each other on a small machine."""

import torch

torch.set_num_threads(1)
