"""Both region heads give what their plain rendering gives: RoIAlign, layer4 and attention pool in turn."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from clip_base.data.batch import ImageBatch
from clip_base.models.clip import CLIP
from clip_base.models.configs import VisionConfig
from clip_base.models.resnet import ModifiedResNet
from clip_base.runtime.errors import InputError
from regionclip.models.box_head import BoxHeadConfig, MapBoxes
from regionclip.models.detector import Detector
from regionclip.models.postprocess import DetectorConfig
from regionclip.models.region_encoder import RegionEncoder
from regionclip.structures.regions import FeatureMaps, Regions, whole_images
from regionclip.structures.transforms import ResizeConfig

MakeClip = Callable[..., CLIP]
INSIDE = ((20, 30, 90, 70), (33, 21, 60, 100), (40, 40, 44, 47))
BORDER = ((0, 0, 128, 96), (-30, -40, 50, 60), (100, 60, 190, 150), (0, 0, 9, 9), (120, 90, 128, 96))

HEADS = ("per_region", "shared", "dense")
MANY = (*INSIDE, *BORDER) * 3  # so many that the shared head projects the map's cells instead of the regions'


@pytest.fixture(scope="module")
def tower(make_clip: MakeClip) -> ModifiedResNet:
    """A ResNet whose batch norms move and scale, so that biases count."""
    visual = make_clip().visual
    assert isinstance(visual, ModifiedResNet)
    generator = torch.Generator().manual_seed(3)
    for norm in visual.layer4.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.bias.data.normal_(0.5, 0.5, generator=generator)
            norm.weight.data.uniform_(0.5, 1.5, generator=generator)
    return visual


@pytest.fixture(scope="module")
def feature_map(tower: ModifiedResNet) -> Tensor:
    """The trunk's map of two images of 96 x 128 pixels."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return tower.trunk(F.interpolate(torch.randn(2, 3, 12, 16, generator=generator), scale_factor=8))


def some_regions(boxes: tuple[tuple[int, ...], ...]) -> Regions:
    """Returns regions that jump between two images."""
    return Regions(torch.tensor(boxes).float(), torch.arange(len(boxes)) % 2)


