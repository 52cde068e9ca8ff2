"""Region heads of a ResNet: from the trunk's map to region embeddings; layer4 per region, or once for all.

`PerRegionHead` is the published design (arXiv 2112.09106, section 3.1): RoIAlign on the trunk's map, then
layer4 and the attention pool of each region. `SharedHead` runs layer4 once on the whole map and cuts the
regions from its output, as F-VLM does (arXiv 2209.15639): per region only the attention pool is left.
`DenseHead` does the same on a finer map. The numbers differ, so weights are for the head that they were
trained with; files record it.
"""

# B images, N regions in all, n of a chunk, C channels of the trunk's map, s side of a region on layer4's map,
# M heads of the attention pool, d channels of one, h, w sides of layer4's map of an image, D embedding size
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_base.jobs.config import option
from clip_base.models.positions import resample_positions
from clip_base.models.resnet import AttentionPool, ModifiedResNet
from clip_base.models.transformer import untouched
from clip_base.runtime.errors import InputError, shortened
from clip_base.weights.load import find
from clip_base.weights.reading import is_safetensors, read_notes
from regionclip.models.pooling import pool_regions, pool_windows, pools_by_products, region_weights
from regionclip.structures.regions import Regions

KEY = "region_head"  # in the metadata of weights files


class RegionMaps(Protocol):
    """Layer4's maps of n regions."""

    def whole(self) -> Tensor:
        """Returns the maps, [n, 2 · C, s, s]."""
        ...

    def convolved(self, conv: nn.Conv2d) -> Tensor:
        """Returns [n, c, s, s], the output of a 1×1 convolution on the maps."""
        ...


class RegionHead(Protocol):
    """Embeds regions of a ResNet trunk's map."""

    kind: str
    cell: int  # pixels that the sides of a padded image must be multiples of, for its map to cover all of it

    def __call__(self, feature_map: Tensor, regions: Regions) -> Iterator[tuple[Tensor, Tensor, RegionMaps]]:
        """Yields for some of the regions at a time, until all were there, what is known of them.

        Args:
            feature_map: [B, C, H/16, W/16], the trunk's.
            regions: N regions in the images' frame.

        Yields:
            Which regions [n] int64, their embeddings [n, D], not normalized, and layer4's maps of them.
        """
        ...


class PerRegionHead:
    """Layer4 and the attention pool on each region's own map.

    Args:
        visual: the tower.
        chunk: regions at once, to bound memory.
    """

    kind = "per_region"

    def __init__(self, visual: ModifiedResNet, chunk: int) -> None:
        self.visual, self.chunk, self.cell = visual, chunk, visual.stride

    def __call__(self, feature_map: Tensor, regions: Regions) -> Iterator[tuple[Tensor, Tensor, RegionMaps]]:
        """See `RegionHead`."""
        which = torch.arange(len(regions), device=regions.boxes.device)
        for rows, deep in zip(
            torch.split(which, self.chunk), self._layer4(feature_map, regions), strict=True
        ):
            yield rows, self.visual.attnpool(deep), _Maps(deep)

    def _layer4(self, feature_map: Tensor, regions: Regions) -> Iterator[Tensor]:
        """Yields [n, 2 · C, s, s], layer4's maps of the regions, in order.

        RoIAlign is linear, and so are layer4's first 1×1 convolution and its shortcut. So both run once on
        the map and their outputs are pooled; biases are added afterwards, as the weights of a bin that
        reaches beyond the map do not sum to 1. This saves a sixth of the head's work.
        """
        visual = self.visual
        side, scale = visual.region_size, 1 / visual.stride
        rois = torch.split(regions.rois(), self.chunk)
        if not pools_by_products(feature_map) or not visual.layer4_splits():
            for some in rois:
                # [n, C, 2s, 2s]; with one sample a bin, a box that covers the image gives its own map back
                yield visual.layer4_map(pool_regions(feature_map, some, side, scale))
            return
        inner, shortcut = visual.layer4_inputs(feature_map)
        for some in rois:
            index = some[:, 0].long()
            down, across = region_weights(some, side, scale, feature_map.shape[-2:])
            halved = (_halved(down), _halved(across))
            yield visual.layer4_rest(
                pool_windows(inner, index, down, across), pool_windows(shortcut, index, *halved)
            )


