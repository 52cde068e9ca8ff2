"""The task of region pretraining: its losses are what they are said to be, and reach what they train."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_base.data.batch import ImageBatch
from clip_base.jobs.cli import main_regionclip
from clip_base.models.clip import CLIP
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputError
from clip_base.training.curves import NO_LOSS
from regionclip.concepts.synonyms import synonym_sets
from regionclip.concepts.vocabulary import Vocabulary
from regionclip.mining.shards import read_manifest
from regionclip.models.region_encoder import RegionEncoder
from regionclip.structures.regions import RegionBatch, Regions
from regionclip.structures.transforms import TrainingResizeConfig
from regionclip.training.mined import MinedSamples
from regionclip.training.region_text import RegionPretrainConfig, RegionTextTask, freeze
from regionclip.training.samples import RegionDataset
from regionclip.training.teacher import Teacher

MakeClip = Callable[..., CLIP]


def config(**options: object) -> RegionPretrainConfig:
    return RegionPretrainConfig(mined="mined", weights="weights", out="out", **options)  # type: ignore[arg-type]


def batch_of(mined: Path, context: int = 24) -> RegionBatch:
    samples = MinedSamples(mined, mined.parent / "cache")
    data = RegionDataset(samples, TrainingResizeConfig([64], 64, flip=False), 6, Tokenizer(context))
    return data.collate([data.item(index, torch.Generator().manual_seed(0)) for index in range(4)])


@pytest.mark.parametrize("stages", range(6))
def test_freezing_takes_the_first_stages_only(make_clip: MakeClip, stages: int) -> None:
    visual = make_clip().visual
    freeze(visual, stages, batch_norm=False)
    order = ["conv1", "layer1", "layer2", "layer3", "layer4"]
    for place, name in enumerate(order):
        wanted = place >= stages
        assert all(p.requires_grad == wanted for p in getattr(visual, name).parameters()), name
    assert all(p.requires_grad == (stages < 5) for p in visual.attnpool.parameters())


def test_free_batch_norms_do_move(mined: Path, make_clip: MakeClip) -> None:
    model, vocabulary = make_clip(), Vocabulary.load(mined / "vocabulary.safetensors")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    task = RegionTextTask(model, vocabulary, config(freeze_stages=0, freeze_batch_norm=False)).train()
    sum(task(batch_of(mined)).values()).backward()  # type: ignore[union-attr]
    assert not torch.equal(model.state_dict()["visual.bn1.running_mean"], before["visual.bn1.running_mean"])
    assert model.visual.conv1.weight.grad is not None  # type: ignore[union-attr]


def test_stages_that_do_not_exist_are_refused(make_clip: MakeClip) -> None:
    with pytest.raises(InputError, match="0 to 5, found 6"):
        freeze(make_clip().visual, 6, batch_norm=True)
    with pytest.raises(InputError, match="set it to 0 for a ViT"):
        freeze(make_clip("vit").visual, 2, batch_norm=True)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_what_the_log_shows_beside_the_losses_counts_as_none(
    mined: Path, make_clip: MakeClip, name: str
) -> None:
    vocabulary = Vocabulary.load(mined / "vocabulary.safetensors")
    options = config(learn_temperature=True, region_text={"name": name})
    task = RegionTextTask(make_clip(), vocabulary, options)
    figures = task.log_scalars()
    assert ("region_text_scale" in figures) == ("bias" in figures) == (name == "sigmoid")
    if name == "sigmoid":
        assert figures["region_text_scale"] == pytest.approx(10)
    assert figures.keys() <= NO_LOSS


def test_only_losses_with_a_weight_are_made(mined: Path, make_clip: MakeClip) -> None:
    vocabulary, batch = Vocabulary.load(mined / "vocabulary.safetensors"), batch_of(mined)
    everything = RegionTextTask(make_clip(), vocabulary, config())(batch)
    assert set(everything) == {"distillation", "region_text", "image_text"}
    doubled = RegionTextTask(make_clip(), vocabulary, config(distillation=2.0, contrastive=0.0))(batch)
    assert set(doubled) == {"distillation", "image_text"}
    torch.testing.assert_close(doubled["distillation"], 2 * everything["distillation"])
    torch.testing.assert_close(doubled["image_text"], everything["image_text"])


def test_the_image_text_loss_is_that_of_the_images_without_their_padding(
    mined: Path, make_clip: MakeClip
) -> None:
    batch, model = batch_of(mined), make_clip()
    pixels = F.pad(batch.images.pixels, (0, 32, 0, 64), value=1.0)
    sizes = torch.tensor([[64, 64], [40, 64], [64, 50], [33, 31]])
    padded = dataclasses.replace(batch, images=ImageBatch(pixels, sizes))
    vocabulary = Vocabulary.load(mined / "vocabulary.safetensors")
    found = RegionTextTask(model, vocabulary, config())(padded)["image_text"]
    boxes = torch.tensor([[0.0, 0.0, width, height] for height, width in sizes.tolist()])
    images = RegionEncoder(model.visual)(padded.images, Regions(boxes, torch.arange(4))).double()
    assert batch.tokens is not None
    texts = F.normalize(model.encode_text(batch.tokens).double(), dim=1)
    assert float(found.detach()) == pytest.approx(naive_image_text(model, images, texts), rel=1e-5)


def naive_image_text(model: CLIP, images: Tensor, texts: Tensor) -> float:
    """CLIP's loss of [B, D] images and their texts, as a loop."""
    scale = math.exp(float(model.logit_scale))
    logits = [[scale * float(image @ text) for text in texts] for image in images.detach()]
    columns = [list(column) for column in zip(*logits, strict=True)]
    total = 0.0
    for rows in (logits, columns):
        for place, row in enumerate(rows):
            total += math.log(math.fsum(math.exp(value) for value in row)) - row[place]
    return total / (2 * len(images))


