"""Options shared by all jobs that use a detector, and loading of that detector."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from clip_base.evaluation.prompts import DEFAULT_TEMPLATES
from clip_base.jobs.compute import ComputeOptions
from clip_base.jobs.config import REQUIRED, Plugin, option, plugin, runtime_only
from clip_base.jobs.run import describe, files_of
from clip_base.runtime.errors import InputError, note
from clip_base.weights.load import find, weight_files
from regionclip.checkpoints.load import load_detector
from regionclip.inference.predictor import Predictor
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig
from regionclip.models.region_heads import RegionHeadOptions
from regionclip.models.student import StudentConfig
from regionclip.proposals.base import GROUP as PROPOSERS
from regionclip.proposals.base import build_proposer
from regionclip.structures.transforms import ResizeConfig

VOCABULARY_HELP = 'names to detect: "cat, dog", a file with one per line, coco, coco65, lvis'


@dataclass(kw_only=True)
class DetectorFile:
    """Which file holds the detector."""

    weights: str = option(REQUIRED, "a detector (ours or RegionCLIP's), or a CLIP (then give a proposer)")
    text_weights: str = option(
        "",
        "CLIP whose text tower embeds names, for RegionCLIP's detectors, which have none",
        renamed_from="text",
    )


@dataclass(kw_only=True)
class DetectorSource(RegionHeadOptions, DetectorFile):
    """Which detector, and how it embeds the names that it looks for."""

    detector: DetectorConfig = option(
        DetectorConfig(), "scores and suppression, for a CLIP or with use_checkpoint_config=false"
    )
    use_checkpoint_config: bool = option(
        True,
        "use the settings stored with a trained detector instead of `resize` and `detector`",
        renamed_from="own_settings",
    )
    templates: list[str] = option(list(DEFAULT_TEMPLATES), "prompts, averaged; {} is the name")
    embeddings: str = option(
        "", "file of the names' embeddings, such as RegionCLIP's .pth; empty: names are embedded"
    )
    resize: ResizeConfig = option(
        ResizeConfig(), "size of the images, for a CLIP or with use_checkpoint_config=false"
    )

    student: StudentConfig = option(StudentConfig(), "frozen CLIP whose probabilities are combined")

    def inputs(self) -> dict[str, Path | str]:
        """Returns the files and folders that decide the result besides the options."""
        return {
            **weight_files(self, "weights", "text_weights"),
            **files_of(self, "embeddings"),
            **self.student_file(),
        }

    def student_file(self) -> dict[str, Path | str]:
        """Returns the frozen CLIP's file by its option, or nothing."""
        return {"student.weights": find(self.student.file)} if self.student.file else {}

    def load(self) -> Detector:
        """Returns the detector, without a vocabulary.

        Raises:
            InputError: a file is missing, damaged or does not fit.
        """
        detector = load_detector(
            self.weights,
            self.detector,
            self.resize,
            self.use_checkpoint_config,
            self.text_weights,
            self.region_head,
            self.student,
        )
        self._note_unused(detector)
        return detector

    def _note_unused(self, detector: Detector) -> None:
        """Says which of the given settings a trained detector replaces by its own."""
        if not self.use_checkpoint_config:
            return
        unused = []
        for group, given, held in (
            ("resize", self.resize, detector.resize),
            ("detector", self.detector, detector.config),
        ):
            default = type(given)()
            for name in (field.name for field in fields(given)):
                value, own = getattr(given, name), getattr(held, name)
                if value != getattr(default, name) and value != own:
                    unused.append(f"{group}.{name}={value} ({own} there)")
        if unused:
            note(
                f"not used, since {self.weights} holds settings of its own: {', '.join(unused)}; "
                "use_checkpoint_config=false takes detector and resize from here"
            )


@dataclass(kw_only=True)
class DetectorOptions(DetectorSource, ComputeOptions):
    """Which detector, where its regions come from, and how it computes."""

    proposer: Plugin = plugin(PROPOSERS, "none", "proposer of regions; none: the detector's own network")
    compile: bool = option(
        False,
        "compile a ResNet's trunk with torch.compile: pays off for many images of one size, such as videos",
        runtime_only=True,
    )

    def inputs(self) -> dict[str, Path | str]:
        """See `DetectorSource`; and the proposer's files."""
        return super().inputs() | files_of(self, "proposer")

    def identity(self) -> dict[str, Any]:
        """Returns the options that decide the result, as plain values."""
        free = runtime_only(type(self))
        return {key: value for key, value in describe(self).items() if key not in free}

    def predictor(self, proposes: bool = True, multi_label: bool = False) -> Predictor:
        """Loads the detector and its proposer; it looks for nothing yet.

        Args:
            proposes: whether there must be a way to proposals.
            multi_label: see `Predictor`.

        Raises:
            InputError: a file is missing, damaged or does not fit, or a CLIP was given no proposer.
        """
        device = self.pick_device()
        detector = self.load().to(device)
        named = self.proposer["name"] != "none"
        if proposes and not named and detector.network is None:
            raise InputError(
                f"{self.weights} is a CLIP without a proposal network; give, for example, proposer.name=grid"
            )
        proposer = build_proposer(self.proposer, device) if named else None
        if self.compile:
            detector.compile_trunks()
        return Predictor(detector, proposer, self.precision, self.templates, multi_label)
