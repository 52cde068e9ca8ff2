"""A detector in OpenVINO's form and in 8-bit integers, from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from clip_base.export.graphs import onnx_run
from clip_base.export.runtimes import openvino_run
from clip_base.storage.files import read_json

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
Command = Callable[..., tuple[int, str]]


@pytest.mark.slow
def test_openvino_and_8_bit_integers_give_the_detectors_scores(
    detector_file: Path, tmp_path: Path, regionclip: Command
) -> None:
    options = [detector_file, "vocabulary=cup, star", "size=[96,128]", "suppress=false", "int8=true"]
    assert regionclip("export-detector", *options, "formats=onnx,openvino", f"out={tmp_path / 'out'}")[0] == 0
    out = tmp_path / "out"
    differences = read_json(out / "metrics.json")["differences"]
    stems = ("detector.onnx", "detector.xml", "detector.int8.onnx", "detector.int8.xml")
    assert set(differences) == set(stems)
    assert all(differences[name] < 1e-3 for name in stems[:2])
    # Rounding may exchange proposals of a random network, so that rows are others.
    assert all(0 < differences[name] <= 1 for name in stems[2:])
    assert (out / "detector.bin").exists()
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    image, names = {"image": torch.from_numpy(pixels)}, ("boxes", "scores")
    exact = onnx_run(out / "detector.onnx", names)(image)
    found = openvino_run(out / "detector.xml", names)(image)
    torch.testing.assert_close(found[1], exact[1], atol=1e-3, rtol=0)
    rounded = onnx_run(out / "detector.int8.onnx", names)(image)[1]
    assert not torch.equal(rounded, exact[1])
    assert abs(float(rounded.max() - exact[1].max())) < 0.2
    in_openvino = openvino_run(out / "detector.int8.xml", names)(image)[1]
    assert abs(float(in_openvino.max() - exact[1].max())) < 0.2


def test_what_cannot_be_written_is_refused(detector_file: Path, tmp_path: Path, regionclip: Command) -> None:
    options = ["export-detector", detector_file, "vocabulary=cup", f"out={tmp_path / 'out'}"]
    code, told = regionclip(*options, "formats=onnx,openvino")
    assert code == 2
    assert "set suppress=false" in told
    code, told = regionclip(*options, "formats=torch", "int8=true")
    assert code == 2
    assert "int8=true needs formats with onnx" in told
