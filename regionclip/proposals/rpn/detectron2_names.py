"""detectron2's names for the weights of a proposal network, and ours: pure functions on state dicts.

The published networks are parts of detectron2's Mask R-CNN with MSRA's ResNet-50 (strides in the 1x1
convolutions, Caffe's pixels): RegionCLIP's rpn_coco_48 is its C4 design, rpn_lvis_866 its FPN, and
rpn_lvis_866_lsj the FPN of its large-scale jitter: batch norms in the pyramid, two convolutions in the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from clip_base.runtime.errors import InputError, note
from regionclip.proposals.rpn.backbone import CAFFE_MEAN
from regionclip.proposals.rpn.config import ProposalNetworkConfig
from regionclip.proposals.rpn.network import PYRAMID_CHANNELS, ProposalNetwork, anchor_shapes

OFFLINE = "offline_"  # RegionCLIP's detectors hold the network beside their own parts, under this prefix
HEAD = "proposal_generator.rpn_head."
BLOCKS = (3, 4, 6, 3)
# Of the detector that a proposal network was trained in; it takes no part in proposing.
SECOND_STAGE = "roi_heads."
RATIOS = 3
NORM = ("weight", "bias", "running_mean", "running_var")
PLAIN = ("weight", "bias")
COUNTER = "num_batches_tracked"
NETWORK = "proposal network"


def from_detectron2(state: Mapping[str, Tensor]) -> tuple[ProposalNetworkConfig, dict[str, Tensor]]:
    """Returns the config of a network in detectron2's names and its weights in ours.

    What shapes do not tell is taken to be as in the published networks: MSRA's ResNet-50, anchors of 32 to
    512 pixels in three shapes, detectron2's selection in testing.

    Args:
        state: keys `backbone.…` and `proposal_generator.…`, or the same after `offline_`; then keys without
            that prefix are another network's and are not looked at. `roi_heads.…` is left out.

    Raises:
        InputError: keys are missing or unknown, or the network is none that we can build.
    """
    if any(key.startswith(OFFLINE) for key in state):
        state = {key.removeprefix(OFFLINE): v for key, v in state.items() if key.startswith(OFFLINE)}
    state = {key: value for key, value in state.items() if not key.startswith(SECOND_STAGE)}
    config = _config(state)
    names = dict(_names(config))
    known = _checked_constants(state, config) | {key for key in state if key.endswith(COUNTER)}
    missing = sorted(set(names.values()) - set(state))
    unknown = sorted(set(state) - set(names.values()) - known)
    if missing or unknown:
        raise InputError(
            f"these weights are not a detectron2 proposal network on a ResNet-50 ({config.design}): "
            f"{len(missing)} keys missing ({', '.join(missing[:3])}), "
            f"{len(unknown)} unknown ({', '.join(unknown[:3])})"
        )
    ours = {key: state[theirs] for key, theirs in names.items()}
    if not config.pyramid_norm and has_statistics(ours):
        note(
            "the proposal network's frozen batch norms hold statistics, MSRA's ResNet-50 has none: it may "
            "stand on another, but is used as the published networks are (strides in 1x1 convolutions, "
            "Caffe's pixels); measure its recall with `regionclip propose`"
        )
    # Only norms that train count batches there, and nothing here looks at the count.
    norms = (key.removesuffix("running_mean") for key in ours if key.endswith("running_mean"))
    return config, {**ours, **{f"{norm}{COUNTER}": torch.tensor(0) for norm in norms}}


def has_statistics(state: Mapping[str, Tensor]) -> bool:
    """Whether batch norms have seen images: means off 0 or variances off 1, up to detectron2's 1e-5."""
    means = [value for key, value in state.items() if key.endswith("running_mean")]
    variances = [value - 1 for key, value in state.items() if key.endswith("running_var")]
    return any(float(value.abs().max()) > 1e-3 for value in means + variances)


def folded(state: Mapping[str, Tensor]) -> bool:
    """Whether batch norms are nothing but gains and biases of trained weights, as in MSRA's files."""
    gains = [value for key, value in state.items() if key.endswith(".weight") and value.ndim == 1]
    return not has_statistics(state) and any(float((value - 1).abs().max()) > 1e-3 for value in gains)


def to_detectron2(network: ProposalNetwork) -> dict[str, Tensor]:
    """Returns a network's weights in detectron2's names: `backbone.…` and `proposal_generator.…`.

    Raises:
        ValueError: the network is on another backbone than ResNet-50, or its head is not detectron2's.
    """
    config = network.config
    state, names = network.state_dict(), dict(_names(config))
    counters = {key for key in state if key.endswith(COUNTER)}
    if config.backbone != "resnet50" or set(names) != set(state) - counters:
        raise ValueError(
            f"detectron2 has no names for a proposal network on backbone={config.backbone} with "
            f"design={config.design}, strides={config.strides}, channels={config.channels}"
        )
    return {theirs: state[ours] for ours, theirs in names.items()}


