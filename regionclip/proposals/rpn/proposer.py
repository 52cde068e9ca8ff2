"""The proposer `rpn`: proposals of a trained network, and its file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.jobs import config as configs
from clip_base.jobs.config import REQUIRED, option
from clip_base.models.configs import VisionConfig
from clip_base.models.resnet import ModifiedResNet
from clip_base.runtime.errors import InputError, quote
from clip_base.weights.formats import Content, group_of
from clip_base.weights.load import find, load_clip, local_copy
from clip_base.weights.native import load_exactly, read_weights, sized, sizes_in, write_weights
from clip_base.weights.reading import read_foreign
from regionclip.proposals.base import SelectionConfig
from regionclip.proposals.rpn.backbone import trunk_hash
from regionclip.proposals.rpn.backbone_file import read_resnet50
from regionclip.proposals.rpn.config import FORMAT, ProposalNetworkConfig, ProposalNetworkOptions
from regionclip.proposals.rpn.detectron2_names import NETWORK, from_detectron2
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.structures.regions import ImageInfo, Regions


@dataclass
class RPNConfig(SelectionConfig):
    """Options of the proposer `rpn`."""

    weights: str = option(
        REQUIRED, "proposal network: from `regionclip train-rpn`, or RegionCLIP's or detectron2's .pth"
    )
    clip: str = option("", "the CLIP that the network was trained on, if its file has no trunk")


class RPNProposer:
    """Proposes what a trained region proposal network takes for objects.

    Args:
        config: the network's file and what to keep of its proposals.
        device: where it runs; batches must be there too.
    """

    def __init__(self, config: RPNConfig, device: str | torch.device = "cpu") -> None:
        self.config = config
        trunk = clip_tower(config.clip)[0].eval().to(device) if config.clip else None
        self.network = load_network(config.weights, trunk).to(device)
        if trunk is not None and not self.network.config.share_trunk:
            raise InputError(f"{config.weights} has its own backbone; omit clip={config.clip}")

    def __call__(self, images: ImageBatch, keys: Sequence[ImageInfo]) -> Regions:
        """See `Proposer`. The network looks at pixels only; `keys` are not needed."""
        config = self.config
        return self.network.propose(images, config.limit, config.nms, config.min_score)


def save_network(network: ProposalNetwork, path: str | Path) -> None:
    """Writes a proposal network with its config as safetensors, atomically.

    A shared trunk is not written; its hash is, so that the head is not put on another.
    """
    sizes = dataclasses.asdict(network.config)
    # The file holds all weights; where the first ones lay is of no use to its reader.
    sizes["backbone_weights"] = ""
    metadata = {"format": FORMAT, "config": json.dumps(sizes)}
    if network.shared_trunk is not None:
        metadata["trunk"] = trunk_hash(network.shared_trunk)
    write_weights(path, network.state_dict(), metadata)


def load_network(path: str | Path, trunk: ModifiedResNet | None = None) -> ProposalNetwork:
    """Reads a proposal network that `save_network` wrote, RegionCLIP's or detectron2's, in evaluation mode.

    Args:
        path: the file, or the name of a published one.
        trunk: the vision tower that a network without a trunk is put on; one that has its own leaves it
            alone.

    Raises:
        InputError: the file is missing, cut off, of another form, or its tensors do not fit its config; it
            needs a trunk and there is none, or another than the one that it was trained on.
    """
    path = local_copy(str(path))
    if not path.endswith(".safetensors"):
        return load_published_network(path)
    weights, metadata = read_weights(path)
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path} holds {quote(metadata.get('format', 'unnamed weights'))}, expected {FORMAT!r}; "
            "give a file that `regionclip train-rpn` wrote"
        )
    sizes = configs.check(ProposalNetworkConfig, sizes_in(metadata, "config", path), f"network in {path}")
    if not sizes.share_trunk:
        trunk = None
    elif trunk is None:
        raise InputError(
            f"{path} is a head for the trunk of a CLIP ResNet, without the trunk; give the CLIP that it was "
            "trained on (proposer.clip=FILE)"
        )
    elif trunk_hash(trunk) != metadata.get("trunk"):
        raise InputError(
            f"{path} was trained on the trunk of another CLIP (stem to layer3 have another hash); give that "
            "CLIP, or train a head for this one with `regionclip train-rpn network.share_trunk=true`"
        )
    network = sized(lambda one: ProposalNetwork(one, trunk), sizes, weights, path)
    load_exactly(network, weights, path)
    return network.eval().to(memory_format=torch.channels_last)


def build_network(options: ProposalNetworkOptions) -> ProposalNetwork:
    """Returns a network to train: its backbone from `backbone_weights`, everything else random.

    A CLIP's trunk has the sizes that its file has, a ResNet-50 the strides and pixels that its file asks for.
    A shared trunk is in evaluation mode and frozen.

    Raises:
        InputError: the backbone's file cannot be read or does not fit, or a trunk to share is not named.
    """
    path, facts, found = options.backbone_weights, dict[str, Any](), dict[str, Tensor]()
    if path and options.backbone == "clip":
        tower, facts["vision"] = clip_tower(path)
        if options.share_trunk:
            shared = tower.eval().requires_grad_(False)
            config = ProposalNetworkConfig.of(options, **facts)
            return ProposalNetwork(config, shared).to(memory_format=torch.channels_last)
        found = dict(tower.state_dict())
    elif path:
        found, facts = read_resnet50(path)
    elif options.share_trunk:
        raise InputError(
            "network.share_trunk=true needs network.backbone_weights=FILE: whose trunk is shared"
        )
    network = ProposalNetwork(ProposalNetworkConfig.of(options, **facts))
    if path:
        backbone = network.trunk
        # Both files hold a whole classifier; what lies above the maps is not part of a proposal network.
        above = tuple(f"{name}." for name in ("layer4", "attnpool", "fc") if not hasattr(backbone, name))
        kept = {key: value for key, value in found.items() if not key.startswith(above)}
        load_exactly(backbone, kept, path)
    return network.to(memory_format=torch.channels_last)


def clip_tower(path: str) -> tuple[ModifiedResNet, VisionConfig]:
    """Returns the vision tower of a CLIP file, and its sizes.

    Raises:
        InputError: the file cannot be read, or its tower is no ResNet.
    """
    model = load_clip(path)
    if model.map_tower is None:
        raise InputError(
            f"{path} holds a {model.config.vision.kind}; the proposal network needs a CLIP with a resnet"
        )
    return model.map_tower, model.config.vision


def content_of(path: Path) -> Content:
    """Returns what a RegionCLIP file, or a detectron2 file with a proposal network, holds.

    Raises:
        InputError: it is something else, damaged, or not whole.
    """
    content = read_foreign(path)
    if content is None:
        raise InputError(
            f"{path} is neither RegionCLIP's nor a detectron2 checkpoint with a proposal network; "
            f"`clip-base inspect {path}` shows what it is"
        )
    return content


def load_published_network(weights: str | Path) -> ProposalNetwork:
    """Returns the proposal network in a RegionCLIP or detectron2 file, in evaluation mode.

    Raises:
        InputError: the file is damaged, holds no such network, or not a whole one.
    """
    path = find(weights)
    return network_of(content_of(path), path)


def network_of(content: Content, path: Path) -> ProposalNetwork:
    """Builds the proposal network among a file's tensors, in evaluation mode."""
    state = group_of(content, NETWORK)
    if not state:
        raise InputError(
            f"{path} is {content.form} without a proposal network; give one of RegionCLIP's rpn_….pth files"
        )
    if any(".bottom_up.layer1." in name for name in state):
        raise InputError(
            f"{path} holds a pyramid on all four stages of CLIP's ResNet, which is not supported; give one "
            "of the rpn files on ResNet-50"
        )
    config, weights = from_detectron2(state)
    network = ProposalNetwork(config)
    load_exactly(network, weights, path)
    return network.eval().to(memory_format=torch.channels_last)
