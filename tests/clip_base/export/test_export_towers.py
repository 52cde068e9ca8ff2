"""Exported towers give the model's embeddings, without its code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clip_base.export import graphs
from clip_base.export.towers import ExportConfig, export
from clip_base.images.decode import normalize
from clip_base.jobs.cli import main
from clip_base.models.tokenizer import tokenize
from clip_base.runtime.errors import InputError
from clip_base.storage.files import read_json
from clip_base.weights.native import save_clip

onnxruntime = pytest.importorskip("onnxruntime")
TEXTS = ["a photo of a cat.", "Ein schöner Tag, don't stop 1234!", "many   spaces & 猫", "long " * 100]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, make: Any) -> dict[str, tuple[Any, Path]]:
    """A ResNet's and a ViT's folder, each with its model; the ViT in both forms."""
    found = {}
    for kind, forms in (("resnet", "onnx"), ("vit", "onnx,torch")):
        folder = tmp_path_factory.mktemp(kind)
        model = make(kind)
        save_clip(model, folder / "model.safetensors")
        arguments = [f"{folder / 'model.safetensors'}", f"out={folder / 'out'}", f"formats={forms}"]
        assert main(["export", *arguments]) == 0
        found[kind] = (model, folder / "out")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resnet", "vit"])
@pytest.mark.parametrize("count", [1, 4])
def test_onnxruntime_gives_the_towers_embeddings_for_any_batch(exported: Any, kind: str, count: int) -> None:
    model, folder = exported[kind]
    side = model.visual.resolution
    pictures = np.random.default_rng(3).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    found = onnxruntime.InferenceSession(folder / "image.onnx").run(None, {"images": pictures})[0]
    with torch.no_grad():
        wanted = F.normalize(model.visual(normalize(torch.from_numpy(pictures).permute(0, 3, 1, 2))), dim=-1)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-4)
    tokens = torch.randint(1, model.vocab_size - 1, (count, model.context_length))
    tokens[:, 5] = model.vocab_size - 1
    found = onnxruntime.InferenceSession(folder / "text.onnx").run(None, {"tokens": tokens.numpy()})[0]
    with torch.no_grad():
        wanted = F.normalize(model.text(tokens), dim=-1)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_torch_program_gives_them_without_this_package(exported: Any, tmp_path: Path) -> None:
    model, folder = exported["vit"]
    side = model.visual.resolution
    pictures = torch.randint(256, (3, side, side, 3), dtype=torch.uint8)
    torch.save(pictures, tmp_path / "pictures.pt")
    code = (
        "import sys, torch\n"
        f"program = torch.export.load({str(folder / 'image.pt2')!r}).module()\n"
        f"found = program(images=torch.load({str(tmp_path / 'pictures.pt')!r}))\n"
        f"torch.save(found, {str(tmp_path / 'found.pt')!r})\n"
        "assert 'clip_base' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    with torch.no_grad():
        wanted = F.normalize(model.visual(normalize(pictures.permute(0, 3, 1, 2))), dim=-1)
    torch.testing.assert_close(torch.load(tmp_path / "found.pt"), wanted, rtol=0, atol=1e-5)


def test_the_tokenizers_file_gives_our_ids(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from clip_base.export.hf_tokenizer import write_tokenizer

    for length in (77, 12):
        write_tokenizer(tmp_path / "tokenizer.json", length)
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        ids = [found.ids for found in tokenizer.encode_batch(TEXTS)]
        assert ids == tokenize(TEXTS, length, truncate=True).tolist()


@pytest.mark.slow
def test_what_a_program_must_know_is_written_beside_the_graphs(exported: Any) -> None:
    model, folder = exported["resnet"]
    about = read_json(folder / "clip.json")
    assert about["resolution"] == model.visual.resolution
    assert about["scale"] == pytest.approx(float(model.logit_scale.exp()))
    assert set(read_json(folder / "metrics.json")["differences"]) == {"image.onnx", "text.onnx"}


def test_a_file_that_differs_is_not_kept(tmp_path: Path) -> None:
    graph = graphs.Graph(torch.nn.Linear(2, 2), {"input": torch.ones(2, 2)}, {}, ("output",))
    with pytest.raises(RuntimeError, match=r"would differ from PyTorch by 0\.0011, more than 0\.001"):
        graphs.write_graph(graph, tmp_path, "model", ["torch"], lambda run: 0.0011)
    with pytest.raises(RuntimeError, match="differ from PyTorch by nan"):
        graphs.write_graph(graph, tmp_path, "model", ["torch"], lambda run: float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_without_onnx_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(graphs, "NEEDED", ("onnx", "no_such_runtime"))
    with pytest.raises(InputError, match=r"needs no_such_runtime: pip install 'regionclip\[onnx\]'"):
        export(ExportConfig(file="RN50.pt", out=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("wrong", "message"), [("formats=tflite", "found tflite"), ("towers=[]", "found none")]
)
def test_unknown_forms_and_no_tower_are_refused(
    wrong: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "model.safetensors", f"out={tmp_path / 'out'}", wrong]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
