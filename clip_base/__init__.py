"""A complete CLIP: towers, tokenizer, weights in all published formats, training and evaluation.

    model, preprocess = clip_base.load("ViT-B/32")
    tokens = clip_base.tokenize(["a cat", "a dog"])
    logits_per_image, logits_per_text = model(preprocess(image)[None], tokens)

`available_models`, `load` and `tokenize` have the names and the behavior that users of openai/CLIP know.
They are looked up when they are first used, so that `import clip_base` loads no PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clip_base.runtime.lazy import lazy

if TYPE_CHECKING:
    from clip_base.data.batch import ImageBatch
    from clip_base.jobs.config import option, plugin
    from clip_base.jobs.run import RunFolder
    from clip_base.models.tokenizer import tokenize
    from clip_base.models.zoo import available_models
    from clip_base.runtime.errors import InputError
    from clip_base.weights.load import load

__all__ = [
    "ImageBatch",
    "InputError",
    "RunFolder",
    "available_models",
    "load",
    "option",
    "plugin",
    "tokenize",
]
__version__: str  # looked up as the names are
__getattr__, __dir__ = lazy(
    __name__,
    {
        "ImageBatch": "clip_base.data.batch",
        "InputError": "clip_base.runtime.errors",
        "RunFolder": "clip_base.jobs.run",
        "available_models": "clip_base.models.zoo",
        "load": "clip_base.weights.load",
        "option": "clip_base.jobs.config",
        "plugin": "clip_base.jobs.config",
        "tokenize": "clip_base.models.tokenizer",
    },
)
