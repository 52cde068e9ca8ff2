"""The space that a student's regions are taught to lie in: its own texts', or its teacher's."""

# C concepts, D embedding size
from __future__ import annotations

import dataclasses
import json
import sys

import torch
from torch import nn

from clip_base.models.clip import CLIP, ImageTower
from clip_base.models.resnet import ModifiedResNet
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputError
from regionclip.concepts.vocabulary import Vocabulary, embed
from regionclip.training.region_text import RegionPretrainConfig

LOOKED_AT = 8  # concepts whose embeddings are compared
SAME = 0.999  # cosine of one text's embeddings by one tower, whatever the processor rounds


def in_one_space(student: CLIP, mined: Vocabulary, config: RegionPretrainConfig) -> tuple[CLIP, Vocabulary]:
    """Returns the student and the concepts' embeddings that it is taught with.

    Args:
        student: its vision tower is taken.
        mined: the concepts as the teacher's text tower embedded them.
        config: `text_embeddings` says whose they shall be.

    Returns:
        The student, without its text tower when the teacher's embeddings replace that one's, and with a new
        projection where these have another size; and the vocabulary, in the space of that student.

    Raises:
        InputError: neither fits the student.
    """
    if config.text_embeddings == "teacher":
        return without_text_tower(student, mined.width, config.freeze_stages), mined
    if isinstance(student, ImageTower):
        if config.text_embeddings == "student":
            raise InputError(
                f"text_embeddings=student: {config.weights} has no text tower; give text_embeddings=teacher"
            )
        if config.image_text or config.train_text:
            raise InputError(
                f"{config.weights} has no text tower to read captions with; set image_text=0 and "
                "train_text=false"
            )
        mined.require_width(student.config.embed_dim, config.weights)
        return student, mined
    if is_of(student, mined):
        return student, mined
    templates = mined.provenance.get("templates")
    if templates is None:  # not made by `regionclip mine`: nobody knows whose they are
        mined.require_width(student.config.embed_dim, config.weights)
        return student, mined
    print(
        f"the {len(mined)} concepts were mined with another text tower than that of {config.weights}, which "
        "embeds their names anew (text_embeddings=student); text_embeddings=teacher takes them as they are",
        file=sys.stderr,
        flush=True,
    )
    return student, _embedded_by(student, mined, len(mined))


def is_of(clip: CLIP, vocabulary: Vocabulary) -> bool:
    """Whether a vocabulary's embeddings are those of a CLIP's text tower, as far as a few of them tell."""
    if "templates" not in vocabulary.provenance or vocabulary.width != clip.config.embed_dim:
        return False
    few = _embedded_by(clip, vocabulary, LOOKED_AT).embeddings
    return bool(((few * vocabulary.embeddings[: len(few)]).sum(1) > SAME).all())


def _embedded_by(clip: CLIP, vocabulary: Vocabulary, count: int) -> Vocabulary:
    templates = json.loads(vocabulary.provenance["templates"])
    return embed(clip, Tokenizer(clip.config.text.context_length), vocabulary.names[:count], templates)


def without_text_tower(student: CLIP, width: int, freeze_stages: int) -> ImageTower:
    """Returns a student whose embeddings have `width` numbers; where that is new, the projection is, too.

    Raises:
        InputError: the new projection would stay as it begins.
    """
    config = dataclasses.replace(student.config, embed_dim=width)
    visual = student.visual
    if width != student.config.embed_dim:
        if freeze_stages > 4:
            raise InputError(
                f"freeze_stages={freeze_stages} freezes the head, whose projection is new: the teacher's "
                f"embeddings have {width} numbers, the student's {student.config.embed_dim}; set it to 4 or "
                "less"
            )
        print(
            f"the student's projection is new: the teacher's embeddings have {width} numbers, its own had "
            f"{student.config.embed_dim}",
            file=sys.stderr,
            flush=True,
        )
        if isinstance(visual, ModifiedResNet):
            visual.attnpool.c_proj = nn.Linear(visual.attnpool.c_proj.in_features, width)
        else:
            visual.proj = nn.Parameter(
                visual.proj.shape[0] ** -0.5 * torch.randn(visual.proj.shape[0], width)
            )
        visual.embed_dim = width
    return ImageTower.of(student, config)
