"""The job `export`: CLIP's towers as ONNX files, or PyTorch programs, that need none of this code."""

# B images or texts, R side of the image in pixels, T token positions, D embedding size
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from clip_base.export import graphs
from clip_base.export.graphs import GraphFormats
from clip_base.export.hf_tokenizer import write_tokenizer
from clip_base.images.decode import normalize
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import RunFolder
from clip_base.models.clip import CLIP
from clip_base.models.tokenizer import VOCAB_SIZE
from clip_base.runtime.errors import InputError
from clip_base.storage.files import write_json
from clip_base.weights.load import WeightsFile, load_clip, weight_files

TOWERS = ("image", "text")
EMBEDDINGS = ("embeddings",)  # what both graphs return


@everyday(
    "export RN50 out=rn50_onnx",
    input="file",
    output="out formats towers",
    model="activation",
)
@dataclass
class ExportConfig(GraphFormats, WeightsFile):
    """Options of `export`."""

    out: str = option(
        REQUIRED, "folder for image.onnx, text.onnx, tokenizer.json and clip.json", runtime_only=True
    )
    towers: list[str] = option(["image", "text"], "which towers to write")

    def __post_init__(self) -> None:
        """Checks the towers' names."""
        wrong = [tower for tower in self.towers if tower not in TOWERS]
        if wrong or not self.towers:
            raise InputError(
                f"towers must be some of {', '.join(TOWERS)}, found {', '.join(wrong) or 'none'}"
            )


def export(config: ExportConfig) -> None:
    """Writes CLIP's towers as ONNX files that run without PyTorch, checked in onnxruntime."""
    graphs.check_formats(config.formats)
    run = RunFolder(config.out, config, "export", weight_files(config, "file"))
    if run.finished() is not None:
        print(f"{config.out} already exists and was made with the same options")
        return
    model = load_clip(config.file, config.activation).float()
    differences: dict[str, float] = {}
    if "image" in config.towers:
        differences |= write_image_tower(model, run.path, config.formats)
    if "text" in config.towers:
        differences |= write_text_tower(model, run.path, config.formats)
    write_json(run.path / "clip.json", about(model), indent=2)
    run.finish({"differences": differences})
    for name, difference in differences.items():
        print(f"{run.path / name}: differs from PyTorch by at most {difference:.1e}")


class ImageGraph(nn.Module):
    """From images to embeddings; the tower's normalization is part of the graph."""

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.visual = model.visual

    def forward(self, images: Tensor) -> Tensor:
        """Maps [B, R, R, 3] uint8 RGB to [B, D], unit length."""
        return F.normalize(self.visual(normalize(images.permute(0, 3, 1, 2))), dim=-1)


class TextGraph(nn.Module):
    """Token ids to embeddings."""

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.text = model.text

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps [B, T] int64 to [B, D], unit length."""
        return F.normalize(self.text(tokens), dim=-1)


def write_image_tower(model: CLIP, folder: Path, formats: list[str]) -> dict[str, float]:
    """Writes `image.onnx`, `image.pt2` or both; returns each file's largest difference from PyTorch."""
    side = model.visual.resolution
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> Tensor:
        """Draws random patches, of a few pixels and coarser: images have both."""
        parts = [torch.rand(count, 3, cells, cells, generator=generator) for cells in (4, 16, 64)]
        sized = sum(F.interpolate(part, (side, side), mode="bilinear") for part in parts)
        return (sized * 85).byte().permute(0, 2, 3, 1).contiguous()  # type: ignore[union-attr]

    graph = graphs.Graph(
        ImageGraph(model).eval(), {"images": images(2)}, {"images": {0: Dim("batch")}}, EMBEDDINGS
    )
    return graphs.write_graph(graph, folder, "image", formats, _compare(graph, [images(1), images(5)]))


def write_text_tower(model: CLIP, folder: Path, formats: list[str]) -> dict[str, float]:
    """Writes `text.onnx`, `text.pt2` or both, and the tokenizer; see `write_image_tower`."""
    length, end = model.text.context_length, model.text.vocab_size - 1
    generator = torch.Generator().manual_seed(0)

    def texts(count: int) -> Tensor:
        """Draws texts of all lengths, the shortest and the longest among them."""
        tokens = torch.randint(end - 1, (count, length), generator=generator)
        ends = torch.linspace(1, length - 1, count).long()
        places = torch.arange(length)
        tokens = tokens.masked_fill(places > ends[:, None], 0)
        return tokens.masked_fill(places == ends[:, None], end)

    graph = graphs.Graph(
        TextGraph(model).eval(), {"tokens": texts(2)}, {"tokens": {0: Dim("batch")}}, EMBEDDINGS
    )
    found = graphs.write_graph(graph, folder, "text", formats, _compare(graph, [texts(1), texts(5)]))
    if model.text.vocab_size == VOCAB_SIZE:  # else the texts are another tokenizer's affair
        write_tokenizer(folder / "tokenizer.json", length)
    return found


def _compare(graph: graphs.Graph, batches: list[Tensor]) -> Callable[[graphs.Run], float]:
    (name,) = graph.inputs

    def differences(run: graphs.Run) -> float:
        with torch.no_grad():
            wanted = [graph.module(batch) for batch in batches]
        found = [run({name: batch})[0] for batch in batches]
        return max(float((a - b).abs().max()) for a, b in zip(wanted, found, strict=True))

    return differences


def about(model: CLIP) -> dict[str, Any]:
    """Returns what a program needs to know beside the graphs."""
    return {
        "image": "uint8 [batch, resolution, resolution, 3], RGB: short side resized (bicubic), middle cut",
        "text": "int64 [batch, context_length], from tokenizer.json",
        "embeddings": "float32 [batch, embed_dim], unit length; probabilities: softmax(scale * cosines)",
        "resolution": model.visual.resolution,
        "context_length": model.text.context_length,
        "embed_dim": model.config.embed_dim,
        "scale": float(model.logit_scale.detach().exp()),
    }
