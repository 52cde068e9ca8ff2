"""Weights in files: our own form (`native`), the published ones (`reading`), and how to get them.

`load_clip(path_or_name)` reads any of them; it is looked up late, so that importing this package costs
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_base.weights.load import load_clip as load_clip

__all__ = ["load_clip"]


def __getattr__(name: str) -> Any:
    if name == "load_clip":
        from clip_base.weights.load import load_clip

        return load_clip
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
