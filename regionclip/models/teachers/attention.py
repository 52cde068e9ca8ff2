"""Patch embeddings of transformers that embed an image by one token: the value path of the last block.

In the last block every token attends to itself alone, so that its embedding speaks of its own place
(MaskCLIP, arXiv 2112.01071, section 3.2); the block's residual and MLP are kept.
"""

# B images, t tokens, C channels of a token, D embedding size
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def values_only(block: nn.Module, argument: str, batched: bool = False) -> Iterator[None]:
    """Makes a block's tokens attend to themselves alone, as long as the context lasts.

    Args:
        block: its first argument is [B, t, C]; it adds a mask to the products of queries and keys.
        argument: the mask's name; given by position, it is the second argument.
        batched: whether the mask is [1, 1, t, t]; else [t, t].
    """

    def mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens: Tensor = args[0] if args else kwargs["hidden_states"]
        count = tokens.shape[1]
        apart = tokens.new_full((count, count), float("-inf")).fill_diagonal_(0)
        if batched:
            apart = apart[None, None]
        if len(args) > 1:
            return (args[0], apart, *args[2:]), kwargs
        return args, {**kwargs, argument: apart}

    handle = block.register_forward_pre_hook(mask, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def to_grid(tokens: Tensor) -> Tensor:
    """Returns [B, D, g, g] of embeddings [B, g · g, D].

    Raises:
        ValueError: there are not as many as a square has.
    """
    side = round(tokens.shape[1] ** 0.5)
    if side**2 != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} patches are no square")
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], side, side)


def alone(tokens: Tensor, copies: int = 1) -> Tensor:
    """Returns [B · t, copies, C] of tokens [B, t, C]: each as a sequence of its own, to be pooled as one."""
    return torch.flatten(tokens, 0, 1)[:, None].expand(-1, copies, -1)
