"""Parts of CLIP's ResNet: batch norms that fold into their convolutions, and the block with its dense form.

Where a batch norm does not take statistics (evaluation, or frozen), it is folded into its convolution, which
saves a pass over the activations.
"""

# N feature maps (whole images or regions), C channels
from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_base.models.transformer import all_untouched
from clip_base.runtime.distributed import is_shard

M = TypeVar("M", bound=nn.Module)
EXPANSION = 4  # output channels of a block per inner channel
_state = threading.local()


class FrozenBatchNorm2d(nn.Module):
    """A batch norm whose statistics and affine are constants, with the names of `nn.BatchNorm2d`."""

    folded = True
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = norm.eps
        for name, value in norm.state_dict().items():
            self.register_buffer(name, value.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, C, H, W] to the same shape."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def freeze_batch_norm(module: M) -> M:
    """Turns every `nn.BatchNorm2d` below `module` into a `FrozenBatchNorm2d`, in place; returns `module`."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child))
        else:
            freeze_batch_norm(child)
    return module


def convolve(x: Tensor, conv: nn.Conv2d, norm: nn.Module, dilation: int = 1) -> Tensor:
    """Returns `norm(conv(x))`; a norm that takes no statistics is folded into the convolution's weight.

    Only of modules that are `untouched`; the caller looks.

    Args:
        x: [N, C, H, W].
        conv: not dilated; if its stride is 1, the result has the same sides as x.
        norm: of its output.
        dilation: distance of the cells that the convolution reads.
    """
    assert isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    padding = tuple(dilation * (side // 2) for side in conv.kernel_size)  # as all convolutions here have it
    if isinstance(norm, nn.BatchNorm2d) and norm.training:
        out = F.conv2d(x, conv.weight, conv.bias, conv.stride, padding, dilation)
        if getattr(_state, "recomputing", False):
            # The forward pass has counted this batch already, so copies take the update.
            mean, variance = mean.clone(), variance.clone()
            return F.batch_norm(out, mean, variance, norm.weight, norm.bias, training=True, eps=norm.eps)
        normed: Tensor = norm(out)
        return normed
    weight, bias = folded(conv, norm)
    return F.conv2d(x, weight, bias, conv.stride, padding, dilation)


def folded(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns weight and bias of the convolution that is `norm(conv(x))`; the norm takes no statistics."""
    assert isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return conv.weight * scale[:, None, None, None], norm.bias - mean * scale


class Bottleneck(nn.Module):
    """Three convolutions (sides 1, 3, 1) beside a shortcut; an average pool before the last is the stride."""

    folded = True

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        outer = inner * EXPANSION
        self.stride = stride
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(inner, outer, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        self.relu3 = nn.ReLU()
        self.downsample: nn.Sequential | None = None
        if stride > 1 or channels != outer:
            conv = nn.Conv2d(channels, outer, 1, bias=False)
            parts = [("-1", nn.AvgPool2d(stride)), ("0", conv), ("1", nn.BatchNorm2d(outer))]
            self.downsample = nn.Sequential(OrderedDict(parts))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, C, H, W] to [N, 4 · inner, H / stride, W / stride], rounded down."""
        # Hooks on the block itself see it called; only those below it need the slower way.
        if not all_untouched(*self._modules.values()):
            return self._called(x)
        shortcut = x if self.stride == 1 else F.avg_pool2d(x, self.stride)
        if self.downsample is not None:
            _, conv, norm = self.downsample
            assert isinstance(conv, nn.Conv2d)
            shortcut = convolve(shortcut, conv, norm)
        return self._rest(convolve(x, self.conv1, self.bn1), shortcut)

    def _rest(self, inner: Tensor, shortcut: Tensor) -> Tensor:
        """Computes the block from the first convolution's output and the shortcut; writes over both."""
        out = convolve(inner.relu_(), self.conv2, self.bn2).relu_()
        if self.stride > 1:
            out = F.avg_pool2d(out, self.stride)
        return convolve(out, self.conv3, self.bn3).add_(shortcut).relu_()

    def splits(self) -> bool:
        """Whether `linear_parts` and `from_linear_parts` may be used.

        Not where a batch norm takes statistics, nor where FSDP holds the weights in shards, which it makes
        whole only while the block is called.
        """
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        return (
            self.downsample is not None
            and not any(norm.training for norm in norms)
            and not is_shard(self.conv1.weight)
            and all_untouched(*self._modules.values())
        )

    def linear_parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the first convolution [N, inner, H, W] of x and the shortcut's [N, 4 · inner, H, W].

        They are without biases, and the shortcut is not yet pooled, so that weighted sums of cells may be
        taken of them before `from_linear_parts`.
        """
        assert self.downsample is not None
        _, conv, norm = self.downsample
        assert isinstance(conv, nn.Conv2d)
        return F.conv2d(x, folded(self.conv1, self.bn1)[0]), F.conv2d(x, folded(conv, norm)[0])

    def from_linear_parts(self, inner: Tensor, shortcut: Tensor) -> Tensor:
        """Returns the block's output of `linear_parts`, the shortcut's pooled; writes over both."""
        assert self.downsample is not None
        _, conv, norm = self.downsample
        assert isinstance(conv, nn.Conv2d)
        inner += folded(self.conv1, self.bn1)[1].to(inner.dtype)[:, None, None]
        shortcut += folded(conv, norm)[1].to(shortcut.dtype)[:, None, None]
        return self._rest(inner, shortcut)

    def dense(self, x: Tensor, dilation: int) -> Tensor:
        """Maps [N, C, H, W] to [N, 4 · inner, H, W]: the block at every cell, its stride left out.

        Cell (i, j) is what the block would give there if x were only its cells (i, j), (i + dilation, j) and
        so on: the 3×3 convolution reads cells so far apart, and the average pool a cell and its neighbors.
        Of hooks below the block, those on the 3×3 convolution and on what has no weights are not called.
        """
        quick = all_untouched(*self._modules.values())

        def normed(x: Tensor, conv: nn.Conv2d, norm: nn.Module, dilation: int = 1) -> Tensor:
            if quick or conv is self.conv2:
                return convolve(x, conv, norm, dilation)
            called: Tensor = norm(conv(x))
            return called

        out = F.relu(normed(x, self.conv1, self.bn1), inplace=quick)
        out = F.relu(normed(out, self.conv2, self.bn2, dilation), inplace=quick)
        shortcut = x
        if self.stride > 1:
            out, shortcut = _average_with_next(out), _average_with_next(x)
        if self.downsample is not None:
            _, conv, norm = self.downsample
            assert isinstance(conv, nn.Conv2d)
            shortcut = normed(shortcut, conv, norm)
        return F.relu(normed(out, self.conv3, self.bn3) + shortcut, inplace=quick)

    def _called(self, x: Tensor) -> Tensor:
        """Computes the same by calling every part, and writes over nothing that a hook may have kept."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        shortcut = x if self.downsample is None else self.downsample(x)
        whole: Tensor = self.relu3(out + shortcut)
        return whole


def _average_with_next(x: Tensor) -> Tensor:
    """Maps [N, C, H, W] to the same shape: means of a cell and those right of, below and right below it."""
    return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, 1)


def recompute_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` for torch's checkpoint: batch norms do not count a batch again when it is recomputed."""
    return contextlib.nullcontext(), _recomputing()


@contextlib.contextmanager
def _recomputing() -> Iterator[None]:
    before = getattr(_state, "recomputing", False)
    _state.recomputing = True
    try:
        yield
    finally:
        _state.recomputing = before
