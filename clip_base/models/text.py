"""CLIP's text towers: from token ids to one embedding per text."""

# B texts, T token positions, C channels, D embedding size
from __future__ import annotations

import torch
from torch import Tensor, nn

from clip_base.models.configs import TextConfig
from clip_base.models.transformer import ResidualBlock, Transformer, Wanted, all_untouched, layer_norm
from clip_base.runtime.errors import InputError


class TextTower(nn.Module):
    """A causal transformer, read at the end-of-text token (arXiv 2103.00020, section 2.4).

    Attributes:
        context_length: most positions it takes.
        vocab_size: token ids it knows.
        embed_dim: D.
    """

    def __init__(self, config: TextConfig, embed_dim: int, activation: str = "quick_gelu") -> None:
        super().__init__()
        self.context_length, self.vocab_size, self.embed_dim = (
            config.context_length,
            config.vocab_size,
            embed_dim,
        )
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(config.width, config.heads, config.layers, activation, True)
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))
        self._initialize()

    def _initialize(self) -> None:
        """Draws the weights as openai/CLIP does: deviations fall with width and depth."""
        width = self.transformer.width
        out_std = (width * 2 * self.transformer.layers) ** -0.5
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        for block in self.transformer.resblocks:
            assert isinstance(block, ResidualBlock)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=out_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=out_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns one embedding a text, not normalized.

        Args:
            tokens: [B, T] int64, T at most `context_length`; the end-of-text token is each row's largest id,
                as CLIP's vocabulary has it, and what follows it changes nothing.

        Returns:
            [B, D].

        Raises:
            InputError: T is more than the tower's positions.
        """
        _require_room(tokens, self.context_length)
        ends = tokens.argmax(-1)
        if not all_untouched(self.token_embedding, self.transformer, self.ln_final):
            return self._called(tokens, ends)
        if not torch.compiler.is_compiling() and len(tokens):
            # Attention is causal: nothing after the longest text's end can reach any end-of-text token.
            tokens = tokens[:, : int(ends.max()) + 1]
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # [B, T, C]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = self.transformer.run(x, Wanted(at=ends))  # [B, C]
        return layer_norm(x, self.ln_final) @ self.text_projection

    def _called(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """Computes as openai/CLIP does, all positions of all texts, so that hooks see what they see there."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # [B, T, C]
        x = self.transformer(x.transpose(0, 1)).transpose(0, 1)
        x = self.ln_final(x)
        embeddings: Tensor = x[torch.arange(len(x), device=x.device), ends] @ self.text_projection
        return embeddings


class BagOfWordsTower(nn.Module):
    """The mean of the tokens' embeddings and a projection: the other text encoder of CLIP's pseudo-code.

    arXiv 2103.00020, figure 3 ("CBOW or Text Transformer"). The start token is left out; the end token
    counts, so that an empty text has an embedding too.

    Attributes:
        context_length: most positions it takes.
        vocab_size: token ids it knows.
        embed_dim: D.
    """

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.context_length, self.vocab_size, self.embed_dim = (
            config.context_length,
            config.vocab_size,
            embed_dim,
        )
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text_projection, std=config.width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns one embedding a text, not normalized: the order of its tokens changes nothing.

        Args and errors as `TextTower.forward`'s.
        """
        _require_room(tokens, self.context_length)
        ends = tokens.argmax(-1, keepdim=True)  # [B, 1]
        if not torch.compiler.is_compiling() and len(tokens):
            tokens = tokens[:, : int(ends.max()) + 1]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        counted = ((places > 0) & (places <= ends)).unsqueeze(-1)  # [B, T, 1]
        total = (self.token_embedding(tokens) * counted).sum(1)  # [B, C]
        embeddings: Tensor = total / counted.sum(1).clamp_min(1) @ self.text_projection
        return embeddings


def make_text_tower(config: TextConfig, embed_dim: int, activation: str) -> TextTower | BagOfWordsTower:
    """Returns the text tower that `config.kind` names, with random weights."""
    if config.kind == "bow":
        return BagOfWordsTower(config, embed_dim)
    return TextTower(config, embed_dim, activation)


def _require_room(tokens: Tensor, context_length: int) -> None:
    if tokens.shape[1] > context_length:
        raise InputError(
            f"texts have {tokens.shape[1]} token positions, this text tower takes at most "
            f"{context_length}; tokenize with context_length={context_length}"
        )
