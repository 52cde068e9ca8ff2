"""The job `embed`: names as a teacher's text tower embeds them, in a vocabulary's file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clip_base.evaluation.prompts import DEFAULT_TEMPLATES
from clip_base.jobs.config import REQUIRED, Plugin, option, plugin
from clip_base.jobs.everyday import everyday
from clip_base.runtime.errors import InputError
from clip_base.runtime.precision import pick_device
from regionclip.concepts.vocabulary import embed
from regionclip.data.categories import parse_names
from regionclip.models.teachers.base import CLIP_BACKEND, load_teacher
from regionclip.models.teachers.base import GROUP as TEACHERS


@everyday(
    "embed vocabulary=names.txt weights=ViT-B-16-SigLIP2/webli backend.name=open_clip out=names.safetensors",
    input="vocabulary",
    output="out",
    model="weights backend.name",
)
@dataclass(kw_only=True)
class EmbedConfig:
    """Options of embedding names."""

    vocabulary: str = option(
        REQUIRED, "names: a, b, c; coco, lvis, …; or a file with one name per line, COCO's annotations, …"
    )
    weights: str = option(REQUIRED, "the model: a CLIP; of another backend, what that reads")
    out: str = option(REQUIRED, "file to write, .safetensors", runtime_only=True)
    backend: Plugin = plugin(
        TEACHERS,
        CLIP_BACKEND,
        "whose model it is: clip (what this package reads), open_clip (SigLIP, EVA, ConvNeXt, …), "
        "transformers",
    )
    templates: list[str] = option(list(DEFAULT_TEMPLATES), "prompts, averaged; {} is the name")
    device: str = option("auto", "auto uses a GPU if there is one", runtime_only=True)


def embed_names(config: EmbedConfig) -> None:
    """Embeds names with any teacher's text tower; `embeddings=` of other commands takes the file."""
    if Path(config.out).suffix != ".safetensors":
        raise InputError(f"out={config.out}: embeddings are a .safetensors file; give such a name")
    names = parse_names(config.vocabulary)
    teacher = load_teacher(config.backend, config.weights).to(pick_device(config.device))
    vocabulary = embed(teacher, teacher.tokenize, names, config.templates)
    vocabulary.save(config.out)
    print(f"{config.out}: {len(vocabulary)} names in {vocabulary.width} numbers each")
