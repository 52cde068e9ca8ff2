"""How fast this machine is, measured in seconds, for an honest estimate before the first stage."""

from __future__ import annotations

import statistics
import time

import torch

from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.runtime.precision import autocast, pick_device

REFERENCE = 0.214
"""Seconds of a step of `measure_pace` on two idle cores of an AMD EPYC with AVX512-BF16."""
STEPS, BATCH = 3, 128  # as many images as a step of the quickstart has, or what steps cost alone would count
TOWERS = CLIPConfig(
    256,
    VisionConfig(layers=[1, 1, 1, 1], width=32, resolution=64),
    TextConfig(width=128, heads=2, layers=2, context_length=24),
)
"""The quickstart's own towers: what they take is most of what the stages take."""


def measure_pace() -> float:
    """Returns how many times as long as on the machine of `REFERENCE` this one takes to train.

    Trains the quickstart's towers on random images for some steps, in the precision and with the threads of
    the jobs. The median step counts, so that one disturbance does not.
    """
    device = pick_device("auto")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIP(TOWERS).to(device).to(memory_format=torch.channels_last).train()
        images = torch.randn(BATCH, 3, 64, 64, device=device).contiguous(memory_format=torch.channels_last)
    tokens = torch.full((BATCH, 24), 320, device=device)
    tokens[:, -1] = 49407
    seconds = []
    for _ in range(STEPS + 1):
        start = time.monotonic()
        with autocast("auto", device):
            loss = (model.encode_image(images) - model.encode_text(tokens)).float().square().mean()
        torch.autograd.backward(loss)
        loss.detach().item()  # a GPU works behind our back until it is asked
        seconds.append(time.monotonic() - start)
    return statistics.median(seconds[1:]) / REFERENCE
