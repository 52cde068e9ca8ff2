"""Box heads: box deltas per region, from its embedding or from layer4's feature map.

A box head is a `BoxHead` that a package declares in the entry-point group `regionclip.box_heads`. The file of
a detector names its head, so that it is made again when the file is read.
"""

# N regions, C channels and s side of layer4's map of a region, D embedding size
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from clip_base.jobs import plugins
from clip_base.models.configs import CLIPConfig
from regionclip.models.region_heads import RegionMaps

BOX_HEADS = "regionclip.box_heads"
CHANNELS, HIDDEN = 64, 256  # of the head that reads maps


@dataclass(frozen=True)
class BoxHeadConfig:
    """The sizes of what a box head reads."""

    embed_dim: int  # D
    channels: int  # C
    side: int  # s


class BoxHead(nn.Module):
    """Moves boxes. A subclass is made of a `BoxHeadConfig`, and so that boxes hardly move yet.

    Attributes:
        kind: the name in `regionclip.box_heads` that it was made by, kept in detectors' files.
    """

    kind = ""

    def deltas(self, embeddings: Tensor, maps: RegionMaps) -> Tensor:
        """Returns [N, 4] deltas: of the centers in widths and heights, and the logarithms of the factors.

        Args:
            embeddings: [N, D], of the regions, not of unit length.
            maps: layer4's maps of the regions; `maps.whole()` is [N, C, s, s], `maps.convolved(conv)` a 1×1
                convolution of it, which the shared region head computes once per image.
        """
        raise NotImplementedError(f"{type(self).__name__} must define deltas")


class EmbeddingBoxes(nn.Linear, BoxHead):
    """The published head: linear in a region's embedding."""

    def __init__(self, config: BoxHeadConfig) -> None:
        super().__init__(config.embed_dim, 4)
        begin_still(self)

    def deltas(self, embeddings: Tensor, maps: RegionMaps) -> Tensor:
        """Returns [N, 4] deltas of regions' embeddings [N, D]; their maps are not read."""
        found: Tensor = self(embeddings)
        return found


class MapBoxes(BoxHead):
    """Reads where an object begins and ends off layer4's map [N, C, s, s], before it is pooled."""

    def __init__(self, config: BoxHeadConfig) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(config.channels, CHANNELS, 1)
        self.hidden = nn.Linear(CHANNELS * config.side**2, HIDDEN)
        self.moves = nn.Linear(HIDDEN, 4)
        begin_still(self.moves)

    def deltas(self, embeddings: Tensor, maps: RegionMaps) -> Tensor:
        """Returns [N, 4] deltas of regions' maps; their embeddings are not read."""
        found: Tensor = self(maps)
        return found

    def forward(self, maps: RegionMaps) -> Tensor:
        """Returns [N, 4] deltas."""
        x = maps.convolved(self.reduce).relu_().flatten(1)  # [N, 64 · s · s]
        deltas: Tensor = self.moves(self.hidden(x).relu_())
        return deltas


def begin_still(last: nn.Linear) -> None:
    """Initializes a head's last layer so that its boxes hardly move yet."""
    nn.init.normal_(last.weight, std=0.001)
    nn.init.zeros_(last.bias)


def make_box_head(kind: str, clip: CLIPConfig) -> BoxHead:
    """Returns a head whose boxes hardly move yet.

    Args:
        kind: a name in `regionclip.box_heads`: "embedding", the published one, is linear in the region's
            embedding; "map" reads layer4's map; other packages may declare more.
        clip: the sizes of the CLIP whose ResNet tower it stands on.

    Raises:
        InputError: there is no such head.
        TypeError: what is declared under that name is no `BoxHead`.
    """
    head = plugins.load(BOX_HEADS, kind)(
        BoxHeadConfig(clip.embed_dim, clip.vision.width * 32, clip.vision.resolution // 32)
    )
    if not isinstance(head, BoxHead):
        raise TypeError(f"{BOX_HEADS}: {kind!r} makes a {type(head).__name__}, which is no BoxHead")
    head.kind = kind
    return head
