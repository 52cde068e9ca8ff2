"""A region is what the whole image is, only smaller: the encoder agrees with the towers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.images.decode import decode
from clip_base.models.clip import CLIP
from clip_base.models.configs import VisionConfig
from clip_base.models.resnet import ModifiedResNet
from clip_base.models.vit import VisionTransformer
from clip_base.runtime.errors import InputError
from regionclip.models.region_encoder import RegionEncoder, square_rois
from regionclip.structures.regions import Regions, whole_images
from regionclip.structures.transforms import resize_shortest_edge, to_batch

MakeClip = Callable[..., CLIP]


@pytest.fixture(scope="module")
def scenes(world: Path) -> ImageBatch:
    """Four scenes at the tower's resolution."""
    files = sorted((world / "images" / "train").glob("*.jpg"))[:4]
    return to_batch([resize_shortest_edge(decode(file), 64, 64)[0] for file in files])


def blotches(height: int, width: int, seed: int = 0) -> Tensor:
    """Returns [3, height, width]: cells of 8 pixels in random colors around a random mean."""
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randn(3, 1, 1, generator=generator) + torch.randn(
        3, height // 8, width // 8, generator=generator
    )
    return F.interpolate(colors[None], (height, width))[0]


def regions(*boxes: tuple[float, ...], image: int = 0) -> Regions:
    return Regions(torch.tensor(boxes).float(), torch.full((len(boxes),), image))


@torch.no_grad()
def test_full_box_is_the_image(make_clip: MakeClip, scenes: ImageBatch) -> None:
    visual = make_clip().visual
    region = RegionEncoder(visual)(scenes, whole_images(scenes))
    torch.testing.assert_close(region, F.normalize(visual(scenes.pixels), dim=-1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_encode_image_is_the_full_box(make_clip: MakeClip, scenes: ImageBatch) -> None:
    encoder = RegionEncoder(make_clip().visual)
    torch.testing.assert_close(encoder.encode_image(scenes), encoder(scenes, whole_images(scenes)))


@torch.no_grad()
@pytest.mark.parametrize(("kind", "mode"), [("resnet", "roi_align"), ("resnet", "crop"), ("vit", "dense")])
def test_regions_are_of_unit_length_and_their_order_does_not_matter(
    make_clip: MakeClip, scenes: ImageBatch, kind: str, mode: str
) -> None:
    encoder = RegionEncoder(make_clip(kind).visual, mode)
    some = Regions.cat([regions((0, 0, 30, 30), (10, 5, 60, 40), image=2), regions((3, 3, 50, 64), image=0)])
    found = encoder(scenes, some)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    turned = encoder(scenes, some[torch.tensor([2, 0, 1])])
    torch.testing.assert_close(turned, found[[2, 0, 1]], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "mode"), [("resnet", "roi_align"), ("resnet", "crop"), ("vit", "dense")])
def test_no_regions_give_no_embeddings(make_clip: MakeClip, scenes: ImageBatch, kind: str, mode: str) -> None:
    found = RegionEncoder(make_clip(kind).visual, mode)(scenes, Regions.cat([]))
    assert found.shape == (0, 32)


def test_no_regions_can_be_trained_on(make_clip: MakeClip, scenes: ImageBatch) -> None:
    visual = make_clip().visual.train()
    RegionEncoder(visual)(scenes, Regions.cat([])).sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["roi_align", "crop"])
