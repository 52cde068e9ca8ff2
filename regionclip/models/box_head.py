"""What moves a detector's boxes: four numbers a region, from its embedding or from layer4's map of it."""

# N regions, C channels and s side of layer4's map of a region, D embedding size
from __future__ import annotations

from torch import Tensor, nn

from clip_base.models.configs import CLIPConfig

CHANNELS, HIDDEN = 64, 256  # of the head that reads maps


class EmbeddingBoxes(nn.Linear):
    """The published head: linear in a region's embedding."""

    kind = "embedding"

    def __init__(self, embed_dim: int) -> None:
        super().__init__(embed_dim, 4)

    def deltas(self, embeddings: Tensor, maps: Tensor) -> Tensor:
        """Returns [N, 4] deltas of regions' embeddings [N, D]; their maps are not read."""
        found: Tensor = self(embeddings)
        return found


class MapBoxes(nn.Module):
    """Reads where an object begins and ends off layer4's map [N, C, s, s], before it is pooled.

    Args:
        channels: C.
        side: s.
    """

    kind = "map"

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, CHANNELS, 1)
        self.hidden = nn.Linear(CHANNELS * side * side, HIDDEN)
        self.moves = nn.Linear(HIDDEN, 4)

    def deltas(self, embeddings: Tensor, maps: Tensor) -> Tensor:
        """Returns [N, 4] deltas of regions' maps; their embeddings are not read."""
        found: Tensor = self(maps)
        return found

    def forward(self, maps: Tensor) -> Tensor:
        """Returns [N, 4] deltas."""
        x = self.reduce(maps).relu_().flatten(1)  # [N, 64 · s · s]
        deltas: Tensor = self.moves(self.hidden(x).relu_())
        return deltas


BoxHead = EmbeddingBoxes | MapBoxes
BOX_HEADS = (EmbeddingBoxes.kind, MapBoxes.kind)


def make_box_head(kind: str, clip: CLIPConfig) -> BoxHead:
    """Returns a head whose boxes hardly move yet.

    Args:
        kind: "embedding", the published one, is linear in the region's embedding; "map" reads layer4's map.
        clip: the sizes of the CLIP whose ResNet tower it stands on.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in BOX_HEADS:
        raise ValueError(f"boxes must be one of {', '.join(BOX_HEADS)}, got {kind!r}")
    head: BoxHead
    last: nn.Linear
    if kind == EmbeddingBoxes.kind:
        last = head = EmbeddingBoxes(clip.embed_dim)
    else:
        head = MapBoxes(clip.vision.width * 32, clip.vision.resolution // 32)
        last = head.moves
    nn.init.normal_(last.weight, std=0.001)
    nn.init.zeros_(last.bias)
    return head