def plain(visual: ModifiedResNet, feature_map: Tensor, regions: Regions, head: str) -> Tensor:
    """Returns layer4's maps of regions, by torchvision's RoIAlign."""
    side, rois = visual.region_size, regions.rois()
    if head == "per_region":
        return visual.layer4_map(roi_align(feature_map, rois, side, 1 / 16, 0, aligned=True))
    if head == "dense":
        rois = rois - torch.tensor([0.0, 8, 8, 8, 8])
        return roi_align(dense(visual, feature_map), rois, side // 2, 1 / 16, 0, aligned=True)
    return roi_align(visual.layer4_map(feature_map), rois, side // 2, 1 / 32, 0, aligned=True)


def dense(visual: ModifiedResNet, feature_map: Tensor) -> Tensor:
    """Returns layer4's map at every cell of the trunk's, by its modules with other strides and dilations."""
    layer4 = copy.deepcopy(visual.layer4)
    for place, block in enumerate(layer4):
        block.conv1.register_forward_hook(lambda *_: None)  # makes the block call its modules
        if place:
            block.conv2.dilation = block.conv2.padding = (2, 2)
        else:
            block.avgpool = nn.Sequential(nn.ReplicationPad2d((0, 1, 0, 1)), nn.AvgPool2d(2, 1))
            block.stride, block.downsample[0] = 1, block.avgpool
    weights = {**dict(visual.layer4.named_parameters()), **dict(visual.layer4.named_buffers())}
    out: Tensor = torch.func.functional_call(layer4, weights, feature_map)
    return out


@torch.no_grad()
def test_every_second_cell_of_the_dense_map_is_layer4s() -> None:
    torch.manual_seed(0)
    visual = ModifiedResNet(
        VisionConfig(layers=[1, 1, 1, 3], width=8, head_width=32, resolution=64), 32
    ).eval()
    for norm in visual.layer4.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
    maps = torch.randn(2, visual.trunk_channels, 10, 12)
    found = visual.layer4_dense(maps)
    assert found.shape == (2, 2 * visual.trunk_channels, 10, 12)
    torch.testing.assert_close(found[:, :, ::2, ::2], visual.layer4_map(maps), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, dense(visual, maps), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("boxes", [INSIDE, BORDER, MANY], ids=["inside", "border", "many"])
def test_a_head_is_its_plain_rendering(
    tower: ModifiedResNet, feature_map: Tensor, boxes: tuple[tuple[int, ...], ...], head: str
) -> None:
    regions = some_regions(boxes)
    wanted = tower.attnpool(plain(tower, feature_map, regions, head))
    for chunk in (256, 2):
        found = RegionEncoder(tower, chunk=chunk, region_head=head).encode_rois(feature_map, regions)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_heads_are_three(tower: ModifiedResNet, feature_map: Tensor) -> None:
    found = [
        RegionEncoder(tower, region_head=head).encode_rois(feature_map, some_regions(INSIDE))
        for head in HEADS
    ]
    for one, other in itertools.combinations(found, 2):
        assert not torch.allclose(one, other, atol=1e-2)


@pytest.mark.parametrize("boxes", [BORDER, MANY], ids=["border", "many"])
@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_those_of_the_plain_rendering(
    tower: ModifiedResNet, feature_map: Tensor, head: str, boxes: tuple[tuple[int, ...], ...]
) -> None:
    regions = some_regions(boxes)
    weights = [tower.layer4[0].conv1.weight, *tower.attnpool.parameters()]
    kinds = (
        lambda maps: RegionEncoder(tower, region_head=head).encode_rois(maps, regions),
        lambda maps: tower.attnpool(plain(tower, maps, regions, head)),
    )
    found = []
    for kind in kinds:
        maps = feature_map.clone().requires_grad_()
        found.append(torch.autograd.grad(kind(maps).square().sum(), [maps, *weights]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=5e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_a_box_head_reads_layer4s_map_of_each_region(
    tower: ModifiedResNet, feature_map: Tensor, head: str
) -> None:
    regions, side = some_regions(BORDER), tower.region_size // 2
    torch.manual_seed(0)
    boxes = MapBoxes(BoxHeadConfig(tower.embed_dim, 2 * tower.trunk_channels, side))
    maps = FeatureMaps(ImageBatch.whole(torch.zeros(2, 3, 96, 128)), (feature_map,))
    encoder = RegionEncoder(tower, region_head=head)
    _, deltas = encoder.roi_heads(maps, regions, boxes.deltas)
    layer4 = plain(tower, feature_map, regions, head)
    wanted = boxes.moves(boxes.hidden(boxes.reduce(layer4).relu().flatten(1)).relu())
    assert deltas is not None
    torch.testing.assert_close(deltas, wanted, atol=1e-5, rtol=1e-4)
    _, whole = encoder.roi_heads(maps, regions, lambda _, maps: maps.whole()[:, :4, 0, 0])
    torch.testing.assert_close(whole, layer4[:, :4, 0, 0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_whole_image_is_a_region_of_the_shared_head(make_clip: MakeClip) -> None:
    visual = make_clip().visual
    images = ImageBatch.whole(torch.randn(2, 3, visual.resolution, visual.resolution))
    found = RegionEncoder(visual, region_head="shared")(images, whole_images(images))
    torch.testing.assert_close(found, F.normalize(visual(images.pixels), dim=-1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("height", [95, 96, 80])
def test_the_shared_head_sees_the_last_row_of_any_image(make_clip: MakeClip, height: int) -> None:
    encoder = RegionEncoder(make_clip().visual, region_head="shared")
    images = torch.randn(2, 3, height, 96)
    images[1, :, : height - 8] = images[0, :, : height - 8]
    last = Regions(torch.tensor([[0.0, height - 8, 96, height]] * 2), torch.tensor([0, 1]))
    found = encoder(ImageBatch.whole(images), last)
    assert float(found[0] @ found[1]) < 0.9999


@torch.no_grad()
def test_half_precision_leaves_shared_regions_what_they_are(make_clip: MakeClip) -> None:
    encoder = RegionEncoder(make_clip().visual, region_head="shared")
    images = ImageBatch.whole(F.interpolate(torch.randn(1, 3, 12, 12), scale_factor=8))
    some = Regions(torch.tensor([[0.0, 0, 30, 30], [10, 5, 60, 40]]), torch.tensor([0, 0]))
    exact = encoder(images, some)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(images, some)
    assert float((exact * rounded).sum(1).min()) > 0.999


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_hooks_on_layer4_and_the_pool_are_called(make_clip: MakeClip, feature_map: Tensor, head: str) -> None:
    visual = make_clip().visual
    encoder, regions = RegionEncoder(visual, region_head=head), some_regions(INSIDE)
    wanted = encoder.encode_rois(feature_map, regions)
    called = []
    for module in (visual.attnpool, visual.layer4[0].conv1):
        module.register_forward_hook(lambda module, *_: called.append(type(module).__name__))
    torch.testing.assert_close(encoder.encode_rois(feature_map, regions), wanted, atol=1e-5, rtol=1e-4)
    assert set(called) == {"AttentionPool", "Conv2d"}


@torch.no_grad()
def test_batch_norms_that_take_statistics_take_those_of_the_regions(make_clip: MakeClip) -> None:
    visual = make_clip().visual
    feature_map, regions = torch.randn(2, visual.trunk_channels, 6, 8), some_regions(INSIDE)
    counter = visual.layer4[0].bn1.num_batches_tracked
    before = int(counter)
    visual.train()
    wanted = visual.attnpool(plain(visual, feature_map, regions, "per_region"))
    found = RegionEncoder(visual).encode_rois(feature_map, regions)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert int(counter) == before + 2


def test_a_shared_head_that_would_lose_cells_is_refused(make_clip: MakeClip) -> None:
    clip = make_clip()
    with pytest.raises(InputError, match=r"region_head=shared .* set resize.multiple=32, found 16"):
        Detector(clip, DetectorConfig(), resize=ResizeConfig(multiple=16), region_head="shared")
    encoder = RegionEncoder(clip.visual, region_head="shared")
    with pytest.raises(ValueError, match="multiples of 32 pixels"):
        encoder.encode_rois(torch.zeros(1, clip.visual.trunk_channels, 5, 6), some_regions(INSIDE)[:1])


def test_region_heads_that_do_not_fit_are_refused(make_clip: MakeClip) -> None:
    with pytest.raises(InputError, match="region_head=both is not one of per_region, shared, dense"):
        RegionEncoder(make_clip().visual, region_head="both")
    with pytest.raises(InputError, match="region_head=shared is for regions of a ResNet's map"):
        RegionEncoder(make_clip("vit").visual, "dense", region_head="shared")
