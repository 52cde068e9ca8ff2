"""Device and precision of a computation, and compilation for it."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable
from typing import Any

import torch

from clip_base.runtime.errors import InputError

DEVICES = ("cpu", "cuda", "mps", "xpu")
VECTOR_BITS = {"AVX512": 512, "AVX2": 256, "DEFAULT": 1}  # of x86 processors; 1: no vectors
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def pick_device(name: str) -> torch.device:
    """Returns the device called `name`; "auto" is this process's GPU, else the CPU.

    Raises:
        InputError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(
            f"device={name} is not a device; give auto, cpu, cuda or, for example, cuda:1"
        ) from None
    if device.type not in DEVICES:
        raise InputError(f"device={name}: models do not run there; give auto or one of {', '.join(DEVICES)}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device={name}: PyTorch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices; "
            "give device=auto"
        )
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(
            f"device={name}: PyTorch {torch.__version__} has no such device here; give device=auto"
        ) from None
    return device


def computes_in_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware (AVX512-BF16, AMX, Ampere and later)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Returns `torch.compile(function)` for `device`, even if the compiler's cache was filled before.

    PyTorch finds compiled graphs in its cache ($TORCHINDUCTOR_CACHE_DIR, by default below /tmp) without
    asking how wide the vectors are that their loops step by. A graph written for AVX-512 sets half of its
    numbers where the same processor is told to compute with AVX2, or where another one shares the folder;
    the rest is what was in memory. As an explicit option the width is part of what a graph is found by.
    """
    bits = VECTOR_BITS.get(torch.backends.cpu.get_cpu_capability())
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64") or bits is None:
        return torch.compile(function)
    return torch.compile(function, options={"cpp.simdlen": bits})


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which a forward pass runs at `precision`, one of `PRECISIONS`.

    Raises:
        InputError: there is no such precision, or fp16 is asked for on something else than a CUDA device.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision={precision} is not one of {', '.join(PRECISIONS)}")
    if precision == "fp16":
        if device.type != "cuda":
            raise InputError(
                f"precision=fp16 needs a CUDA device, found {device.type}; use precision=auto, which uses "
                "bf16 where the hardware supports it"
            )
        return torch.autocast(device.type, torch.float16)
    if precision == "bf16" or (precision == "auto" and computes_in_bf16(device)):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
