"""Files of models that were pretrained by predicting captions: a vision tower and an objective's part."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip_base.jobs import config as configs
from clip_base.jobs import plugins
from clip_base.jobs.config import Plugin, build_plugin
from clip_base.models.clip import VisionTower, make_vision_tower
from clip_base.models.configs import CLIPConfig
from clip_base.models.predictor import (
    OBJECTIVES,
    TextObjective,
    TextObjectiveConfig,
    TextPredictor,
    TokenVocabulary,
)
from clip_base.runtime.errors import InputError, quote
from clip_base.weights.native import (
    load_exactly,
    read_metadata,
    read_weights,
    require_sizes,
    sizes_in,
    write_weights,
)
from clip_base.weights.reading import TEXT_PREDICTOR as FORMAT
from clip_base.weights.reading import is_safetensors

_IDS = "objective.vocabulary.ids"


def predicts_text(spec: Plugin) -> bool:
    """Whether the objective that `spec` names is a `TextObjective`, and not a loss over embeddings."""
    target = plugins.load(OBJECTIVES, str(spec.get("name", "")))
    return isinstance(target, type) and issubclass(target, TextObjective)


def text_options(spec: Plugin) -> TextObjectiveConfig:
    """Returns the options of the objective that `spec` names, for which `predicts_text`; checked.

    Raises:
        InputError: an option is unknown or wrong.
    """
    target = plugins.load(OBJECTIVES, str(spec["name"]))
    options = {key: value for key, value in spec.items() if key != "name"}
    made: TextObjectiveConfig = configs.check(plugins.schema_of(target), options, f"objective {spec['name']}")
    return made


def build_text_objective(
    spec: Plugin, sizes: CLIPConfig, visual: VisionTower, vocabulary: Tensor
) -> TextObjective:
    """Returns the objective that `spec` names, with random weights, for the cells of `visual`.

    Args:
        spec: name and options.
        sizes: of the towers.
        visual: what gives it cells.
        vocabulary: [K] int64, the token ids that it tells apart.
    """
    context = {
        "sizes": sizes,
        "cell_channels": visual.cell_channels,
        "vocabulary": TokenVocabulary(vocabulary),
    }
    objective: TextObjective = build_plugin(OBJECTIVES, spec, **context)
    return objective


def save_predictor(
    path: str | Path, config: CLIPConfig, visual: nn.Module, objective: TextObjective, spec: Plugin
) -> None:
    """Writes a vision tower and the objective that reads it, atomically.

    Args:
        path: where.
        config: sizes of the towers.
        visual: the tower, whose head is left out when the objective reads cells.
        objective: what was trained beside it.
        spec: its name and options.
    """
    with torch.device("meta"):  # names only
        read = make_vision_tower(config)
    if objective.reads == "cells":
        read.drop_head()
    names = read.state_dict().keys()
    state = {f"visual.{name}": value for name, value in visual.state_dict().items() if name in names}
    state |= {f"objective.{name}": value for name, value in objective.state_dict().items()}
    metadata = {"config": json.dumps(dataclasses.asdict(config)), "objective": json.dumps(spec)}
    write_weights(path, state, {"format": FORMAT, **metadata})


def is_predictor(path: str | Path) -> bool:
    """Whether a file is one that `save_predictor` wrote, by what its metadata says."""
    path = Path(path)
    return path.is_file() and is_safetensors(path) and read_metadata(path).get("format") == FORMAT


def load_predictor(path: str | Path) -> TextPredictor:
    """Reads what `save_predictor` wrote: on the CPU, evaluating, channels-last.

    Raises:
        InputError: the file is missing, damaged, of another form, or its tensors do not fit its sizes; or its
            objective is of a package that is not installed.
    """
    weights, metadata = read_weights(path)
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path} holds {quote(metadata.get('format', 'unnamed weights'))}, expected {FORMAT!r}"
        )
    config = configs.check(CLIPConfig, sizes_in(metadata, "config", path), f"sizes in {path}")
    spec, ids = sizes_in(metadata, "objective", path), weights.get(_IDS)
    # A file may name what is declared, not any module that would then be imported.
    if (
        not isinstance(spec, dict)
        or spec.get("name") not in plugins.found(OBJECTIVES)
        or not predicts_text(spec)
    ):
        raise InputError(
            f"{path} was pretrained with an objective that no installed package declares: {quote(spec)}; "
            "install the one that it comes from"
        )
    if ids is None or ids.ndim != 1 or ids.dtype != torch.int64 or not bool((ids.diff() > 0).all()):
        raise InputError(f"{path} has no list of token ids, {_IDS}; it is damaged: copy it again")
    make = _maker(spec, ids)
    require_sizes(make, config, weights, path)
    model = make(config)
    load_exactly(model, weights, path)
    return model.eval().to(memory_format=torch.channels_last)


def _maker(spec: Mapping[str, Any], ids: Tensor) -> Callable[[CLIPConfig], TextPredictor]:
    def make(config: CLIPConfig) -> TextPredictor:
        visual = make_vision_tower(config)
        return TextPredictor(config, build_text_objective(dict(spec), config, visual, ids), visual)

    return make