def test_images_without_a_caption_are_left_out_of_the_image_text_loss(
    mined: Path, make_clip: MakeClip
) -> None:
    batch, model = batch_of(mined), make_clip()
    assert batch.tokens is not None
    tokens = batch.tokens.clone()
    tokens[1] = 0
    task = RegionTextTask(model, Vocabulary.load(mined / "vocabulary.safetensors"), config())
    found = task(dataclasses.replace(batch, tokens=tokens))["image_text"]
    rest = torch.tensor([0, 2, 3])
    images = task.encoder.encode_image(batch.images)[rest].double()
    texts = F.normalize(model.encode_text(batch.tokens[rest]).double(), dim=1)
    assert float(found.detach()) == pytest.approx(naive_image_text(model, images, texts), rel=1e-5)
    none = task(dataclasses.replace(batch, tokens=torch.zeros_like(tokens)))["image_text"]
    assert float(none.detach()) == 0
    none.backward()


@pytest.mark.parametrize("kind", ["roi_align", "crop"])
def test_a_teacher_in_the_step_gives_the_loss_of_all_its_stored_concepts(
    kind: str,
    mining_options: list[str],
    clip_file: Path,
    make_clip: MakeClip,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = ["matcher.name=pool", "matcher.min_probability=0", "matcher.k=1000", f"teacher={kind}"]
    kept = [one for one in mining_options if not one.startswith("matcher.")]
    assert main_regionclip(["mine", *kept, *pool, f"out={tmp_path / 'mined'}"]) == 0
    batch, manifest = batch_of(tmp_path / "mined"), read_manifest(tmp_path / "mined")
    vocabulary = Vocabulary.load(tmp_path / "mined" / "vocabulary.safetensors")
    assert batch.regions.concept_ids is not None
    assert batch.regions.concept_ids.shape[1] == len(vocabulary)
    teacher = Teacher.from_manifest(str(clip_file), manifest)
    student = make_clip(seed=3)
    stored = RegionTextTask(student, vocabulary, config())(batch)["distillation"]
    online = RegionTextTask(student, vocabulary, config(teacher="clip"), teacher)(batch)["distillation"]
    assert float(stored.detach()) > 0.01
    torch.testing.assert_close(online, stored, rtol=1e-4, atol=1e-6)


def test_a_frozen_teacher_is_neither_trained_nor_saved(
    mined: Path, clip_file: Path, make_clip: MakeClip
) -> None:
    vocabulary, batch = Vocabulary.load(mined / "vocabulary.safetensors"), batch_of(mined)
    plain = RegionTextTask(make_clip(), vocabulary, config())
    teacher = Teacher.from_manifest(str(clip_file), read_manifest(mined))
    task = RegionTextTask(
        make_clip(), vocabulary, config(crop_distillation=1.0, teacher="clip"), teacher
    ).train()
    assert task.state_dict().keys() == plain.state_dict().keys()
    assert len(list(task.parameters())) == len(list(plain.parameters()))
    sum(task(batch).values()).backward()  # type: ignore[union-attr]
    assert task.crops is not None
    for encoder in (teacher.encoder, task.crops):
        assert not encoder.visual.training
        assert all(parameter.grad is None for parameter in encoder.visual.parameters())


def test_a_trained_text_tower_begins_with_the_pools_embeddings(mined: Path, make_clip: MakeClip) -> None:
    vocabulary, batch = Vocabulary.load(mined / "vocabulary.safetensors"), batch_of(mined)
    stored = RegionTextTask(make_clip(), vocabulary, config(distillation=0)).train()(batch)
    model = make_clip()
    live = RegionTextTask(model, vocabulary, config(distillation=0, train_text=True)).train()(batch)
    torch.testing.assert_close(live, stored, rtol=1e-4, atol=1e-6)
    live["region_text"].backward()
    assert model.text.text_projection.grad is not None  # type: ignore[union-attr]
    assert float(model.text.text_projection.grad.abs().max()) > 0  # type: ignore[union-attr, operator]


def test_a_learnt_temperature_moves_and_stays_in_clips_range(mined: Path, make_clip: MakeClip) -> None:
    vocabulary, batch, model = Vocabulary.load(mined / "vocabulary.safetensors"), batch_of(mined), make_clip()
    task = RegionTextTask(model, vocabulary, config(temperature=0.05, learn_temperature=True)).train()
    assert task.log_scalars()["logit_scale"] == pytest.approx(20)
    fixed = RegionTextTask(make_clip(), vocabulary, config(temperature=0.05)).train()
    torch.testing.assert_close(task(batch), fixed(batch))
    assert fixed.log_scalars() == {}
    sum(task(batch).values()).backward()  # type: ignore[union-attr]
    assert float(model.logit_scale.grad) != 0  # type: ignore[arg-type]
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    task.after_step()
    assert task.log_scalars()["logit_scale"] == pytest.approx(100)


def test_a_memory_adds_negatives_from_the_second_step_on(mined: Path, make_clip: MakeClip) -> None:
    vocabulary, batch = Vocabulary.load(mined / "vocabulary.safetensors"), batch_of(mined)
    first, second = batch.regions.image_index < 2, batch.regions.image_index >= 2
    halves = [dataclasses.replace(batch, regions=batch.regions[half]) for half in (first, second)]
    losses = {}
    for size in (0, 100):
        task = RegionTextTask(make_clip(), vocabulary, config(memory=size)).train()
        losses[size] = [float(task(half)["region_text"].detach()) for half in halves]
    assert losses[100][0] == losses[0][0]
    assert losses[100][1] > losses[0][1] + 0.01


def test_synonyms_of_the_mined_classes_and_of_given_lists_are_of_one_family(
    world: Path, concepts_file: Path, mining_options: list[str], make_clip: MakeClip, tmp_path: Path
) -> None:
    entries = [json.loads(line) for line in concepts_file.read_text().splitlines()]
    names = [entry["concept"] for entry in entries[:5]]
    entries[0]["synonyms"] = ["thingy", names[1]]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    options = [one for one in mining_options if not one.startswith("concepts=")]
    command = ["mine", *options, f"concepts={tmp_path / 'pool.jsonl'}", f"out={tmp_path / 'mined'}"]
    assert main_regionclip(command) == 0
    (tmp_path / "classes.txt").write_text(f"{names[3]}, whatsit\n{names[4]}, whatsits\n")
    groups = synonym_sets(read_manifest(tmp_path / "mined"), [str(tmp_path / "classes.txt")])
    vocabulary = Vocabulary.load(tmp_path / "mined" / "vocabulary.safetensors")
    family = RegionTextTask(make_clip(), vocabulary, config(), None, groups).families.tolist()
    place = {name: family[vocabulary.index(name)] for name in names}
    assert place[names[0]] == place[names[1]]
    assert place[names[3]] == place[names[4]]
    assert len(set(place.values())) == 3


def test_crops_can_be_a_loss_of_mined_regions_beside_the_others(mined: Path, make_clip: MakeClip) -> None:
    batch, model = batch_of(mined), make_clip()
    task = RegionTextTask(
        model, Vocabulary.load(mined / "vocabulary.safetensors"), config(crop_distillation=2.0)
    )
    found = task(batch)["crops"]
    with torch.no_grad():
        a, b = (
            RegionEncoder(model.visual, mode, 1.0)(batch.images, batch.regions)
            for mode in ("roi_align", "crop")
        )
    rows = [float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True)]
    assert float(found.detach()) == pytest.approx(2 * (1 - sum(rows) / len(rows)), rel=1e-4)


