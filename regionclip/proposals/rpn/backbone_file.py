"""Initial weights of a ResNet-50 backbone, and the conventions of their file.

MSRA's ResNets, which detectron2 starts from, halve maps in their 1x1 convolutions and are shown Caffe's
pixels; torchvision's halve them in the 3x3 ones and are shown normalized pixels. A network that uses weights
the other way trains without complaint and worse. So the file itself says which it is: by the names of its
tensors, and by its batch norms. MSRA's are folded into a gain and a bias, with means of 0 and variances of 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clip_base.runtime.errors import InputError
from clip_base.storage.files import existing
from clip_base.weights.key_names import unwrap
from clip_base.weights.native import read_weights, sizes_in
from clip_base.weights.unpickle import read_arrays, read_pickle
from regionclip.proposals.rpn.config import FORMAT
from regionclip.proposals.rpn.detectron2_names import COUNTER, HEAD, folded, from_detectron2

MSRA = {"stride_in_1x1": True, "pixels": "caffe"}
TORCHVISION = {"stride_in_1x1": False, "pixels": "clip"}
# The names in detectron2's R-50.pkl, which are Caffe2's, and detectron2's own, each with torchvision's.
_CAFFE2 = (
    (r"conv1_w", r"conv1.weight"),
    (r"res_conv1_bn_(s|b)", r"bn1.\1"),
    (r"res(\d)_(\d+)_branch1_w", r"layer\1.\2.downsample.0.weight"),
    (r"res(\d)_(\d+)_branch1_bn_(s|b)", r"layer\1.\2.downsample.1.\3"),
    (r"res(\d)_(\d+)_branch2([abc])_w", r"layer\1.\2.conv\3.weight"),
    (r"res(\d)_(\d+)_branch2([abc])_bn_(s|b)", r"layer\1.\2.bn\3.\4"),
)
_DETECTRON2 = (
    (r"stem\.conv1\.weight", r"conv1.weight"),
    (r"stem\.conv1\.norm\.(\w+)", r"bn1.\1"),
    (r"res(\d)\.(\d+)\.shortcut\.weight", r"layer\1.\2.downsample.0.weight"),
    (r"res(\d)\.(\d+)\.shortcut\.norm\.(\w+)", r"layer\1.\2.downsample.1.\3"),
    (r"res(\d)\.(\d+)\.conv(\d)\.weight", r"layer\1.\2.conv\3.weight"),
    (r"res(\d)\.(\d+)\.conv(\d)\.norm\.(\w+)", r"layer\1.\2.bn\3.\4"),
)
_ABOVE = ("fc1000_", "pred_", "conv1_b", "stem.fc.", "linear.", "fc.")  # the classifier; MSRA's idle bias


def read_resnet50(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns ResNet-50 weights in torchvision's names, and how they want to be used.

    Args:
        path: torchvision's file, or safetensors with its names; detectron2's R-50.pkl; a proposal network on
            a ResNet-50, ours or detectron2's.

    Returns:
        The weights, and `MSRA` or `TORCHVISION`.

    Raises:
        InputError: the file is missing, damaged or none of these, or it does not say how it is to be used.
    """
    file = existing(path, "weights file")
    if path.endswith(".safetensors"):
        state, metadata = read_weights(file)
        if metadata.get("format") == FORMAT:
            return _of_our_network(state, sizes_in(metadata, "config", path), path)
    elif path.endswith(".pkl"):
        held = read_arrays(file)
        state = {key: value for key, value in held.get("model", held).items() if isinstance(value, Tensor)}
    else:
        content = read_pickle(file)
        if isinstance(content, Tensor):
            raise InputError(f"weights file {path} holds one tensor; give a ResNet-50")
        state = unwrap(content, file)[0]
    if any(HEAD in key for key in state):
        config, weights = from_detectron2(state)
        facts = {name: getattr(config, name) for name in MSRA}
        return _below(weights, "backbone."), facts
    if "conv1_w" in state:
        return _translated(state, _CAFFE2, path), dict(MSRA)
    if "stem.conv1.weight" in state:
        weights = _translated(state, _DETECTRON2, path)
        return weights, dict(MSRA if folded(weights) else TORCHVISION)
    if "layer1.0.conv1.weight" not in state:
        raise InputError(
            f"weights file {path} holds no ResNet-50 by the names of torchvision, detectron2 or Caffe2 "
            f"(first: {', '.join(list(state)[:3])}); give torchvision's file, or detectron2's R-50.pkl"
        )
    if folded(state):
        raise InputError(
            f"weights file {path} has torchvision's names, but batch norms without statistics as MSRA's "
            "ResNet-50 has: which strides and pixels they want cannot be told; give detectron2's R-50.pkl"
        )
    return _with_statistics(state), dict(TORCHVISION)


def _of_our_network(
    state: dict[str, Tensor], config: dict[str, Any], path: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if config["backbone"] != "resnet50":
        raise InputError(f"{path} is a proposal network on backbone={config['backbone']}, not on resnet50")
    facts = {name: config.get(name, value) for name, value in TORCHVISION.items()}
    return _below(state, "backbone."), facts


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _translated(
    state: Mapping[str, Tensor], names: tuple[tuple[str, str], ...], path: str
) -> dict[str, Tensor]:
    """Returns the weights in torchvision's names; InputError for tensors without a known use."""
    found, unknown = {}, []
    for key, value in state.items():
        for pattern, ours in names:
            match = re.fullmatch(pattern, key)
            if match:
                found[_torchvision(match.expand(ours))] = value
                break
        else:
            if not key.startswith(_ABOVE) and not key.endswith("_momentum"):
                unknown.append(key)
    if unknown:
        raise InputError(
            f"weights file {path} holds {len(unknown)} tensors that are no part of a ResNet-50 "
            f"({', '.join(unknown[:3])})"
        )
    return _with_statistics(found)


def _torchvision(name: str) -> str:
    """Counts layers from 1 and convolutions by number, and spells out s and b."""
    name = re.sub(r"^layer(\d)", lambda match: f"layer{int(match[1]) - 1}", name)
    name = re.sub(r"(conv|bn)([abc])\b", lambda match: f"{match[1]}{'abc'.index(match[2]) + 1}", name)
    return re.sub(r"\.s$", ".weight", re.sub(r"\.b$", ".bias", name))


def _with_statistics(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adds what old files leave out: folded batch norms' statistics, and counters, which nothing looks at."""
    whole = dict(state)
    for key, value in state.items():
        norm, _, leaf = key.rpartition(".")
        if leaf == "bias" and re.search(r"(bn\d|downsample\.1)$", norm):
            whole.setdefault(f"{norm}.running_mean", torch.zeros_like(value))
            whole.setdefault(f"{norm}.running_var", torch.ones_like(value))
            whole.setdefault(f"{norm}.{COUNTER}", torch.tensor(0))
    return whole
