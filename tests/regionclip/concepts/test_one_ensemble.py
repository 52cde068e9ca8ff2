"""A name has one direction, whoever asks: the library, a vocabulary, zero-shot classification."""

from __future__ import annotations

import inspect

import torch

from clip_base.evaluation.prompts import DEFAULT_TEMPLATES, classifier, ensemble
from clip_base.jobs import plugins
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.models.tokenizer import Tokenizer
from regionclip.checkpoints.load import vocabulary_for
from regionclip.concepts.vocabulary import embed
from regionclip.inference.predictor import Predictor, load
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig

NAMES = ["cat", "orange_juice", "fire truck"]


def clip() -> CLIP:
    torch.manual_seed(0)
    vision = VisionConfig(kind="vit", layers=[1], width=64, patch=16, resolution=32)
    return CLIP(CLIPConfig(32, vision, TextConfig(64, 1, 1, 20))).eval()


def test_library_and_commands_give_the_same_vectors() -> None:
    model = clip()
    library = embed(model, Tokenizer(20), NAMES)
    detector = Detector(model, DetectorConfig()).eval()
    command = vocabulary_for(detector, NAMES, NAMES, DEFAULT_TEMPLATES)
    torch.testing.assert_close(command.embeddings, library.embeddings, rtol=0, atol=0)
    torch.testing.assert_close(classifier(model, NAMES, DEFAULT_TEMPLATES), library.embeddings)


def test_the_ensemble_is_the_mean_of_unit_length_prompts() -> None:
    model = clip()
    texts = ["a photo of an orange juice.", "orange juice"]
    with torch.no_grad():
        each = torch.nn.functional.normalize(model.encode_text(Tokenizer(20)(texts)), dim=-1)
    wanted = torch.nn.functional.normalize(each.mean(0), dim=-1)
    found = ensemble(model, Tokenizer(20), ["orange_juice"], ["a photo of {article} {}.", "{}"])
    torch.testing.assert_close(found[0], wanted)


def test_every_place_has_the_same_default_templates() -> None:
    for function in (embed, ensemble, load, Predictor.__init__):
        assert inspect.signature(function).parameters["templates"].default is DEFAULT_TEMPLATES
    for job in ("mine", "evaluate", "detect", "features", "train-detector"):
        schema = plugins.schema_of(plugins.load("clip_base.jobs", f"region-{job}"))
        assert schema.__dataclass_fields__["templates"].default_factory() == list(DEFAULT_TEMPLATES)
