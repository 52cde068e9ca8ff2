"""CLIP's vision transformer: one embedding per image, or a dense map of patch embeddings."""

# B images, G = h · w patches, C channels of a token, D embedding size, p side of a patch in pixels
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_base.models.configs import VisionConfig
from clip_base.models.positions import resample_positions
from clip_base.models.transformer import Transformer, Wanted, layer_norm, untouched
from clip_base.runtime.errors import InputError


class VisionTransformer(nn.Module):
    """A ViT with an extra layer norm before its transformer (arXiv 2103.00020, section 2.4).

    Attributes:
        resolution: side of the square image it was made for, in pixels.
        stride: pixels from one cell of its maps to the next (the patch's side).
        freezable: empty: it has no stages.
        trunk_channels: C.
        embed_dim: D.
    """

    freezable: tuple[tuple[str, ...], ...] = ()

    def __init__(self, config: VisionConfig, embed_dim: int, activation: str = "quick_gelu") -> None:
        super().__init__()
        self.resolution, self.stride = config.resolution, config.patch
        self.trunk_channels, self.embed_dim = config.width, embed_dim
        scale = config.width**-0.5
        self.conv1 = nn.Conv2d(3, config.width, config.patch, config.patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(config.width))
        cells = (config.resolution // config.patch) ** 2
        self.positional_embedding = nn.Parameter(scale * torch.randn(cells + 1, config.width))
        self.ln_pre = nn.LayerNorm(config.width)
        self.transformer = Transformer(config.width, config.heads, config.layers[0], activation)
        self.ln_post = nn.LayerNorm(config.width)
        self.proj = nn.Parameter(scale * torch.randn(config.width, embed_dim))

    @property
    def input_resolution(self) -> int:
        """The same as `resolution`, under openai/CLIP's name."""
        return self.resolution

    @property
    def output_dim(self) -> int:
        """The same as `embed_dim`, under openai/CLIP's name."""
        return self.embed_dim

    def forward(self, images: Tensor) -> Tensor:
        """Returns [B, D], one embedding an image, not normalized.

        Args:
            images: [B, 3, H, W], normalized; any size of at least one patch. What is left over beside the
                last whole patch is not seen; position embeddings are resampled for other grids than its own.
        """
        return self.pooled(images) @ self.proj

    def pooled(self, images: Tensor) -> Tensor:
        """Returns [B, C], the class token before the projection into the space of the embeddings."""
        tokens, _, _ = self._embed(images)
        x = self.transformer.run(tokens, Wanted(at=0))  # [B, C]
        return layer_norm(x, self.ln_post)

    def cells(self, images: Tensor) -> Tensor:
        """Returns [B, 1 + G, C], all tokens as `pooled` has the first: what a decoder attends to."""
        tokens, _, _ = self._embed(images)
        return layer_norm(self.transformer.run(tokens), self.ln_post)

    def cells_and_embedding(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `cells(images)` and `self(images)` for little more than the price of one."""
        cells = self.cells(images)
        return cells, cells[:, 0] @ self.proj

    def drop_head(self) -> None:
        """Deletes what only embeddings need: for a tower that is read by its cells alone."""
        del self.proj

    @property
    def cell_channels(self) -> int:
        """Channels of `cells`."""
        return self.trunk_channels

    def trunk(self, images: Tensor) -> Tensor:
        """Returns [B, C, h, w], the patch tokens after the last block, without the class token."""
        tokens, height, width = self._embed(images)
        x = self.transformer.run(tokens)[:, 1:]  # [B, G, C]
        return x.transpose(1, 2).reshape(len(x), x.shape[-1], height, width)

    def dense(self, images: Tensor) -> Tensor:
        """Returns [B, D, h, w], an embedding for each patch in the space of the image embeddings.

        In the last block every token attends to itself alone, so that its embedding speaks of its own place:
        the value path of MaskCLIP (arXiv 2112.01071, section 3.2), with the block's residual and MLP kept.
        """
        tokens, height, width = self._embed(images)
        x = self.transformer.run(tokens, Wanted(values_only=True))[:, 1:]  # [B, G, C]
        x = layer_norm(x, self.ln_post) @ self.proj  # [B, G, D]
        return x.transpose(1, 2).reshape(len(x), x.shape[-1], height, width)

    def _embed(self, images: Tensor) -> tuple[Tensor, int, int]:
        """Returns the transformer's input [B, 1 + G, C] and the grid's height and width."""
        patch = self.stride
        height, width = images.shape[-2] // patch, images.shape[-1] // patch
        if not height or not width:
            raise InputError(f"images are {list(images.shape[-2:])} pixels, smaller than a patch of {patch}")
        images = images[..., : height * patch, : width * patch].to(self.conv1.weight.dtype)
        # A convolution whose stride is its size is one matrix product over patches; no transposition follows.
        # Not len(): in an exported graph the number of images is a variable.
        batch = images.shape[0]
        if untouched(self.conv1):
            patches = images.reshape(batch, 3, height, patch, width, patch)
            patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width, -1)  # [B, G, 3·p·p]
            x = F.linear(patches, self.conv1.weight.flatten(1))  # [B, G, C]
        else:
            x = self.conv1(images).flatten(2).transpose(1, 2)  # [B, G, C]
        first = self.class_embedding.to(x.dtype).expand(batch, 1, -1)
        positions = resample_positions(self.positional_embedding, height, width).to(x.dtype)
        return layer_norm(torch.cat([first, x], 1) + positions, self.ln_pre), height, width
