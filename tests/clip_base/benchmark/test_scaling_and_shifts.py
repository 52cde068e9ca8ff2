"""Error over compute, and robustness under shift: the formulas by hand, the job on generated shifts."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from clip_base.benchmark import scaling
from clip_base.benchmark.robustness import Shift, baseline, effective_robustness, logit, table
from clip_base.benchmark.scaling import fit, gflops_per_image
from clip_base.jobs.cli import main
from clip_base.models import zoo
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.weights.native import save_clip


def test_a_power_law_is_found_with_its_spread() -> None:
    compute = [1.0, 10.0, 100.0, 1000.0]
    law = fit(compute, [0.5 * value**-0.2 for value in compute])
    assert (law.factor, law.exponent) == (pytest.approx(0.5), pytest.approx(-0.2))
    assert law.deviation == pytest.approx(0, abs=1e-9)
    noisy = [0.5 * value**-0.2 * 10**off for value, off in zip(compute, (0.1, -0.1, -0.1, 0.1), strict=True)]
    law = fit(compute, noisy)
    coefficients, covariance = np.polyfit(np.log10(compute), np.log10(noisy), 1, cov=True)
    assert law.exponent == pytest.approx(coefficients[0])
    assert law.exponent_error == pytest.approx(covariance[0, 0] ** 0.5)
    assert law.deviation == pytest.approx(math.sqrt(0.04 / 2))


def test_the_line_is_through_the_mean_of_the_datasets_that_all_models_have() -> None:
    compute = {"a": 1.0, "b": 10.0, "c": 100.0}
    errors = {name: {"x": 0.4 / 2**n, "y": 0.2 / 2**n} for n, name in enumerate(compute)}
    errors["a"]["only here"] = 1.0
    drawn = scaling.draw(compute, errors)
    assert drawn is not None
    assert drawn[0].startswith(b"\x89PNG")
    assert (drawn[1].factor, drawn[1].exponent) == (pytest.approx(0.3), pytest.approx(-math.log10(2)))
    assert scaling.draw({"a": 1.0, "b": 10.0}, {"a": {"x": 0.5}, "b": {"x": 0.4}}) is None
    assert scaling.draw(dict.fromkeys(compute, 1.0), errors) is None


def test_the_compute_of_a_published_tower_is_known() -> None:
    with torch.device("meta"):
        model = CLIP(zoo.config("ViT-B/32"))
    # 4.37 billion multiply-adds; the last block computes the class token alone behind its attention.
    assert 2 * 4.37 * 0.9 < gflops_per_image(model) < 2 * 4.37 * 1.01


def shift(model: str, probe: tuple[float, float], zero_shot: tuple[float, float]) -> Shift:
    return Shift(model, ("own", "shifted"), probe, zero_shot, 1000)


def test_effective_robustness_is_what_the_baselines_do_not_predict() -> None:
    def under_shift(accuracy: float) -> float:
        return 1 / (1 + math.exp(-(0.8 * logit(accuracy, 1000) - 1)))

    models = [
        shift("a", (0.6, under_shift(0.6)), (0.7, under_shift(0.7))),
        shift("b", (0.9, under_shift(0.9)), (0.7, under_shift(0.7) + 0.2)),
    ]
    line = baseline(models)
    assert line is not None
    assert (line.slope, line.offset) == (pytest.approx(0.8), pytest.approx(-1))
    assert effective_robustness(models[0], line) == pytest.approx(0, abs=1e-9)
    assert effective_robustness(models[1], line) == pytest.approx(0.2)
    header, lines = table(models)
    assert header[-1] == "effective robustness"
    assert [row[-1] for row in lines] == ["+0.0", "+20.0"] or [row[-1] for row in lines] == ["-0.0", "+20.0"]
    assert table(models[:1])[1][0][-1] == "–"  # no line through one model
    assert baseline([shift("c", (1.0, 1.0), (0.5, 0.5)), shift("d", (0.0, 0.0), (0.5, 0.5))]) is not None


def test_shifts_and_scaling_stand_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random, text = np.random.default_rng(0), TextConfig(width=64, heads=1, layers=1)
    for place, noise in (("clean", 40), ("noisy", 90)):
        for part, count in (("train", 8), ("test", 8)) if place == "clean" else (("test", 8),):
            for name, color in {"red": (0, 0, 200), "green": (0, 200, 0)}.items():
                folder = tmp_path / place / part / name
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = np.array(color) + random.normal(0, noise, (16, 16, 3))
                    cv2.imwrite(str(folder / f"{number}.png"), np.clip(pixels, 0, 255).astype(np.uint8))
    models = []
    for width in (32, 64, 128):
        vision = VisionConfig(kind="vit", layers=[1], width=width, head_width=32, patch=16, resolution=32)
        torch.manual_seed(width)
        models.append(str(tmp_path / f"w{width}.safetensors"))
        save_clip(CLIP(CLIPConfig(32, vision, text)).eval(), Path(models[-1]))
    options = [f"models={','.join(models)}", f"datasets={tmp_path / 'clean'},{tmp_path / 'noisy'}"]
    options += [f"out={tmp_path / 'out'}", "tasks=zeroshot", "precision=fp32", "batch_size=8"]
    assert main(["benchmark", *options, "shifts=clean:noisy"]) == 0
    told = (tmp_path / "out" / "table.md").read_text()
    assert "| model | dataset | shifted | probe |" in told
    assert "error is proportional to compute^" in told
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png;base64,") == 3
    capsys.readouterr()
    for entry, message in {
        "clean:noise": "shifts=clean:noise: 'noise' is none of the datasets; did you mean 'noisy'?",
        "noisy:clean": "shifts=noisy:clean: noisy and clean cannot be probed: noisy has no training images",
    }.items():
        assert main(["benchmark", *options, f"shifts={entry}"]) == 2
        assert message in capsys.readouterr().err
