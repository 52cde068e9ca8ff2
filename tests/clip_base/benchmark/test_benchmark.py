"""`clip-base benchmark`: the figures of the single jobs, of every kind of dataset, each measured once."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchvision

from clip_base.benchmark import benchmark as jobs
from clip_base.benchmark.cells import meets_zero_shot
from clip_base.benchmark.datasets import open_dataset
from clip_base.benchmark.published import METRICS, published, published_of
from clip_base.evaluation.features import Embedder, FeatureConfig
from clip_base.jobs.cli import main
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig, TextConfig, VisionConfig
from clip_base.runtime.errors import InputError, InputNote
from clip_base.weights.native import save_clip

COLORS = {"red bus": (40, 40, 220), "green field": (60, 200, 60), "blue sky": (230, 120, 60)}
TOWERS = {
    "vit": VisionConfig(kind="vit", layers=[1], width=64, patch=16, resolution=32),
    "resnet": VisionConfig(layers=[1, 1, 1, 1], width=8, head_width=32, resolution=32),
}
FAST = ["precision=fp32", "seeds=1", "shots=[1,2]", "batch_size=8"]


@pytest.fixture
def weights(tmp_path: Path) -> list[str]:
    """A ViT, whose features before the projection differ from those behind it, and a ResNet."""
    paths = [str(tmp_path / f"{kind}.safetensors") for kind in TOWERS]
    for vision, path in zip(TOWERS.values(), paths, strict=True):
        torch.manual_seed(0)
        save_clip(CLIP(CLIPConfig(32, vision, TextConfig(width=64, heads=1, layers=1))).eval(), Path(path))
    return paths


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three classes of colored noise: 8 images of each to train on, 4 to test on."""
    random, root = np.random.default_rng(0), tmp_path / "colors"
    for part, count in (("train", 8), ("test", 4)):
        for name, color in COLORS.items():
            folder = root / part / name.replace(" ", "_")
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(color) + random.normal(0, 60, (20, 20, 3)), 0, 255).astype(np.uint8)
                cv2.imwrite(str(folder / f"{number}.png"), pixels)
    return root


def files_of(part: Path) -> list[tuple[int, bytes]]:
    """Returns label and bytes of each image, in the order in which folders are read."""
    folders = sorted(part.iterdir())
    return [
        (label, path.read_bytes())
        for label, folder in enumerate(folders)
        for path in sorted(folder.iterdir())
    ]


def as_tars(images: Path, out: Path) -> Path:
    for part in ("train", "test"):
        (out / part).mkdir(parents=True)
        with tarfile.open(out / part / "0.tar", "w") as tar:
            for number, (label, data) in enumerate(files_of(images / part)):
                for ending, content in (("png", data), ("cls", str(label).encode())):
                    header = tarfile.TarInfo(f"{number:05d}.{ending}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
    names = sorted(name.replace(" ", "_") for name in COLORS)
    (out / "classnames.txt").write_text("".join(f"{name.replace('_', ' ')}\n" for name in names))
    return out


def as_parquet(images: Path, out: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (out / "data").mkdir(parents=True)
    names = sorted(COLORS, key=lambda name: name.replace(" ", "_"))
    features = {"image": {"_type": "Image"}, "kind": {"names": names, "_type": "ClassLabel"}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    for part in ("train", "test"):
        files = files_of(images / part)
        table = pa.table(
            {
                "image": [{"bytes": data, "path": None} for _, data in files],
                "kind": [label for label, _ in files],
            }
        )
        name = f"{'validation' if part == 'test' else part}-00000-of-00001.parquet"
        pq.write_table(table.replace_schema_metadata(about), out / "data" / name)
    return out


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "table.csv").open() as file:
        return list(csv.DictReader(file))


def run(*options: str) -> int:
    return main(["benchmark", *FAST, *options])


def test_figures_are_those_of_the_single_jobs(weights: list[str], images: Path, tmp_path: Path) -> None:
    captions = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(3)],
        "annotations": [{"id": n, "image_id": n, "caption": name} for n, name in enumerate(COLORS)],
    }
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    places = ["red_bus", "green_field", "blue_sky"]
    (tmp_path / "flat").mkdir()
    for number, place in enumerate(places):
        shutil.copy(images / "test" / place / "0.png", tmp_path / "flat" / f"{number}.png")
    captioned = f"texts:{tmp_path / 'captions.json'}@{tmp_path / 'flat'}"
    out = tmp_path / "out"
    assert run(f"models=[{','.join(weights)}]", f"datasets=[{images},{captioned}]", f"out={out}") == 0
    found = {(row["model"], row["dataset"]): row for row in rows(out)}
    assert set(found) == {(model, name) for model in ("vit", "resnet") for name in ("colors", "texts")}
    for path in weights:
        model, single = Path(path).stem, tmp_path / Path(path).stem
        common = [f"weights={path}", "precision=fp32", "batch_size=8"]
        zero = ["zeroshot", f"images={images / 'test'}", *common, f"out={single / 'zero'}"]
        probe = ["linear-probe", f"train={images / 'train'}", f"test={images / 'test'}", *common]
        probe += ["seeds=1", "shots=[1,2]", f"out={single / 'probe'}"]
        words = [
            "retrieval",
            f"captions={tmp_path / 'captions.json'}",
            f"images={tmp_path / 'flat'}",
            *common,
        ]
        for command in (zero, probe, [*words, f"out={single / 'words'}"]):
            assert main(command) == 0
        metrics = {
            name: json.loads((single / name / "metrics.json").read_text())
            for name in ("zero", "probe", "words")
        }
        row = found[model, "colors"]
        assert float(row["zeroshot_top1"]) == metrics["zero"]["top1"]
        assert float(row["linear_probe_top1"]) == metrics["probe"]["top1"]
        assert float(row["linear_probe_C"]) == metrics["probe"]["C"]
        for count in ("1", "2"):
            assert float(row[f"few_shot_{count}"]) == metrics["probe"]["few_shot"][count]["top1"]
        row = found[model, "texts"]
        for key in ("image_to_text_R@1", "text_to_image_R@5"):
            assert float(row[f"retrieval_{key}"]) == metrics["words"][key]
    page, table = (out / "report.html").read_text(), (out / "table.md").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert table.splitlines()[0].startswith(
        "| model | dataset | zero-shot | linear probe | 1 shot | 2 shots |"
    )
    assert "<td>resnet</td>" in page


