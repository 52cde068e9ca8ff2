"""The transformer of both towers, optimized for speed, with the published parameter names.

Two identities save most of the time against a plain rendering; both are exact up to rounding.

- QuickGELU, x · sigmoid(1.702 x), is silu(1.702 x) / 1.702. The factor goes into the layer norm's gain and
  the linear layers' biases, the division into the residual sum, so that one fused kernel is left.
- A tower reads one token of the last block (class token, end of text, mean of a map). With a single query,
  keys and values need not be computed: q·(K x) = (Kᵀ q)·x, and V Σ a x = Σ a V x. See `attend_once`.

Both use modules' weights without calling the modules. Where that would be seen, because a hook waits on one
or somebody has replaced one (`untouched`), all are called as openai/CLIP's are, in its layout [T, B, C].
"""

# B sequences, T tokens, C channels, H heads, d = C / H channels of a head
from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.checkpoint import checkpoint

QUICK_GELU_SLOPE = 1.702
# Modules of torch whose weights are used here without a call, or that have none. Ours say `folded`.
FOLDED: frozenset[type[nn.Module]] = frozenset(
    (
        nn.Embedding,
        nn.Linear,
        NonDynamicallyQuantizableLinear,
        nn.LayerNorm,
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.ReLU,
        nn.GELU,
        nn.AvgPool2d,
        nn.Identity,
        nn.Sequential,
    )
)


def untouched(module: nn.Module) -> bool:
    """Whether `module` and all below compute what their classes say, so that weights may be used directly.

    False: a hook waits on one (Grad-CAM, pruning, profilers), or one was replaced by another type (LoRA,
    quantization); then the modules must be called.
    """
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ) and _is_hooked(module):
        return False
    kind = type(module)
    if kind not in FOLDED and not getattr(kind, "folded", False):
        return False
    return all_untouched(*module._modules.values())


def all_untouched(*modules: nn.Module | None) -> bool:
    """Whether each of them is `untouched`; None, an absent part, is."""
    for module in modules:  # noqa: SIM110 - a generator takes twice the time, and this runs in every forward
        if module is not None and not untouched(module):
            return False
    return True


def _is_hooked(module: nn.Module) -> bool:
    """Whether a hook is more than FSDP's, which gathers a block's weights whenever the block is called."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    names = (str(getattr(hook, "__module__", "")) for some in hooks for hook in some.values())
    return any(not name.startswith("torch.distributed.") for name in names)


def layer_norm(x: Tensor, norm: nn.LayerNorm, scale: float = 1.0) -> Tensor:
    """Returns `norm(x) * scale` in x's dtype, which autocast would widen on some devices."""
    if not untouched(norm):
        return _called(x, norm) * scale
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


class Attention(nn.MultiheadAttention):
    """PyTorch's multi-head attention, and faster ways to compute it that do not go through a call."""

    folded = True
    in_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)

    def whole(self, x: Tensor, causal: bool) -> Tensor:
        """Maps [B, T, C] to [B, T, C]; with `causal` a token sees only itself and those before it."""
        batch, length, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (
            qkv.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        )  # [B, H, T, d]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        mixed: Tensor = self.out_proj(out.transpose(1, 2).reshape(batch, length, width))
        return mixed

    def once(self, query: Tensor, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        """Maps one query a sequence [B, C] over [B, T, C] to [B, C]; see `attend_once`."""
        q_weight, k_weight, v_weight = self.in_proj_weight.chunk(3)
        q_bias, k_bias, v_bias = self.in_proj_bias.chunk(3)
        weights, biases = (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias)
        mixed: Tensor = self.out_proj(attend_once(query, tokens, weights, biases, self.num_heads, hidden))
        return mixed

    def values(self, x: Tensor) -> Tensor:
        """Maps [B, T, C] to [B, T, C] as if every token attended to itself alone."""
        mixed: Tensor = self.out_proj(
            F.linear(x, self.in_proj_weight.chunk(3)[2], self.in_proj_bias.chunk(3)[2])
        )
        return mixed


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), an approximation of GELU that OpenAI's models were trained with."""

    folded = True

    def forward(self, x: Tensor) -> Tensor:
        """Maps any shape to the same."""
        return x * torch.sigmoid(QUICK_GELU_SLOPE * x)


class MLP(nn.Sequential):
    """The two linear layers of a block and the activation between them."""

    folded = True
    c_fc: nn.Linear
    gelu: QuickGELU | nn.GELU
    c_proj: nn.Linear

    def __init__(self, width: int, activation: str) -> None:
        between = QuickGELU() if activation == "quick_gelu" else nn.GELU()
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        super().__init__(OrderedDict([("c_fc", up), ("gelu", between), ("c_proj", down)]))