def _config(state: Mapping[str, Tensor]) -> ProposalNetworkConfig:
    """Finds what shapes tell: the design, its channels and how many anchors a cell has."""
    fpn = any(key.startswith("backbone.fpn_") for key in state)
    head = state.get(f"{HEAD}objectness_logits.weight")
    if head is None:
        raise InputError(
            f"there is no {HEAD}objectness_logits.weight: these weights have no detectron2 proposal network"
        )
    anchors, width = head.shape[:2]
    wanted, natural = (RATIOS, PYRAMID_CHANNELS) if fpn else (5 * RATIOS, 1024)
    if anchors != wanted:
        raise InputError(
            f"the head has {anchors} anchors per cell, those of detectron2's {'FPN' if fpn else 'C4'} have "
            f"{wanted}"
        )
    convs = sum(key.startswith(f"{HEAD}conv.") and key.endswith("weight") for key in state)
    normed = "backbone.fpn_lateral2.norm.weight" in state
    return ProposalNetworkConfig(
        backbone="resnet50",
        stride_in_1x1=True,
        pixels="caffe",
        frozen_stages=0 if normed else 2,
        frozen_batch_norm=not normed,
        design="fpn" if fpn else "c4",
        strides=[4, 8, 16, 32, 64] if fpn else [16],
        anchor_sizes=[32.0, 64.0, 128.0, 256.0, 512.0],
        ratios=[0.5, 1.0, 2.0],
        channels=0 if width == natural else width,
        pyramid_norm=normed,
        head_convs=convs,
        pre_nms=1000 if fpn else 6000,
        nms=0.7,
        merge_levels=False,
        min_size=0.0,
    )


def _checked_constants(state: Mapping[str, Tensor], config: ProposalNetworkConfig) -> set[str]:
    """Returns the keys of constants that older files list, once they say what `config` says.

    Raises:
        InputError: anchors or pixels are others.
    """
    wanted = {"pixel_mean": torch.tensor(CAFFE_MEAN), "pixel_std": torch.ones(3)}
    for level, shapes in enumerate(anchor_shapes(config)):
        wanted[f"proposal_generator.anchor_generator.cell_anchors.{level}"] = shapes
    found = {key: value for key, value in wanted.items() if key in state}
    for key, value in found.items():
        mine = state[key].float().reshape(-1)
        if mine.shape != value.reshape(-1).shape or not torch.allclose(mine, value.reshape(-1), atol=1e-2):
            raise InputError(
                f"{key} is {[round(v, 2) for v in mine.tolist()]}, the published networks have "
                f"{[round(v, 2) for v in value.reshape(-1).tolist()]}: this is not one of them"
            )
    return set(found)


def _names(config: ProposalNetworkConfig) -> Iterator[tuple[str, str]]:
    """Yields (our key, detectron2's key) of every weight; batch counters have none there."""
    fpn = config.design == "fpn"
    body = "backbone.bottom_up." if fpn else "backbone."
    yield from _convolution("backbone.conv1", "backbone.bn1", f"{body}stem.conv1")
    for layer, blocks in enumerate(BLOCKS if fpn else BLOCKS[:3]):
        for block in range(blocks):
            ours, theirs = f"backbone.layer{layer + 1}.{block}", f"{body}res{layer + 2}.{block}"
            for number in (1, 2, 3):
                yield from _convolution(
                    f"{ours}.conv{number}", f"{ours}.bn{number}", f"{theirs}.conv{number}"
                )
            if block == 0:
                yield from _convolution(f"{ours}.downsample.0", f"{ours}.downsample.1", f"{theirs}.shortcut")
    modules = {
        "rpn.head.cls_logits": f"{HEAD}objectness_logits",
        "rpn.head.bbox_pred": f"{HEAD}anchor_deltas",
    }
    for number in range(config.head_convs):
        # detectron2 numbers the convolutions of a head only when there are several.
        modules[f"rpn.head.conv.{number}.0"] = f"{HEAD}conv" + (
            f".conv{number}" if config.head_convs > 1 else ""
        )
    for level in range(4 if fpn else 0):
        for kind, name in (("inner", "fpn_lateral"), ("layer", "fpn_output")):
            neck, theirs = f"neck.{kind}_blocks.{level}", f"backbone.{name}{level + 2}"
            if config.pyramid_norm:
                yield from _convolution(f"{neck}.0", f"{neck}.1", theirs)
            else:
                modules[f"{neck}.0"] = theirs
    for ours, theirs in modules.items():
        for leaf in PLAIN:
            yield f"{ours}.{leaf}", f"{theirs}.{leaf}"


def _convolution(conv: str, norm: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield f"{conv}.weight", f"{theirs}.weight"
    for leaf in NORM:
        yield f"{norm}.{leaf}", f"{theirs}.norm.{leaf}"
