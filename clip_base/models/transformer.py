"""The transformer that both towers share, written for speed with the published parameter names.

Two identities save most of the time against a plain rendering; both are exact up to rounding.

- QuickGELU, x · sigmoid(1.702 x), is silu(1.702 x) / 1.702. The factor goes into the layer norm's gain and
  the linear layers' biases, the division into the residual sum, so that one fused kernel is left.
- A tower reads one token of the last block (class token, end of text, mean of a map). With a single query,
  keys and values need not be computed: q·(K x) = (Kᵀ q)·x, and V Σ a x = Σ a V x. See `attend_once`.
"""

# B sequences, T tokens, C channels, H heads, d = C / H channels of a head
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

QUICK_GELU_SLOPE = 1.702


def layer_norm(x: Tensor, norm: nn.LayerNorm, scale: float = 1.0) -> Tensor:
    """Returns `norm(x) * scale` in x's dtype, which autocast would widen on some devices."""
    weight: Tensor = norm.weight
    bias: Tensor = norm.bias
    if scale != 1.0:
        weight, bias = weight * scale, bias * scale
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)


def attend_once(
    query: Tensor,
    tokens: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor, Tensor, Tensor],
    heads: int,
    hidden: Tensor | None = None,
) -> Tensor:
    """Multi-head attention of one query over each sequence, without computing keys and values.

    Costs about 3 C² + 2 H·T·C multiplications a sequence instead of (1 + 2 T) C².

    Args:
        query: [B, C], the input of the query projection.
        tokens: [B, T, C], the input of the key and value projections.
        weights: query, key and value projections, each [C, C].
        biases: the same projections' biases, each [C].
        heads: H.
        hidden: [B, T] bool, True where the query must not look; None lets it see all.

    Returns:
        [B, C], before the output projection.
    """
    batch, channels = query.shape
    width = channels // heads
    to_query, to_key, to_value = weights
    q = F.linear(query, to_query, biases[0]) * width**-0.5
    q = q.view(batch, heads, width).transpose(0, 1)  # [H, B, d]
    directions = torch.bmm(q, to_key.view(heads, width, channels)).transpose(0, 1)  # [B, H, C]
    logits = torch.bmm(directions, tokens.transpose(1, 2))  # [B, H, T]
    # The key bias moves all logits of a head alike; it stays in the graph so that its gradient (zero) exists.
    offset = (q * biases[1].view(heads, 1, width).to(q.dtype)).sum(-1).T.unsqueeze(-1)  # [B, H, 1]
    logits = logits + offset
    if hidden is not None:
        logits = logits.masked_fill(hidden.unsqueeze(1), float("-inf"))
    attention = logits.softmax(-1, dtype=torch.float32).to(tokens.dtype)
    mixed = torch.bmm(attention, tokens).transpose(0, 1)  # [H, B, C]
    out = torch.bmm(mixed, to_value.view(heads, width, channels).transpose(1, 2))  # [H, B, d]
    return out.transpose(0, 1).reshape(batch, channels) + biases[2].to(out.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """Maps [B, T, C] to [B, T, C]; with `causal` a token sees only itself and those before it."""
        batch, length, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, d]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        mixed: Tensor = self.out_proj(out.transpose(1, 2).reshape(batch, length, width))
        return mixed

    def once(self, query: Tensor, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        """Maps one query a sequence [B, C] over [B, T, C] to [B, C]; see `attend_once`."""
        q_weight, k_weight, v_weight = self.in_proj_weight.chunk(3)
        q_bias, k_bias, v_bias = self.in_proj_bias.chunk(3)
        weights, biases = (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias)
        mixed: Tensor = self.out_proj(attend_once(query, tokens, weights, biases, self.heads, hidden))
        return mixed

    def values(self, x: Tensor) -> Tensor:
        """Maps [B, T, C] to [B, T, C] as if every token attended to itself alone."""
        mixed: Tensor = self.out_proj(
            F.linear(x, self.in_proj_weight.chunk(3)[2], self.in_proj_bias.chunk(3)[2])
        )
        return mixed


class MLP(nn.Module):
    """The two linear layers of a block; `ResidualBlock` computes with them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)


class ResidualBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = nn.LayerNorm(width)
        self.slope = QUICK_GELU_SLOPE if activation == "quick_gelu" else 1.0

    def forward(
        self, x: Tensor, causal: bool = False, at: Tensor | int | None = None, values_only: bool = False
    ) -> Tensor:
        """Maps [B, T, C] to [B, T, C], or to [B, C] when one token is all that is wanted.

        Args:
            x: [B, T, C].
            causal: a token sees only itself and those before it.
            at: the position that is wanted: one number, or [B] int64; None returns all positions.
            values_only: every token attends to itself alone (MaskCLIP, arXiv 2112.01071, section 3.2).
        """
        normed = layer_norm(x, self.ln_1)
        if at is not None:
            rows = torch.arange(x.shape[0], device=x.device)
            hidden = None
            if causal:
                positions = torch.arange(x.shape[1], device=x.device)
                hidden = positions > (at.unsqueeze(1) if isinstance(at, Tensor) else at)
                hidden = hidden.expand(x.shape[0], -1)
            x = x[rows, at] + self.attn.once(normed[rows, at], normed, hidden)  # [B, C]
        elif values_only:
            x = x + self.attn.values(normed)
        else:
            x = x + self.attn(normed, causal)
        return self._feed_forward(x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        up, down, slope = self.mlp.c_fc, self.mlp.c_proj, self.slope
        if slope == 1.0:
            return torch.add(x, down(F.gelu(up(layer_norm(x, self.ln_2)))))
        raised = F.linear(layer_norm(x, self.ln_2, slope), up.weight, up.bias * slope)
        lowered = F.linear(F.silu(raised), down.weight, down.bias * slope)
        return torch.add(x, lowered, alpha=1 / slope)


class Transformer(nn.Module):
    """A stack of blocks.

    Attributes:
        checkpointing: when True, training recomputes each block in the backward pass instead of keeping its
            activations.
    """

    def __init__(self, width: int, heads: int, layers: int, activation: str) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.checkpointing = False
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads, activation) for _ in range(layers))

    def forward(
        self, x: Tensor, causal: bool = False, at: Tensor | int | None = None, values_only: bool = False
    ) -> Tensor:
        """Maps [B, T, C] to [B, T, C], or to [B, C]; `at` and `values_only` apply to the last block."""
        *first, last = self.resblocks
        for block in first:
            x = self._run(block, x, causal, None, False)
        return self._run(last, x, causal, at, values_only)

    def _run(
        self, block: nn.Module, x: Tensor, causal: bool, at: Tensor | int | None, values_only: bool
    ) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, x, causal, at, values_only, use_reentrant=False)
        else:
            out = block(x, causal, at, values_only)
        return out
