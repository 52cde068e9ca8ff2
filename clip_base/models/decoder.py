"""A transformer decoder that reads a text and an image's cells, and tells the token at each position."""

# B texts, T token positions, G cells of an image, C channels of the decoder, V rows of the vocabulary
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip_base.models.configs import TextConfig
from clip_base.runtime.errors import InputError


class CaptionDecoder(nn.Module):
    """Blocks of self-attention over the text and cross-attention to the image's cells.

    Output and input share their embeddings, as in VirTex (arXiv 2006.06666, section 3).

    Attributes:
        causal: a token sees only itself and those before it.
        context_length: most positions it takes.
        checkpointing: when True, training recomputes each block in the backward pass.
    """

    def __init__(self, sizes: TextConfig, cell_channels: int, rows: int, causal: bool) -> None:
        super().__init__()
        if sizes.kind != "transformer":
            raise InputError(
                f"a decoder of captions takes its sizes from a transformer's, found text.kind={sizes.kind}; "
                "omit text.kind"
            )
        width = sizes.width
        self.causal, self.context_length, self.checkpointing = causal, sizes.context_length, False
        self.token_embedding = nn.Embedding(rows, width)
        self.positional_embedding = nn.Parameter(torch.empty(sizes.context_length, width))
        self.cell_projection = nn.Sequential(nn.Linear(cell_channels, width), nn.LayerNorm(width))
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width,
                sizes.heads,
                4 * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(sizes.layers)
        )
        self.ln_final = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(rows))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def forward(self, cells: Tensor, rows: Tensor, padding: Tensor) -> Tensor:
        """Returns [B, T, V] logits of the vocabulary at every position.

        Args:
            cells: [B, G, channels], of each text's image.
            rows: [B, T] int64, the text as rows of the vocabulary.
            padding: [B, T] bool, True after a text's end.
        """
        length = rows.shape[1]
        x = self.token_embedding(rows) + self.positional_embedding[:length]  # [B, T, C]
        memory = self.cell_projection(cells)  # [B, G, C]
        # With a causal mask what follows the end reaches no token before it.
        mask = nn.Transformer.generate_square_subsequent_mask(length, x.device) if self.causal else None
        hidden = None if self.causal else padding
        for block in self.blocks:
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, memory, mask, None, hidden, None, self.causal, use_reentrant=False)
            else:
                x = block(x, memory, mask, None, hidden, None, self.causal)
        x, weight = self.ln_final(x), self.token_embedding.weight
        logits: Tensor
        if self.training:
            logits = x @ weight.T + self.bias
            return logits
        with torch.autocast(x.device.type, enabled=False):  # bfloat16: different words would score alike
            logits = x.float() @ weight.float().T + self.bias.float()
        return logits