def test_a_vit_is_trained_through_its_dense_map(mined: Path, make_clip: MakeClip) -> None:
    vocabulary = Vocabulary.load(mined / "vocabulary.safetensors")
    model = make_clip("vit")
    losses = RegionTextTask(model, vocabulary, config(freeze_stages=0)).train()(batch_of(mined))
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert model.visual.conv1.weight.grad is not None  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in model.text.parameters())


def test_a_batch_without_regions_can_be_trained_on(mined: Path, make_clip: MakeClip) -> None:
    full = batch_of(mined)
    none = Regions(
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
        concept_ids=torch.zeros(0, 3, dtype=torch.int64),
        concept_probs=torch.zeros(0, 3),
    )
    vocabulary, empty = (
        Vocabulary.load(mined / "vocabulary.safetensors"),
        dataclasses.replace(full, regions=none),
    )
    losses = RegionTextTask(make_clip(), vocabulary, config(crop_distillation=1.0)).train()(empty)
    assert [float(losses[name].detach()) for name in ("distillation", "region_text", "crops")] == [0, 0, 0]
    sum(losses.values()).backward()  # type: ignore[union-attr]
    # Several processes wait for a gradient of everything that is trained.
    model = make_clip()
    texts = config(train_text=True, distillation=0, image_text=0)
    RegionTextTask(model, vocabulary, texts).train()(empty)["region_text"].backward()
    assert all(parameter.grad is not None for parameter in model.text.parameters())