def test_the_same_images_give_the_same_figures_in_any_form(
    weights: list[str], images: Path, tmp_path: Path
) -> None:
    tars, parquet = as_tars(images, tmp_path / "tars"), as_parquet(images, tmp_path / "parquet")
    out = tmp_path / "out"
    assert run(f"models=[{weights[0]}]", f"datasets=[{images},{tars},hub:{parquet}]", f"out={out}") == 0
    one, two, three = ({k: v for k, v in row.items() if k != "dataset"} for row in rows(out))
    assert [row["dataset"] for row in rows(out)] == ["colors", "tars", "hub"]
    assert one == two == three


def test_only_what_is_new_is_measured_and_images_are_embedded_once(
    weights: list[str], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    embedded: list[str] = []
    measure, embed = jobs.measure, Embedder.embed

    def note_measure(task: str, model: Any, *rest: Any) -> Any:
        if len(measured) == 2 and "stop" in measured:
            raise KeyboardInterrupt
        measured.append(f"{model.name} {task}")
        return measure(task, model, *rest)

    def note_embed(self: Embedder, examples: Any, description: str) -> Any:
        embedded.append(description)
        return embed(self, examples, description)

    monkeypatch.setattr(jobs, "measure", note_measure)
    monkeypatch.setattr(Embedder, "embed", note_embed)
    out = [f"datasets=[{images}]", f"out={tmp_path / 'out'}"]
    measured.append("stop")
    assert run(f"models=[{weights[0]}]", *out) == 130
    assert measured == ["stop", "vit zeroshot"]
    measured.clear()
    assert run(f"models=[{weights[0]}]", *out) == 0
    assert measured == ["vit linear_probe", "vit few_shot"]
    assert embedded == ["vit: colors, test images", "vit: colors, train images"]
    assert run(f"models=[{weights[1]},{weights[0]}]", *out) == 0
    assert measured[2:] == ["resnet zeroshot", "resnet linear_probe", "resnet few_shot"]
    assert len(rows(tmp_path / "out")) == 2
    again = (tmp_path / "out" / "table.csv").read_bytes()
    assert run(f"models=[{weights[1]},{weights[0]}]", *out) == 0
    assert len(measured) == 5
    assert (tmp_path / "out" / "table.csv").read_bytes() == again
    (images / "test" / "red_bus" / "0.png").write_bytes((images / "test" / "blue_sky" / "1.png").read_bytes())
    assert run(f"models=[{weights[0]}]", *out, "tasks=[zeroshot]") == 0
    assert measured[5:] == ["vit zeroshot"]  # the image changed


def test_a_dataset_of_torchvision_that_is_on_disk(weights: list[str], tmp_path: Path) -> None:
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        pixels = random.integers(0, 256, (count, 28, 28), np.uint8)
        head = np.array([2051, count, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            np.array([2049, count], ">i4").tobytes() + labels.tobytes()
        )
    dataset = open_dataset(f"torchvision:MNIST@{tmp_path / 'data'}", tmp_path / "packed", "simple")
    assert (len(dataset.test), len(dataset.train)) == (20, 40)
    assert dataset.templates == ('a photo of the number: "{}".',)
    assert dataset.classes == tuple((str(number),) for number in range(10))
    assert [example.label for example in dataset.test[:11]] == [*range(10), 0]
    pixel = torchvision.datasets.MNIST(str(tmp_path / "data"), train=False)[3][0].getpixel((5, 6))
    data = np.frombuffer(dataset.test[3].path.read_bytes(), np.uint8)
    assert cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)[6, 5] == pixel


def test_models_are_called_by_as_little_as_tells_them_apart(tmp_path: Path) -> None:
    files = [tmp_path / place for place in ("a/clip.safetensors", "b/clip.safetensors", "last.pt")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert jobs.model_names(["RN50", "ViT-B/32"]) == ["RN50", "ViT-B/32"]
    assert jobs.model_names(["RN50", str(files[0])]) == ["RN50", "clip"]
    folders = tmp_path.name
    assert jobs.model_names(list(map(str, files))) == ["a/clip", "b/clip", f"{folders}/last"]
    for twice in (["RN50", "RN50"], [str(files[0]), str(files[0])]):
        with pytest.raises(InputError, match="models names one twice"):
            jobs.model_names(twice)


def test_shots_that_meet_zero_shot_are_read_between_the_points() -> None:
    shots = {str(count): {"top1": top1} for count, top1 in ((1, 0.2), (2, 0.4), (4, 0.8))}
    assert meets_zero_shot(0.4, shots) == 2
    assert meets_zero_shot(0.6, shots) == pytest.approx(2**1.5)
    assert meets_zero_shot(0.1, shots) == 1
    assert meets_zero_shot(0.81, shots) is None


def test_the_papers_27_datasets_have_names_and_prompts() -> None:
    found = published()
    assert len(found) == 27
    counts = {"imagenet": 1000, "sun397": 397, "kinetics700": 700, "birdsnap": 500, "fer2013": 7, "dtd": 47}
    assert {key: len(found[key].classes) for key in counts} == counts
    for entry in found.values():
        assert entry.metric in METRICS
        assert "openai/CLIP" in entry.source
        assert all("{}" in template for template in entry.templates)
    assert max(len(names) for names in found["fer2013"].classes) > 1
    for written in ("CIFAR-10", "cifar10", "wds_cifar10", "wds_vtab-cifar10"):
        known = published_of(written)
        assert known is not None
        assert known.key == "cifar10"
    assert published_of("my birds") is None


def test_published_names_go_to_classes_by_name_else_by_order_which_is_told(tmp_path: Path) -> None:
    names = [one[0] for one in published()["eurosat"].classes]
    for place in (sorted(names), [f"class{number}" for number in range(10)]):
        root = tmp_path / place[0] / "eurosat"
        for name in place:
            (root / name).mkdir(parents=True)
            cv2.imwrite(str(root / name / "0.png"), np.zeros((4, 4, 3), np.uint8))
    by_name = open_dataset(str(tmp_path / sorted(names)[0] / "eurosat"), tmp_path / "p", "simple")
    assert [one[0] for one in by_name.classes] == sorted(names)
    assert by_name.templates == published()["eurosat"].templates
    with pytest.warns(InputNote, match="'class0' is 'forest' and 'class9'"):
        by_order = open_dataset(str(tmp_path / "class0" / "eurosat"), tmp_path / "p", "simple")
    assert [one[0] for one in by_order.classes] == names


def test_several_names_of_a_class_count_together(weights: list[str], tmp_path: Path) -> None:
    from torch.nn import functional as F

    config = FeatureConfig(weights=weights[0], out=str(tmp_path))
    model = jobs.Model("vit", config)
    one, two, both = (model.directions(names, ["{}"]) for names in ([("cat",)], [("dog",)], [("cat", "dog")]))
    assert F.cosine_similarity(both, F.normalize(one + two)).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ("nowhere", "dataset nowhere does not exist"),
        ("torchvision:CIFAR11@.", "torchvision has no dataset 'CIFAR11'; did you mean 'CIFAR10'?"),
        ("torchvision:CIFAR10@.", "torchvision:CIFAR10 cannot be read from . (Dataset not found"),
        ("torchvision:CIFAR10", "torchvision:CIFAR10 needs its folder"),
        ("colors,colors/../colors", "two datasets are called 'colors'"),
        ("lacking", "dataset lacking: 1 of 3 classes have no images in the test part, such as 'none'"),
        ("other", "dataset other: the classes of other/train and other/test differ, as in"),
        ("table.parquet", "dataset table.parquet has no column of labels; it has image, number"),
        ("name:", "dataset 'name:' names no folder"),
        ("photo.jpg", "dataset photo.jpg is of no known kind"),
    ],
)
def test_what_is_no_dataset_is_one_clear_line(
    datasets: str,
    message: str,
    weights: list[str],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    shutil.copytree(images / "test", "lacking/test")
    Path("lacking/test/none").mkdir()
    shutil.rmtree("lacking/test/red_bus")
    shutil.copytree(images, "other")
    Path("other/train/red_bus").rename("other/train/car")
    pq.write_table(pa.table({"image": [b"x"], "number": [1]}), "table.parquet")
    Path("photo.jpg").write_bytes(b"x")
    assert run(f"models=[{weights[0]}]", f"datasets={datasets}", "out=out") == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {message}")
    assert told.count("\n") == 1
