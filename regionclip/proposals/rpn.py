"""Proposals of a trained network, and the file that holds one."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clip_base import config as configs
from clip_base.batch import ImageBatch
from clip_base.checkpoint import load_exactly, read_weights, write_weights
from clip_base.config import REQUIRED, option
from clip_base.errors import InputError
from clip_base.files import existing
from clip_base.models.resnet import ModifiedResNet
from clip_base.weights import load_clip
from regionclip.proposals.base import ImageKey
from regionclip.proposals.network import ProposalNetwork, ProposalNetworkConfig
from regionclip.structures import Regions

FORMAT = "regionclip.proposals/1"


@dataclass
class RPNConfig:
    """Options of the proposer `rpn`."""

    weights: str = option(REQUIRED, "proposal network that `regionclip train-rpn` wrote")
    limit: int = option(300, "most boxes an image, the best scored ones")
    nms: float = option(0.7, "IoU above which the lower scored of two boxes is dropped")
    min_score: float = option(0.0, "boxes with less objectness are left out, 0…1")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.limit < 1:
            raise InputError(f"limit must be at least 1 box an image, got {self.limit}")
        if not 0 < self.nms <= 1:
            raise InputError(f"nms must be above 0 and at most 1, got {self.nms}")
        if not 0 <= self.min_score <= 1:
            raise InputError(f"min_score must lie in 0…1, got {self.min_score}")


class RPNProposer:
    """Proposes what a trained region proposal network takes for objects.

    Args:
        config: the network's file and what to keep of its proposals.
        device: where it runs; batches must be there too.
    """

    def __init__(self, config: RPNConfig, device: str | torch.device = "cpu") -> None:
        self.config = config
        self.network = load_network(config.weights).to(device)

    def __call__(self, images: ImageBatch, keys: Sequence[ImageKey]) -> Regions:
        """See `Proposer`. The network looks at pixels only; `keys` are not needed."""
        config = self.config
        return self.network.propose(images, config.limit, config.nms, config.min_score)


def save_network(network: ProposalNetwork, path: str | Path) -> None:
    """Writes a proposal network with its config as safetensors, atomically."""
    sizes = dataclasses.asdict(network.config)
    # The file holds all weights; where the first ones lay is of no use to its reader.
    sizes["backbone_weights"] = ""
    write_weights(path, network.state_dict(), {"format": FORMAT, "config": json.dumps(sizes)})


def load_network(path: str | Path) -> ProposalNetwork:
    """Reads a proposal network that `save_network` wrote, in evaluation mode.

    Raises:
        InputError: the file is missing, cut off, of another form, or its tensors do not fit its config.
    """
    weights, metadata = read_weights(path)
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path} holds {metadata.get('format', 'unnamed weights')!r}, expected {FORMAT!r}; "
            "give a file that `regionclip train-rpn` wrote"
        )
    sizes = configs.check(ProposalNetworkConfig, json.loads(metadata["config"]), f"network in {path}")
    network = ProposalNetwork(sizes)
    load_exactly(network, weights, path)
    return network.eval().to(memory_format=torch.channels_last)


def build_network(config: ProposalNetworkConfig) -> ProposalNetwork:
    """Returns a network to train: its backbone from `backbone_weights`, everything else random.

    Raises:
        InputError: the backbone's file cannot be read or does not fit.
    """
    network = ProposalNetwork(config)
    path = config.backbone_weights
    if path:
        wanted = network.backbone.state_dict()
        found = _clip_backbone(config) if config.backbone == "clip" else _resnet50_backbone(path, wanted)
        # Both files hold a whole classifier; what lies above the maps is not part of a proposal network.
        above = tuple(
            f"{name}." for name in ("layer4", "attnpool", "fc") if not hasattr(network.backbone, name)
        )
        kept = {key: value for key, value in found.items() if not key.startswith(above)}
        load_exactly(network.backbone, kept, path)
    return network.to(memory_format=torch.channels_last)


def _clip_backbone(config: ProposalNetworkConfig) -> dict[str, Tensor]:
    """Returns the vision tower's weights from a CLIP file."""
    path, model = config.backbone_weights, load_clip(config.backbone_weights)
    vision = model.config.vision
    if not isinstance(model.visual, ModifiedResNet):
        raise InputError(f"{path} holds a {vision.kind}; the proposal network needs a CLIP with a resnet")
    if (vision.width, vision.layers[:3]) != (config.vision.width, config.vision.layers[:3]):
        raise InputError(
            f"{path} has width {vision.width} and layers {vision.layers}, the network asks for "
            f"{config.vision.width} and {config.vision.layers}; set network.vision to fit"
        )
    return dict(model.visual.state_dict())


def _resnet50_backbone(path: str, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns ResNet-50 weights from torchvision's .pth file, or from safetensors with the same names."""
    if path.endswith(".safetensors"):
        return read_weights(path)[0]
    try:
        state = torch.load(existing(path, "weights file"), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"weights file {path} cannot be read ({reason}); was it cut off?") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"weights file {path} holds no state dict; give torchvision's resnet50 file")
    # Files written before torch 0.4.1 have no batch counters, and nothing here uses them.
    counters = {key: value for key, value in wanted.items() if key.endswith("num_batches_tracked")}
    return {**counters, **state}
