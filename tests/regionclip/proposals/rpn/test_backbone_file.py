"""The file that a ResNet-50 backbone starts from says how its weights want to be used."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import resnet50

from clip_base.jobs.config import resolve
from clip_base.runtime.errors import InputError, InputNote
from clip_base.weights.native import write_weights
from clip_base.weights.unpickle import read_arrays
from regionclip.proposals.rpn.config import ProposalNetworkConfig
from regionclip.proposals.rpn.detectron2_names import from_detectron2, to_detectron2
from regionclip.proposals.rpn.network import ProposalNetwork
from regionclip.proposals.rpn.proposer import build_network, save_network
from regionclip.training.train_rpn import TrainRPNConfig

State = dict[str, Tensor]
C4 = {"backbone": "resnet50", "design": "c4", "strides": [16], "channels": 0, "anchor_sizes": [32.0, 64.0]}
MSRA, TORCHVISION = (True, "caffe"), (False, "clip")


@pytest.fixture(scope="module")
def trained() -> State:
    """torchvision's names, with statistics of batches and gains as training leaves them."""
    torch.manual_seed(0)
    state = resnet50(weights=None).state_dict()
    for key, value in state.items():
        if key.endswith(("running_mean", "running_var")) or (key.endswith(".weight") and value.ndim == 1):
            value.uniform_(0.5, 1.5)
    return {key: value for key, value in state.items() if not key.startswith(("layer4.", "fc."))}


@pytest.fixture(scope="module")
def msra(trained: State) -> State:
    """The same without statistics, which MSRA's weights have folded into gains and biases."""
    return {key: value for key, value in trained.items() if "running" not in key and "tracked" not in key}


def caffe2_names(state: State) -> dict[str, Any]:
    def name(key: str) -> str:
        key = re.sub(r"^layer(\d)\.(\d+)", lambda found: f"res{int(found[1]) + 1}_{found[2]}", key)
        key = key.replace(".downsample.0.weight", "_branch1_w").replace(".downsample.1.", "_branch1_bn_")
        key = re.sub(r"\.conv(\d)\.weight", lambda found: f"_branch2{'abc'[int(found[1]) - 1]}_w", key)
        key = re.sub(r"\.bn(\d)\.", lambda found: f"_branch2{'abc'[int(found[1]) - 1]}_bn_", key)
        key = key.replace("bn1.", "res_conv1_bn_").replace("conv1.weight", "conv1_w")
        return key.replace("_bn_weight", "_bn_s").replace("_bn_bias", "_bn_b")

    return {name(key): value.numpy() for key, value in state.items()}


def detectron2_names(state: State) -> State:
    def name(key: str) -> str:
        key = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", key)
        key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        key = re.sub(r"bn(\d)", r"conv\1.norm", key)
        return f"stem.{key}" if key.startswith("conv1") else key

    return {name(key): value for key, value in state.items()}


def built(path: Path, small: Callable[..., ProposalNetworkConfig]) -> ProposalNetwork:
    return build_network(small(**C4, backbone_weights=str(path)))


def layout(network: ProposalNetwork) -> tuple[bool, str]:
    return network.config.stride_in_1x1, network.config.pixels


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_torchvisions_weights_want_normalized_pixels(
    tmp_path: Path, trained: State, small: Callable[..., ProposalNetworkConfig], suffix: str
) -> None:
    file = tmp_path / f"resnet50.{suffix}"
    if suffix == "pth":
        torch.save({**trained, "fc.weight": torch.zeros(2, 2)}, file)
    else:
        write_weights(file, trained, {})
    network = built(file, small)
    assert layout(network) == TORCHVISION
    assert network.trunk.layer2[0].conv2.stride == (2, 2)
    torch.testing.assert_close(network.trunk.layer3[1].bn2.running_var, trained["layer3.1.bn2.running_var"])


