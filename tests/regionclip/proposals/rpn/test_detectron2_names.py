"""Every key of detectron2's proposal networks is read or named; none is guessed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.images.decode import normalize
from clip_base.runtime.errors import InputError
from clip_base.weights.native import load_exactly
from regionclip.proposals.rpn.backbone import CAFFE_MEAN, caffe_pixels, fit_frame
from regionclip.proposals.rpn.config import ProposalNetworkConfig
from regionclip.proposals.rpn.detectron2_names import from_detectron2, to_detectron2
from regionclip.proposals.rpn.network import ProposalNetwork

Small = Callable[..., ProposalNetworkConfig]
SIZES = [32.0, 64.0, 128.0, 256.0, 512.0]
C4: dict[str, object] = {"design": "c4", "strides": [16], "channels": 0}
FPN: dict[str, object] = {"strides": [4, 8, 16, 32, 64], "channels": 0}
LSJ: dict[str, object] = {**FPN, "pyramid_norm": True, "head_convs": 2}


@pytest.fixture(scope="module")
def network(small: Small) -> Callable[[dict[str, object]], ProposalNetwork]:
    return lambda options: ProposalNetwork(small(backbone="resnet50", anchor_sizes=SIZES, **options))


Network = Callable[[dict[str, object]], ProposalNetwork]


@pytest.mark.parametrize("options", [C4, FPN, LSJ], ids=["c4", "fpn", "lsj"])
def test_a_design_is_found_from_its_keys(network: Network, options: dict[str, object]) -> None:
    theirs = to_detectron2(network(options))
    config, state = from_detectron2(theirs)
    for name, value in options.items():
        assert getattr(config, name) == value
    assert (config.stride_in_1x1, config.pixels) == (True, "caffe")
    read = ProposalNetwork(config)
    load_exactly(read, state, "detectron2")
    back = to_detectron2(read)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)


def test_keys_of_the_published_layouts_are_accounted_for(network: Network) -> None:
    theirs = to_detectron2(network(FPN))
    wanted = from_detectron2(theirs)[1]
    head = {"roi_heads.box_head.fc1.weight": torch.zeros(2, 2)}
    constants = {"pixel_mean": torch.tensor(CAFFE_MEAN).reshape(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    anchors = {
        f"proposal_generator.anchor_generator.cell_anchors.{level}": shapes
        for level, shapes in enumerate(network(FPN).anchor_shapes)
    }
    counters = {"backbone.bottom_up.stem.conv1.norm.num_batches_tracked": torch.tensor(9)}
    whole = from_detectron2({**theirs, **head, **constants, **anchors, **counters})[1]
    offline = {f"offline_{key}": value for key, value in theirs.items()}
    beside = from_detectron2({**offline, **head, "backbone.conv1.weight": torch.zeros(1)})[1]
    for found in (whole, beside):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("backbone.res4.5.conv3.norm.bias"), r"1 keys missing \(backbone\.res4\.5\.conv3"),
        (
            lambda s: s.update({"backbone.res4.6.conv1.weight": torch.zeros(1)}),
            r"1 unknown \(backbone\.res4\.6",
        ),
        (
            lambda s: s.pop("proposal_generator.rpn_head.objectness_logits.weight"),
            "have no detectron2 proposal network",
        ),
        (lambda s: s.update({"pixel_mean": torch.tensor([0.4, 0.4, 0.4])}), "pixel_mean is"),
        (
            lambda s: s.update(
                {"proposal_generator.rpn_head.objectness_logits.weight": torch.zeros(9, 1024, 1, 1)}
            ),
            "9 anchors per cell",
        ),
    ],
)
def test_what_is_missing_unknown_or_different_is_named(
    network: Network, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    state = to_detectron2(network(C4))
    change(state)
    with pytest.raises(InputError, match=message):
        from_detectron2(state)


def test_networks_that_detectron2_cannot_name_are_refused(small: Small) -> None:
    with pytest.raises(ValueError, match="backbone=clip"):
        to_detectron2(ProposalNetwork(small()))


def test_pixels_are_caffes_and_padding_stays_zero() -> None:
    red = torch.zeros(3, 5, 4, dtype=torch.uint8)
    red[0] = 255
    shown = caffe_pixels(ImageBatch.pad([normalize(red), normalize(red[:, :3])], 8))
    torch.testing.assert_close(shown[0, :, 0, 0], torch.tensor([0, 0, 255]) - torch.tensor(CAFFE_MEAN))
    assert bool(shown[0, :, :5, :4].all())
    assert not bool(shown[0, :, 5:].any() | shown[0, :, :, 4:].any() | shown[1, :, 3:].any())


def test_a_frame_is_cut_or_padded_to_the_multiple() -> None:
    images = ImageBatch.pad([torch.ones(3, 33, 20), torch.ones(3, 10, 40)], 64)
    assert fit_frame(images, 1).pixels.shape == (2, 3, 33, 40)
    assert fit_frame(images, 32).pixels.shape == (2, 3, 64, 64)
    grown = fit_frame(ImageBatch(images.pixels[..., :33, :40], images.sizes), 32)
    assert torch.equal(grown.pixels, images.pixels)
