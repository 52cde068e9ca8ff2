"""Backbones of a proposal network: the trunk of CLIP's ResNet, or torchvision's ResNet-50."""

# B images, H and W padded sides, C channels
from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50

from clip_base.data.batch import ImageBatch
from clip_base.images.decode import DEVIATION, MEAN
from clip_base.models.bottleneck import EXPANSION, FrozenBatchNorm2d, freeze_batch_norm
from clip_base.models.configs import VisionConfig
from clip_base.models.resnet import ModifiedResNet

BACKBONES = {"clip": (4, 8, 16), "resnet50": (4, 8, 16, 32)}  # strides of their maps, pixels
# Blue, green and red in 0…255: what weights that come from Caffe (MSRA's ResNets) expect to be subtracted.
CAFFE_MEAN = (103.53, 116.28, 123.675)


class ResNet50(nn.Module):
    """torchvision's ResNet-50 without its classifier, with the `stages` of CLIP's ResNet.

    Args:
        stages: how many of its four layers there are.
        stride_in_1x1: halve the map in a block's first convolution, as MSRA's ResNets do, and not in the 3x3.
    """

    def __init__(self, stages: int, stride_in_1x1: bool = False) -> None:
        super().__init__()
        whole = resnet50(weights=None)
        self.conv1, self.bn1, self.maxpool = whole.conv1, whole.bn1, whole.maxpool
        self.names = [f"layer{number}" for number in range(1, stages + 1)]
        for name in self.names:
            layer = getattr(whole, name)
            if stride_in_1x1:
                layer[0].conv1.stride, layer[0].conv2.stride = layer[0].conv2.stride, (1, 1)
            self.add_module(name, layer)

    def stages(self, images: Tensor) -> list[Tensor]:
        """Returns the maps after layer1, layer2, …: strides 4, 8, 16 and, when there are four, 32 pixels."""
        x = images.to(self.conv1.weight.dtype).contiguous(memory_format=torch.channels_last)
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        maps = []
        for name in self.names:
            x = getattr(self, name)(x)
            maps.append(x)
        return maps


def caffe_pixels(images: ImageBatch) -> Tensor:
    """Returns [B, 3, H, W]: CLIP's normalized pixels as BGR in 0…255 less `CAFFE_MEAN`; padding stays 0."""
    pixels = images.pixels
    factor = pixels.new_tensor(DEVIATION) * 255
    shift = pixels.new_tensor(MEAN) * 255 - pixels.new_tensor(CAFFE_MEAN).flip(0)
    shown = (pixels * factor[:, None, None] + shift[:, None, None]).flip(1)
    height, width = pixels.shape[-2:]
    rows = torch.arange(height, device=pixels.device) < images.sizes[:, :1]  # [B, H]
    columns = torch.arange(width, device=pixels.device) < images.sizes[:, 1:]  # [B, W]
    return shown * (rows[:, None, :, None] & columns[:, None, None, :])


def fit_frame(images: ImageBatch, multiple: int) -> ImageBatch:
    """Returns the images in the smallest frame whose sides are multiples of `multiple`.

    What a batch is padded to beyond that depends on who made it; a network's proposals should not.
    """
    height, width = (-(-side // multiple) * multiple for side in images.sizes.amax(0).tolist())
    room = (0, width - images.pixels.shape[-1], 0, height - images.pixels.shape[-2])
    return ImageBatch(F.pad(images.pixels, room), images.sizes) if any(room) else images


def clip_trunk(vision: VisionConfig) -> ModifiedResNet:
    """Returns a CLIP ResNet with random weights and without what lies above its trunk."""
    trunk = ModifiedResNet(vision, embed_dim=1)
    del trunk.layer4, trunk.attnpool
    return trunk


def channels_of(backbone: str, vision: VisionConfig) -> list[int]:
    """Returns the channels of each map of a backbone."""
    if backbone == "resnet50":
        return [256 * 2**stage for stage in range(4)]
    return [vision.width * 2**stage * EXPANSION for stage in range(3)]


def freeze_stages(backbone: nn.Module, stages: int, batch_norm: bool) -> None:
    """Freezes the stem and the first layers, and with `batch_norm` every batch norm.

    Args:
        backbone: with children called layer1, layer2, …; its other children are the stem.
        stages: 0 none, 1 the stem, 2 also layer1, …
        batch_norm: whether batch norms keep their statistics and gains in the other stages too.
    """
    for name, child in list(backbone.named_children()):
        stage = int(name.removeprefix("layer")) + 1 if name.startswith("layer") else 1
        if stage <= stages:
            child.requires_grad_(False)
        if stage <= stages or batch_norm:
            if isinstance(child, nn.BatchNorm2d):
                setattr(backbone, name, FrozenBatchNorm2d(child))
            else:
                freeze_batch_norm(child)


def trunk_hash(trunk: ModifiedResNet) -> str:
    """Returns the sha256 of the weights from the stem to layer3, in hex: equal for equal trunks."""
    digest = hashlib.sha256()
    for name, value in sorted(trunk.state_dict().items()):
        if not name.startswith(("layer4.", "attnpool.")) and not name.endswith("num_batches_tracked"):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
