"""Our detector as components of detectron2; importing this package registers them.

Backbone `ClipBackbone`, proposal generator `RegionProposals`, RoI heads `OpenVocabularyROIHeads` and
meta-architecture `OpenVocabularyRCNN` hold the modules of `clip_base` and `regionclip` and hand detectron2's
structures over to them: nothing is implemented twice. Nothing outside imports this package at its top.
"""

# What follows the check needs detectron2.
# ruff: noqa: E402
from __future__ import annotations

import importlib.util
import warnings

from clip_base.runtime.errors import InputError

INSTALL = (
    "detectron2 is not installed; install it from its repository with `pip install --no-build-isolation "
    "'git+https://github.com/facebookresearch/detectron2.git'`, or where a compiler or the repository is out "
    "of reach with `make detectron2` (tools/install_detectron2.sh VENV), which brings its Python code"
)

if importlib.util.find_spec("detectron2") is None:
    raise InputError(INSTALL)
with warnings.catch_warnings():
    # torch.jit.script and pkg_resources, which detectron2 uses, announce their end at every import.
    warnings.simplefilter("ignore")
    import detectron2.engine
    import detectron2.model_zoo
    import detectron2.modeling  # noqa: F401

from regionclip.detectron2.backbone import ClipBackbone
from regionclip.detectron2.catalog import class_names, register_dataset, register_published
from regionclip.detectron2.config import add_regionclip_config
from regionclip.detectron2.mapper import RegionMapper
from regionclip.detectron2.modeling import OpenVocabularyRCNN, OpenVocabularyROIHeads
from regionclip.detectron2.proposals import RegionProposals
from regionclip.detectron2.structures import from_instances, to_instances
from regionclip.detectron2.training import OpenVocabularyEvaluator

__all__ = [
    "ClipBackbone",
    "OpenVocabularyEvaluator",
    "OpenVocabularyRCNN",
    "OpenVocabularyROIHeads",
    "RegionMapper",
    "RegionProposals",
    "add_regionclip_config",
    "class_names",
    "from_instances",
    "register_dataset",
    "register_published",
    "to_instances",
]

register_published()
