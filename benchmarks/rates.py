"""What a device can do at best, and what a work asks of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rounds import Work, alternate
from torch.utils.flop_counter import FlopCounterMode


def waiting(device: str) -> Callable[[], object]:
    """Returns what waits until a device has done everything; a processor has when a call returns."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def matrix_rate(device: str, precision: str) -> float:
    """Returns the floating-point operations a second of one large product, the best of twenty."""
    side = 8192 if device == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    (seconds,) = alternate({"product": lambda: a @ a}, 20, waiting(device)).values()
    return float(2 * side**3 / min(seconds))


def operations_of(work: Work) -> float:
    """Returns the operations of matrix products and convolutions in a work, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())