class Wanted(NamedTuple):
    """What a block is to compute of [B, T, C], when not all of it.

    Attributes:
        at: the position that is wanted: one number, or [B] int64; None: all positions.
        values_only: every token attends to itself alone (MaskCLIP, arXiv 2112.01071, section 3.2).
    """

    at: Tensor | int | None = None
    values_only: bool = False


ALL = Wanted()


class ResidualBlock(nn.Module):
    """A pre-norm transformer block.

    Attributes:
        causal: a token sees only itself and those before it.
    """

    folded = True

    def __init__(self, width: int, heads: int, activation: str, causal: bool = False) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width, activation)
        self.ln_2 = nn.LayerNorm(width)
        self.causal = causal

    def forward(self, x: Tensor, wanted: Wanted | None = None) -> Tensor:
        """Maps [T, B, C] to [T, B, C], as openai/CLIP's block.

        With `wanted`, as this package's towers call it, [B, T, C] to the same or, of one token, to [B, C].
        """
        if wanted is None:
            normed = _called(x, self.ln_1)
            mask = _causal_mask(x) if self.causal else None
            x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
            return torch.add(x, self.mlp(_called(x, self.ln_2)))
        normed = layer_norm(x, self.ln_1)
        at = wanted.at
        if at is not None:
            rows = torch.arange(x.shape[0], device=x.device)
            hidden = None
            if self.causal:
                positions = torch.arange(x.shape[1], device=x.device)
                hidden = positions > (at.unsqueeze(1) if isinstance(at, Tensor) else at)
                hidden = hidden.expand(x.shape[0], -1)
            x = x[rows, at] + self.attn.once(normed[rows, at], normed, hidden)  # [B, C]
        elif wanted.values_only:
            x = x + self.attn.values(normed)
        else:
            x = x + self.attn.whole(normed, self.causal)
        return self._feed_forward(x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        if not untouched(mlp):
            return torch.add(x, mlp(layer_norm(x, self.ln_2)))
        up, down = mlp.c_fc, mlp.c_proj
        if not isinstance(mlp.gelu, QuickGELU):
            return torch.add(x, down(F.gelu(up(layer_norm(x, self.ln_2)))))
        slope = QUICK_GELU_SLOPE
        raised = F.linear(layer_norm(x, self.ln_2, slope), up.weight, up.bias * slope)
        lowered = F.linear(F.silu(raised), down.weight, down.bias * slope)
        return torch.add(x, lowered, alpha=1 / slope)


def _called(x: Tensor, norm: nn.Module) -> Tensor:
    """Returns `norm(x)` of a module that is called, in x's dtype."""
    out: Tensor = norm(x)
    return out.to(x.dtype)


def _causal_mask(x: Tensor) -> Tensor:
    """Returns [T, T] for [T, B, C]: -inf where a token must not look."""
    mask = torch.full((len(x), len(x)), -torch.inf, dtype=x.dtype, device=x.device)
    return mask.triu_(1)


class Transformer(nn.Module):
    """A stack of blocks.

    Attributes:
        checkpointing: when True, training recomputes each block in the backward pass instead of keeping its
            activations.
    """

    folded = True

    def __init__(self, width: int, heads: int, layers: int, activation: str, causal: bool = False) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.checkpointing = False
        self.resblocks = nn.Sequential(
            *(ResidualBlock(width, heads, activation, causal) for _ in range(layers))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [T, B, C] to [T, B, C], as openai/CLIP's transformer: each block and its parts are called."""
        out: Tensor = self.resblocks(x)
        return out

    def run(self, x: Tensor, wanted: Wanted = ALL) -> Tensor:
        """Maps [B, T, C] to [B, T, C], or to [B, C] of one token; `wanted` applies to the last block."""
        *first, last = self.resblocks
        if not untouched(self):
            if not wanted.values_only:
                x = self(x.transpose(0, 1)).transpose(0, 1)
                return x if wanted.at is None else x[torch.arange(len(x), device=x.device), wanted.at]
            for block in first:
                x = block(x.transpose(0, 1)).transpose(0, 1)
            out: Tensor = last(x, wanted)
            return out
        for block in first:
            x = self._run(block, x, ALL)
        return self._run(last, x, wanted)

    def _run(self, block: nn.Module, x: Tensor, wanted: Wanted) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, x, wanted, use_reentrant=False)
        else:
            out = block(x, wanted)
        return out
