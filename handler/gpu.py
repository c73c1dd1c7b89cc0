"""What torch is told before it computes on a GPU."""

from __future__ import annotations

import torch


def compute_exactly() -> None:
    """Lets torch choose only among kernels whose results are float32's, the same every time, and ready at once."""
    torch.backends.cudnn.allow_tf32 = False  # or audio would be that of 10-bit convolutions
    torch.backends.cudnn.deterministic = True  # or a transposed convolution may add in any order
    # cuDNN's attention makes a plan for each length of a text that it has not seen, while every request waits.
    torch.backends.cuda.enable_cudnn_sdp(False)