class SharedHead:
    """Layer4 once on each image's map; regions are cut from its output.

    Args:
        visual: the tower.
        chunk: regions at once, to bound memory.
    """

    kind = "shared"

    def __init__(self, visual: ModifiedResNet, chunk: int) -> None:
        self.visual, self.chunk, self.cell = visual, chunk, 2 * visual.stride

    def layer4(self, feature_map: Tensor, regions: Regions) -> tuple[Tensor, Tensor, float]:
        """Returns layer4's maps [B, 2 · C, h, w], rois [N, 5] in pixels, and cells of the maps per pixel.

        Raises:
            ValueError: the map has an odd side, of which layer4 would drop the last row or column.
        """
        if not torch.compiler.is_compiling() and any(size % 2 for size in feature_map.shape[-2:]):
            raise ValueError(
                f"the shared head needs images padded to multiples of {self.cell} pixels, whose maps have "
                f"even sides; got a map of {list(feature_map.shape[-2:])}"
            )
        return self.visual.layer4_map(feature_map), regions.rois(), 1 / self.cell

    def __call__(self, feature_map: Tensor, regions: Regions) -> Iterator[tuple[Tensor, Tensor, RegionMaps]]:
        """See `RegionHead`."""
        visual, side = self.visual, self.visual.region_size // 2
        deep, rois, scale = self.layer4(feature_map, regions)
        if not untouched(visual.attnpool) or self._few(rois, deep):
            for rows in torch.split(torch.arange(len(rois), device=rois.device), self.chunk):
                pooled = pool_regions(deep, rois[rows], side, scale)
                # The pool itself is called, which a hook may wait for.
                yield rows, visual.attnpool(pooled), _Maps(pooled)
            return
        for image, which in _by_image(regions, len(feature_map)):
            pool = WindowPool(visual.attnpool, deep[image])
            for rows in torch.split(which, self.chunk):
                maps = _Windows(deep[image], rois[rows], side, scale)
                yield rows, pool(maps.down, maps.across), maps

    def _few(self, rois: Tensor, deep: Tensor) -> bool:
        """Whether the regions have fewer tokens than the maps have cells, as when two per image are trained.

        Then it is cheaper to pool all images' regions at once than to project every cell image by image.
        """
        if torch.compiler.is_compiling():
            return False
        tokens = len(rois) * (1 + (self.visual.region_size // 2) ** 2)
        return tokens < len(deep) * deep.shape[2] * deep.shape[3]


class DenseHead(SharedHead):
    """The shared head on a map twice as fine: layer4 without its stride, so that its cells are 16 pixels."""

    kind = "dense"

    def __init__(self, visual: ModifiedResNet, chunk: int) -> None:
        super().__init__(visual, chunk)
        self.cell = visual.stride

    def layer4(self, feature_map: Tensor, regions: Regions) -> tuple[Tensor, Tensor, float]:
        """See `SharedHead`."""
        rois = regions.rois().clone()
        rois[:, 1:] -= self.cell / 2  # the cells' centers lie so far right and down
        return self.visual.layer4_dense(feature_map), rois, 1 / self.cell


HEADS: dict[str, type[PerRegionHead] | type[SharedHead]] = {
    head.kind: head for head in (PerRegionHead, SharedHead, DenseHead)
}
REGION_HEADS = tuple(HEADS)
HEAD_CHOICES = ("auto", *REGION_HEADS)


@dataclass(kw_only=True)
class RegionHeadOptions:
    """How a ResNet embeds regions of its map."""

    region_head: str = option(
        "auto",
        "ResNets: per_region runs layer4 on each region, shared once per image, which is several times as "
        "fast; dense: once, on a map twice as fine; auto: as the weights were trained, else per_region",
        choices=HEAD_CHOICES,
    )


class WindowPool:
    """CLIP's attention pool over windows of one map, without making the windows' tokens.

    A window's tokens are sums of the map's cells with its weights, and keys, values and the query are linear
    in a token. So keys and values are projected once on the map; a query's products with all cells are
    summed with the weights to its products with the window's keys, and attention is spread over the cells
    with the same weights. The same numbers as `AttentionPool` gives of the pooled windows, up to rounding.

    Args:
        attention: the tower's pool.
        cells: [2 · C, h, w], layer4's map of one image.
    """

    def __init__(self, attention: AttentionPool, cells: Tensor) -> None:
        self.attention, self.size = attention, cells.shape[1:]
        self.cells = cells.permute(1, 2, 0).flatten(0, 1)  # [h·w, 2 · C]
        self.keys = self._split(F.linear(self.cells, attention.k_proj.weight))  # [M, h·w, d]
        self.values = self._split(F.linear(self.cells, attention.v_proj.weight))

    def __call__(self, down: Tensor, across: Tensor) -> Tensor:
        """Returns [n, D] of windows with weights [n, s, h] over the map's rows, [n, s, w] over columns."""
        attention, side, count = self.attention, down.shape[1], down.shape[0]
        heads, device = attention.heads, down.device.type
        positions = resample_positions(attention.positional_embedding, side, side).to(self.cells.dtype)
        # [M, 1 + s·s, d]: what position embeddings and biases add to the keys and values of each token
        key_positions = self._split(F.linear(positions, attention.k_proj.weight, attention.k_proj.bias))
        value_positions = self._split(F.linear(positions, attention.v_proj.weight, attention.v_proj.bias))
        means = (down.mean(1)[:, :, None] * across.mean(1)[:, None]).flatten(1)  # [n, h·w]
        query = means.to(self.cells.dtype) @ self.cells + positions[0]  # [n, 2 · C], the mean token
        query = F.linear(query, attention.q_proj.weight, attention.q_proj.bias)
        query = self._split(query * (query.shape[1] // heads) ** -0.5)  # [M, n, d]
        products = torch.bmm(query, self.keys.transpose(1, 2)).float()  # [M, n, h·w]
        placed = torch.bmm(query, key_positions.transpose(1, 2)).float()  # [M, n, 1 + s·s]
        with torch.autocast(device, enabled=False):
            pooled = _pool_scores(products.view(heads, count, *self.size), down, across)  # [M, n, s·s]
            logits = torch.cat([pooled.mean(2, keepdim=True), pooled], 2) + placed
            weights = logits.softmax(2)  # [M, n, 1 + s·s]
            spread = weights[..., 1:] + weights[..., :1] / side**2  # the mean token's share goes to all
            taken = _spread_weights(spread.view(heads, count, side, side), down, across)  # [M, n, h·w]
        dtype = self.values.dtype
        mixed = torch.bmm(taken.to(dtype), self.values) + torch.bmm(weights.to(dtype), value_positions)
        out: Tensor = attention.c_proj(mixed.transpose(0, 1).flatten(1))
        return out

    def _split(self, x: Tensor) -> Tensor:
        """Maps [t, 2 · C] to [M, t, d]."""
        return x.reshape(len(x), self.attention.heads, -1).transpose(0, 1)


def _pool_scores(scores: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Maps scores [M, n, h, w] of cells to the windows' bins: [M, n, s·s]."""
    heads, count, height, _ = scores.shape
    side = down.shape[1]
    columns = scores.transpose(0, 1).flatten(1, 2) @ across.transpose(1, 2)  # [n, M·h, s]
    columns = columns.view(count, heads, height, side).transpose(1, 2).flatten(2)  # [n, h, M·s]
    bins = (down @ columns).view(count, side, heads, side)  # [n, s, M, s]
    return bins.permute(2, 0, 1, 3).flatten(2)


def _spread_weights(weights: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Maps weights [M, n, s, s] of the windows' bins to the cells: [M, n, h·w]."""
    heads, count, side, _ = weights.shape
    height, width = down.shape[2], across.shape[2]
    columns = weights.transpose(0, 1).flatten(1, 2) @ across  # [n, M·s, w]
    columns = columns.view(count, heads, side, width).transpose(1, 2).flatten(2)  # [n, s, M·w]
    cells = (down.transpose(1, 2) @ columns).view(count, height, heads, width)
    return cells.permute(2, 0, 1, 3).flatten(2)


class _Maps:
    """Layer4's maps of regions, each computed by itself; see `RegionMaps`."""

    def __init__(self, maps: Tensor) -> None:
        self.maps = maps

    def whole(self) -> Tensor:
        return self.maps

    def convolved(self, conv: nn.Conv2d) -> Tensor:
        found: Tensor = conv(self.maps)
        return found


class _Windows:
    """Regions [n, 5] of one image's map [2 · C, h, w]; see `RegionMaps`."""

    def __init__(self, cells: Tensor, rois: Tensor, side: int, scale: float) -> None:
        self.cells, self.rois, self.side, self.scale = cells, rois, side, scale
        self.down, self.across = region_weights(rois, side, scale, cells.shape[-2:])

    def whole(self) -> Tensor:
        alone = F.pad(self.rois[:, 1:], (1, 0))  # image 0 of one
        return pool_regions(self.cells[None], alone, self.side, self.scale)

    def convolved(self, conv: nn.Conv2d) -> Tensor:
        """Runs the convolution once on the map, and adds its bias after pooling."""
        assert conv.kernel_size == (1, 1)
        cells = F.conv2d(self.cells[None], conv.weight)[0].transpose(0, 1)  # [h, c, w]
        with torch.autocast(cells.device.type, enabled=False):
            rows = self.down @ cells.float().flatten(1)  # [n, s, c·w]
            rows = rows.view(*rows.shape[:2], *cells.shape[1:])
            pooled = rows @ self.across.transpose(1, 2)[:, None]  # [n, s, c, s]
        found = pooled.to(cells.dtype).transpose(1, 2)
        return found if conv.bias is None else found + conv.bias[:, None, None]


def _by_image(regions: Regions, images: int) -> Iterator[tuple[int, Tensor]]:
    """Yields each image that has regions, and which they are: [n] int64; one image when there are none."""
    if images == 1 or not len(regions):
        yield 0, torch.arange(len(regions), device=regions.boxes.device)
        return
    for image in range(images):
        which = torch.nonzero(regions.image_index == image).flatten()
        if len(which):
            yield image, which


def _halved(weights: Tensor) -> Tensor:
    """Returns [n, s, E] of weights [n, 2s, E]: those of bins that are averaged two by two."""
    return (weights[:, 0::2] + weights[:, 1::2]) / 2


def is_recorded(weights: str) -> bool:
    """Whether a file says with which region head its weights were trained."""
    path = find(weights)
    return path.is_file() and is_safetensors(path) and KEY in read_notes(path)


def choose_head(wanted: str, weights: str) -> str:
    """Returns the region head to use with the weights of a file.

    Args:
        wanted: one of `REGION_HEADS`, or "auto": the one that the weights were trained with, and per_region
            where their file does not say.
        weights: the file, or a published name.

    Raises:
        InputError: the weights were trained with another one, or there is no such head.
    """
    if wanted not in HEAD_CHOICES:
        raise InputError(f"region_head={shortened(wanted)} is not one of {', '.join(HEAD_CHOICES)}")
    path = find(weights)
    # Files that `torch.save` wrote are read whole only where their answer counts.
    is_quick = path.is_file() and is_safetensors(path)
    is_asked = wanted not in ("auto", PerRegionHead.kind)
    recorded = read_notes(path).get(KEY, "") if is_quick or is_asked else ""
    if wanted == "auto":
        return recorded or PerRegionHead.kind
    if recorded and wanted != recorded:
        raise InputError(
            f"{weights} was trained with region_head={recorded}; region_head={wanted} would read its map "
            "in a way that it was not trained for. Leave region_head out, or train with the other one"
        )
    return wanted