def test_chunks_do_not_change_embeddings(make_clip: MakeClip, scenes: ImageBatch, mode: str) -> None:
    visual, some = make_clip().visual, whole_images(scenes)
    whole, parts = RegionEncoder(visual, mode), RegionEncoder(visual, mode, chunk=3)
    torch.testing.assert_close(parts(scenes, some), whole(scenes, some), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_whole_image_box_leaves_the_padding_out(make_clip: MakeClip) -> None:
    image = blotches(96, 64)
    alone, padded = ImageBatch.pad([image]), ImageBatch.pad([image, blotches(160, 160, seed=1)])
    assert whole_images(padded).boxes.tolist() == [[0, 0, 64, 96], [0, 0, 160, 160]]
    encoder = RegionEncoder(make_clip().visual)
    own = encoder.encode_image(alone)[0]
    leaving_out = float(own @ encoder.encode_image(padded)[0])
    taking_in = float(own @ encoder(padded, regions((0, 0, 160, 160)))[0])
    assert leaving_out > 0.85
    assert leaving_out > taking_in


@torch.no_grad()
def test_padding_beyond_the_reach_of_the_convolutions_changes_nothing(make_clip: MakeClip) -> None:
    image = blotches(96, 96)
    encoder = RegionEncoder(make_clip().visual)
    less, more = (ImageBatch.pad([image, torch.zeros(3, side, side)]) for side in (160, 224))
    some = regions((0, 0, 96, 96), (20, 30, 90, 96))
    torch.testing.assert_close(encoder(less, some), encoder(more, some), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_regions_away_from_the_edge_do_not_feel_padding(make_clip: MakeClip) -> None:
    image = blotches(128, 128)
    encoder, inner = RegionEncoder(make_clip().visual), regions((0, 0, 64, 64), (16, 32, 64, 60))
    alone, padded = ImageBatch.pad([image]), ImageBatch.pad([image, torch.ones(3, 192, 192)])
    torch.testing.assert_close(encoder(padded, inner), encoder(alone, inner), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_neighbor_in_the_batch_changes_nothing(make_clip: MakeClip) -> None:
    image = blotches(64, 96)
    encoder, whole = RegionEncoder(make_clip().visual), regions((0, 0, 96, 64))
    found = [
        encoder(ImageBatch.pad([image, blotches(128, 128, seed=seed)]), whole)
        for seed in (1, 2)
    ]  # fmt: skip
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    """A tower whose patches of 14 pixels divide few frames."""
    torch.manual_seed(0)
    return VisionTransformer(VisionConfig("vit", [1], 32, 14, 56, 16), 24).eval()


@torch.no_grad()
@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 5), (4, 2), (6, 6)])
def test_dense_regions_of_a_vit_look_at_their_own_patches(
    vit: VisionTransformer, row: int, column: int
) -> None:
    # The frame of 96 pixels ends within the seventh patch, which is filled up.
    image = blotches(96, 96)
    features = F.normalize(vit.dense(F.pad(image, (0, 2, 0, 2))[None]), dim=1)  # [1, D, 7, 7]
    box = regions((column * 14, row * 14, min(column * 14 + 14, 96), min(row * 14 + 14, 96)))
    found = RegionEncoder(vit, "dense")(ImageBatch.whole(image[None]), box)[0]
    likeness = torch.einsum("d,dhw->hw", found, features[0])
    assert int(likeness.argmax()) == row * 7 + column


@torch.no_grad()
@pytest.mark.parametrize("mode", ["dense", "roi_align"])
def test_regions_beside_the_last_whole_cell_are_seen(
    make_clip: MakeClip, vit: VisionTransformer, mode: str
) -> None:
    encoder = RegionEncoder(vit if mode == "dense" else make_clip().visual, mode)
    edge = regions((92, 0, 95, 20), (0, 90, 95, 95), (90, 90, 95, 95))
    left, right = (ImageBatch.whole(blotches(96, 96, seed)[None, :, :95, :95]) for seed in (0, 1))
    found = encoder(left, edge)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    assert bool(((found * encoder(right, edge)).sum(1) < 0.999).all())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_a_crop_of_the_towers_size_is_the_image(make_clip: MakeClip, scenes: ImageBatch, kind: str) -> None:
    visual = make_clip(kind).visual
    crop = RegionEncoder(visual, "crop", context=1.0)(scenes, whole_images(scenes))
    torch.testing.assert_close(crop, F.normalize(visual(scenes.pixels), dim=-1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_half_precision_leaves_regions_what_they_are(make_clip: MakeClip, scenes: ImageBatch) -> None:
    encoder = RegionEncoder(make_clip().visual)
    some = regions((0, 0, 30, 30), (10, 5, 60, 40), (20, 20, 64, 64), image=1)
    exact = encoder(scenes, some)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(scenes, some)
    assert rounded.dtype == torch.float32
    assert float((exact * rounded).sum(1).min()) > 0.999


def test_square_rois_keep_the_center_and_take_the_longer_side() -> None:
    rois = square_rois(regions((10, 20, 30, 60), image=3), 1.5)
    assert rois.tolist() == [[3, 20 - 30, 40 - 30, 20 + 30, 40 + 30]]


def test_modes_that_do_not_fit_the_tower_are_refused(make_clip: MakeClip) -> None:
    resnet, vit = make_clip().visual, make_clip("vit").visual
    assert isinstance(resnet, ModifiedResNet)
    with pytest.raises(InputError, match="use crop or dense"):
        RegionEncoder(vit, "roi_align")
    with pytest.raises(InputError, match="use roi_align or crop"):
        RegionEncoder(resnet, "dense")
    with pytest.raises(InputError, match="'rois' is not one of roi_align, crop, dense"):
        RegionEncoder(resnet, "rois")
