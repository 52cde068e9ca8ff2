"""CLIP's modified ResNet, split where regions enter: `head(trunk(x))`, or `head(roi_align(trunk(x)))`.

Activations are kept channels-last throughout.
"""

# B images, N feature maps (whole images or regions), C channels, D embedding size, S side of a map
from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clip_base.models.bottleneck import EXPANSION, Bottleneck, convolve, recompute_contexts
from clip_base.models.configs import VisionConfig
from clip_base.models.positions import resample_positions
from clip_base.models.transformer import all_untouched, attend_once, untouched


class AttentionPool(nn.Module):
    """One layer of multi-head attention whose single query is the mean of the map (arXiv 2103.00020, 2.4)."""

    folded = True

    def __init__(self, side: int, channels: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(side * side + 1, channels) * channels**-0.5)
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, embed_dim)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, C, h, w] to [N, D]; position embeddings are resampled for other grids."""
        height, width = x.shape[-2:]
        positions = resample_positions(self.positional_embedding, height, width).to(x.dtype)
        cells = x.flatten(2).transpose(1, 2)  # [N, h·w, C], a view when x is channels-last
        tokens = torch.cat([cells.mean(1, keepdim=True), cells], 1) + positions  # [N, 1 + h·w, C]
        weights = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        biases = (self.q_proj.bias, self.k_proj.bias, self.v_proj.bias)
        pooled: Tensor = self.c_proj(attend_once(tokens[:, 0], tokens, weights, biases, self.heads))
        return pooled


class ModifiedResNet(nn.Module):
    """The ResNet of CLIP: a stem of three convolutions, anti-aliased strides, an attention pool at the end.

    Attributes:
        resolution: side of the square image it was made for, in pixels.
        stride: pixels from one cell of the trunk's map to the next.
        freezable: the parts of each stage, from the stem on, that can be frozen one by one; the head is last.
        trunk_channels: channels of the trunk's map.
        region_size: side of the trunk's map for an image of `resolution`: a region cut out at this size
            takes the same path as a whole image.
        embed_dim: D.
        checkpointing: when True, training recomputes each block in the backward pass instead of keeping its
            activations.
    """

    stride = 16
    freezable = (
        ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"),
        ("layer1",),
        ("layer2",),
        ("layer3",),
        ("layer4", "attnpool"),
    )

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        width = config.width
        self.resolution, self.region_size = config.resolution, config.resolution // self.stride
        self.trunk_channels, self.embed_dim = width * 4 * EXPANSION, embed_dim
        self.checkpointing = False
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU()
        self.avgpool = nn.AvgPool2d(2)
        self.layer1 = _layer(width, width, config.layers[0], stride=1)
        self.layer2 = _layer(width * 4, width * 2, config.layers[1], stride=2)
        self.layer3 = _layer(width * 8, width * 4, config.layers[2], stride=2)
        self.layer4 = _layer(width * 16, width * 8, config.layers[3], stride=2)
        self.attnpool = AttentionPool(config.resolution // 32, width * 32, config.heads, embed_dim)

    @property
    def input_resolution(self) -> int:
        """The same as `resolution`, under openai/CLIP's name."""
        return self.resolution

    @property
    def output_dim(self) -> int:
        """The same as `embed_dim`, under openai/CLIP's name."""
        return self.embed_dim

    def stages(self, images: Tensor) -> list[Tensor]:
        """Returns the maps after layer1, layer2 and layer3: strides 4, 8 and 16 pixels.

        Args:
            images: [B, 3, H, W], normalized.
        """
        x = images.to(self.conv1.weight.dtype).contiguous(memory_format=torch.channels_last)
        x = self._run(self._stem, x)
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3):
            x = self._layer(layer, x)
            maps.append(x)
        return maps

    def trunk(self, images: Tensor) -> Tensor:
        """Returns [B, C, H / 16, W / 16], the map after layer3, from which regions are cut."""
        return self.stages(images)[-1]

    def head(self, feature_map: Tensor) -> Tensor:
        """Returns [N, D], one embedding a map, not normalized: layer4 and the attention pool.

        Args:
            feature_map: [N, C, h, w] as the trunk makes them, whole or cut out; any size.
        """
        pooled: Tensor = self.attnpool(self.layer4_map(feature_map))
        return pooled

    def layer4_map(self, feature_map: Tensor) -> Tensor:
        """Returns [N, 2 · C, h / 2, w / 2], rounded down: layer4 alone, the first part of `head`."""
        height, width = feature_map.shape[-2:]
        if min(height, width) < 2:  # layer4 halves the map, so a single row or column is doubled
            feature_map = F.interpolate(feature_map, (max(height, 2), max(width, 2)), mode="nearest")
        x = feature_map.contiguous(memory_format=torch.channels_last)
        return self._layer(self.layer4, x)

    def layer4_dense(self, feature_map: Tensor) -> Tensor:
        """Returns [N, 2 · C, h, w]: layer4 at every cell of the map, where `layer4_map` has every second one.

        Strides become dilations. Cell (2i, 2j) is cell (i, j) of `layer4_map`, if the map's sides are even;
        the cells' centers lie half a cell of the map further right and down than the map's own.
        """
        x = feature_map.contiguous(memory_format=torch.channels_last)
        dilation = 1
        for block in self.layer4:
            assert isinstance(block, Bottleneck)
            x = self._run(functools.partial(block.dense, dilation=dilation), x)
            dilation *= block.stride
        return x

    def layer4_splits(self) -> bool:
        """Whether layer4 may be computed by `layer4_inputs` and `layer4_rest`; see `Bottleneck.splits`."""
        first = self.layer4[0]
        return isinstance(first, Bottleneck) and untouched(self.layer4) and first.splits()

    def layer4_inputs(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what layer4 does first and linearly to the trunk's map; see `Bottleneck.linear_parts`."""
        first = self.layer4[0]
        assert isinstance(first, Bottleneck)
        return first.linear_parts(feature_map.contiguous(memory_format=torch.channels_last))

    def layer4_rest(self, inner: Tensor, shortcut: Tensor) -> Tensor:
        """Returns layer4's output [N, 2 · C, h / 2, w / 2] of regions' inputs; writes over them.

        Args:
            inner: [N, C / 2, h, w], pooled from the first of `layer4_inputs`.
            shortcut: [N, 2 · C, h / 2, w / 2], pooled from the second.
        """
        first = self.layer4[0]
        assert isinstance(first, Bottleneck)
        x = first.from_linear_parts(inner, shortcut)
        for block in self.layer4[1:]:
            x = block(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """Returns [B, D], one embedding an image, not normalized.

        Args:
            images: [B, 3, H, W], normalized; any size of at least 32 pixels, not only square.
        """
        return self.head(self.trunk(images))

    def pooled(self, images: Tensor) -> Tensor:
        """Returns [B, D], what a linear probe reads: the attention pool's output, as in openai/CLIP."""
        return self(images)  # type: ignore[no-any-return]

    def cells(self, images: Tensor) -> Tensor:
        """Returns [B, H · W / 32², 2 · C], the cells of layer4's map: what a decoder attends to."""
        return self.layer4_map(self.trunk(images)).flatten(2).transpose(1, 2)

    def cells_and_embedding(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `cells(images)` and `self(images)` for little more than the price of one."""
        last = self.layer4_map(self.trunk(images))
        return last.flatten(2).transpose(1, 2), self.attnpool(last)

    def drop_head(self) -> None:
        """Deletes what only embeddings need: for a tower that is read by its cells alone."""
        del self.attnpool

    @property
    def cell_channels(self) -> int:
        """Channels of `cells`."""
        return 2 * self.trunk_channels

    def _stem(self, x: Tensor) -> Tensor:
        parts = (self.conv1, self.bn1, self.relu1, self.conv2, self.bn2, self.relu2, self.conv3, self.bn3)
        if not all_untouched(*parts, self.relu3, self.avgpool):
            x = self.relu1(self.bn1(self.conv1(x)))
            x = self.relu2(self.bn2(self.conv2(x)))
            pooled: Tensor = self.avgpool(self.relu3(self.bn3(self.conv3(x))))
            return pooled
        x = convolve(x, self.conv1, self.bn1).relu_()
        x = convolve(x, self.conv2, self.bn2).relu_()
        x = convolve(x, self.conv3, self.bn3).relu_()
        return F.avg_pool2d(x, 2)

    def _layer(self, layer: nn.Sequential, x: Tensor) -> Tensor:
        if not self._recomputes():
            out: Tensor = layer(x)
            return out
        for block in layer:
            x = self._run(block, x)
        return x

    def _recomputes(self) -> bool:
        return self.checkpointing and self.training and torch.is_grad_enabled()

    def _run(self, part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self._recomputes():
            out: Tensor = checkpoint(part, x, use_reentrant=False, context_fn=recompute_contexts)
            return out
        return part(x)


def _layer(channels: int, inner: int, blocks: int, stride: int) -> nn.Sequential:
    layer = nn.Sequential(Bottleneck(channels, inner, stride))
    for _ in range(1, blocks):
        layer.append(Bottleneck(inner * EXPANSION, inner, 1))
    for block in layer:
        assert isinstance(block, Bottleneck)
        nn.init.zeros_(block.bn3.weight)  # each block starts as the identity, as in openai/CLIP
    return layer