def test_msras_weights_want_strides_in_1x1_and_caffes_pixels(
    tmp_path: Path, msra: State, small: Callable[..., ProposalNetworkConfig]
) -> None:
    arrays = caffe2_names(msra)
    arrays |= {"fc1000_w": arrays["conv1_w"][:2], "conv1_b": arrays["res_conv1_bn_b"]}
    file = tmp_path / "R-50.pkl"
    file.write_bytes(pickle.dumps(arrays, protocol=2))
    network = built(file, small)
    assert layout(network) == MSRA
    assert network.trunk.layer2[0].conv1.stride == (2, 2)
    assert network.trunk.layer2[0].conv2.stride == (1, 1)
    for name in ("conv1.weight", "bn1.bias", "layer1.0.downsample.1.weight", "layer3.5.conv3.weight"):
        torch.testing.assert_close(network.trunk.state_dict()[name], msra[name])
    assert not network.trunk.bn1.running_mean.any()


@pytest.mark.parametrize(("kind", "expected"), [("msra", MSRA), ("trained", TORCHVISION)])
def test_detectron2s_names_are_told_apart_by_the_batch_norms(
    tmp_path: Path,
    small: Callable[..., ProposalNetworkConfig],
    request: pytest.FixtureRequest,
    kind: str,
    expected: tuple[bool, str],
) -> None:
    state = request.getfixturevalue(kind)
    torch.save({"model": detectron2_names(state)}, tmp_path / "backbone.pth")
    network = built(tmp_path / "backbone.pth", small)
    assert layout(network) == expected
    torch.testing.assert_close(network.trunk.layer2[1].bn3.weight, state["layer2.1.bn3.weight"])


def test_a_network_to_go_on_from_says_how_its_backbone_is_used(
    tmp_path: Path, small: Callable[..., ProposalNetworkConfig]
) -> None:
    sizes = ProposalNetworkConfig(
        backbone="resnet50",
        design="c4",
        strides=[16],
        anchor_sizes=[32.0, 64.0, 128.0, 256.0, 512.0],
        stride_in_1x1=True,
        pixels="caffe",
    )
    network = ProposalNetwork(sizes)
    save_network(network, tmp_path / "rpn.safetensors")
    torch.save({"model": to_detectron2(network)}, tmp_path / "rpn.pth")
    for name in ("rpn.safetensors", "rpn.pth"):
        begun = built(tmp_path / name, small)
        assert layout(begun) == MSRA
        torch.testing.assert_close(begun.trunk.conv1.weight, network.trunk.conv1.weight)


def test_what_a_file_does_not_say_is_refused(
    tmp_path: Path, msra: State, small: Callable[..., ProposalNetworkConfig]
) -> None:
    torch.save(msra, tmp_path / "msra.pth")
    with pytest.raises(InputError, match=r"msra\.pth has torchvision's names, but .* cannot be told"):
        built(tmp_path / "msra.pth", small)
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth holds no ResNet-50 .*first: conv\.weight"):
        built(tmp_path / "other.pth", small)
    arrays = caffe2_names(msra) | {"res2_9_gate": caffe2_names(msra)["conv1_w"]}
    (tmp_path / "odd.pkl").write_bytes(pickle.dumps(arrays))
    with pytest.raises(InputError, match=r"odd\.pkl holds 1 tensors .*res2_9_gate"):
        built(tmp_path / "odd.pkl", small)


def test_a_pickle_of_arrays_runs_nothing(tmp_path: Path) -> None:
    class Program:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"conv1_w": Program()}))
    with pytest.raises(InputError, match=r"bad\.pkl is refused: its pickle holds \w+\.mkdir"):
        read_arrays(tmp_path / "bad.pkl")
    assert not (tmp_path / "made").exists()
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps({"a": torch.ones(9).numpy()})[:-20])
    with pytest.raises(InputError, match=r"cut\.pkl cannot be read"):
        read_arrays(tmp_path / "cut.pkl")


def test_a_foreign_network_on_other_weights_than_msras_is_noted() -> None:
    sizes = ProposalNetworkConfig(
        backbone="resnet50", design="c4", strides=[16], anchor_sizes=[32.0, 64.0, 128.0, 256.0, 512.0]
    )
    state = to_detectron2(ProposalNetwork(sizes))
    state["backbone.res3.0.conv1.norm.running_mean"] += 0.5
    with pytest.warns(InputNote, match="may stand on another"):
        from_detectron2(state)


def test_nobody_is_asked_what_the_file_says() -> None:
    for asked in ("network.stride_in_1x1=true", "network.pixels=caffe"):
        with pytest.raises(InputError, match="there is no option 'network"):
            resolve(TrainRPNConfig, None, ["annotations=a", "images=i", "out=o", asked])
