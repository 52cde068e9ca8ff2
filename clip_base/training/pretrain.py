"""Image-text pretraining from raw captions: CLIP's, and what its paper compares with (arXiv 2103.00020)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clip_base.data.batch import ImageBatch, ImageTextBatch
from clip_base.data.loader import Loader
from clip_base.data.mixture import listed_images, weights_of
from clip_base.data.sources import SOURCES, Pairs, Source
from clip_base.images.decode import ImageStore, Pixels, normalize, size_of, to_tensor
from clip_base.images.preprocess import cut_and_resize
from clip_base.jobs.config import Plugin, build_plugin, option, plugin
from clip_base.jobs.everyday import everyday
from clip_base.jobs.run import RunFolder, files_of
from clip_base.jobs.skipped import require_present
from clip_base.models import zoo
from clip_base.models.clip import CLIP
from clip_base.models.configs import CLIPConfig
from clip_base.models.positions import resample_positions
from clip_base.models.predictor import OBJECTIVES, TextPredictor, frequent_tokens
from clip_base.models.tokenizer import Tokenizer
from clip_base.runtime.errors import InputError
from clip_base.runtime.precision import autocast, pick_device
from clip_base.storage.files import read_log
from clip_base.training import checkpoint as checkpoints
from clip_base.training.curves import NO_LOSS, VALIDATED
from clip_base.training.loop import TrainConfig, TrainingOptions, fit
from clip_base.training.optimizers import ROUND_STOCHASTICALLY
from clip_base.training.tasks import ContrastiveTask, JointTask, PredictionTask
from clip_base.training.validation import Validation, ValidationConfig, spread_over
from clip_base.weights.load import load_clip, weight_files
from clip_base.weights.native import load_exactly
from clip_base.weights.predictors import (
    build_text_objective,
    is_predictor,
    load_predictor,
    predicts_text,
    text_options,
)


@everyday(
    "pretrain source.name=csv source.file=pairs.csv model=ViT-B/32 out=runs/clip",
    input="source.name evaluate.images",
    output="out",
    model="model init objective.name",
    training="train.epochs train.batch_size train.lr train.seed",
    speed="train.precision train.workers",
)
@dataclass
class PretrainConfig(TrainingOptions):
    """Options of pretraining."""

    source: Plugin = plugin(SOURCES, "coco", "source of image-text pairs")
    model: str = option("", "a published tower by name, such as RN50; empty: the sizes under `tower`")
    tower: CLIPConfig = option(CLIPConfig(), "sizes of the towers when `model` is empty")
    init: str = option("", "weights file to start from; empty: random weights from train.seed")
    crop: float = option(0.9, "side of the smallest random square crop, as a share of the short side")
    objective: Plugin = plugin(
        OBJECTIVES,
        "contrastive",
        "what is learned of the pairs: a loss over embeddings, or captions predicted",
    )
    text_precision: str = option(
        "fp32",
        "type of the text tower's weights; bf16, rounded stochastically, needs adamw_bf16 or adamw_8bit",
        choices=("fp32", "bf16"),
    )
    accumulate: int = option(1, "parts in which a batch is embedded, to save memory; the loss is unchanged")
    replacement: bool = option(False, "sample pairs independently instead of each once per epoch")
    evaluate: ValidationConfig = option(
        ValidationConfig(),
        "evaluation during training and at its end; a finished folder is measured again with other ones",
        runtime_only=True,
    )
    train: TrainConfig = option(TrainConfig(epochs=32), "the training loop")

    def __post_init__(self) -> None:
        if not 0.1 <= self.crop <= 1:
            raise InputError(f"crop must be in [0.1, 1], found {self.crop}")
        if self.accumulate < 1:
            raise InputError(f"accumulate must be at least 1, found {self.accumulate}")


class CaptionedImages:
    """Pairs as training samples: a random square crop and one caption drawn at random.

    Args:
        pairs: images and their captions.
        tokenizer: turns a caption into ids; too long ones are cut.
        resolution: side of the crop in pixels after resizing.
        crop: smallest side of the crop as a share of the image's short side.
        cache: keep decoded images in memory.
    """

    def __init__(self, pairs: Pairs, tokenizer: Tokenizer, resolution: int, crop: float, cache: bool) -> None:
        self.pairs, self.tokenizer, self.resolution, self.crop = pairs, tokenizer, resolution, crop
        side = math.ceil(resolution / crop)
        # Twice the size that is needed leaves the final filter enough to work on.
        self.store = ImageStore(side if cache else 0, keep=cache, least=2 * side)

    def __len__(self) -> int:
        return len(self.pairs)

    def item(self, index: int, generator: torch.Generator) -> tuple[Pixels, str]:
        """Returns an [R, R, 3] crop and a caption."""
        pair = self.pairs[index]
        image = self.store.stored(pair.image)
        height, width = size_of(image)
        share, down, right, which = torch.rand(4, generator=generator).tolist()
        side = max(round(min(height, width) * (self.crop + (1 - self.crop) * share)), 1)
        top, left = round(down * (height - side)), round(right * (width - side))
        piece = cut_and_resize(image, left, top, side, self.resolution)
        return piece, pair.captions[int(which * len(pair.captions))]

    def name(self, index: int) -> str:
        """Returns what the image of a sample is called."""
        return str(self.pairs[index].image)

    def collate(self, items: list[tuple[Pixels, str]]) -> ImageTextBatch:
        """Makes a batch of crops and captions."""
        pixels = normalize(to_tensor([image for image, _ in items]))
        return ImageTextBatch(
            ImageBatch.whole(pixels), self.tokenizer([text for _, text in items], truncate=True)
        )


def make_model(config: PretrainConfig) -> CLIP:
    """Returns the model to train: published sizes or `tower`, random or from `init`.

    Initial weights for another resolution get their position embeddings resampled, which is how the paper's
    extra epoch at 336 pixels begins (arXiv 2103.00020, section 2.5).
    """
    sizes = zoo.config(config.model) if config.model else config.tower
    torch.manual_seed(config.train.seed)
    if not config.init:
        return CLIP(sizes)
    model = load_clip(config.init)
    if model.config == sizes:
        return model
    found, wanted = model.config.vision.resolution, sizes.vision.resolution
    if replace(model.config, vision=replace(model.config.vision, resolution=wanted)) != sizes:
        raise InputError(
            f"init={config.init} holds {model.config}, requested was {sizes}; change model= or tower="
        )
    key = next(key for key in model.visual.state_dict() if key.endswith("positional_embedding"))
    state, resized = model.state_dict(), CLIP(sizes)
    old, new = state[f"visual.{key}"], resized.visual.state_dict()[key]
    before, side = (round((len(positions) - 1) ** 0.5) for positions in (old, new))
    state[f"visual.{key}"] = resample_positions(old, side, side)
    resized.load_state_dict(state)
    cells = f"from {before} × {before} to {side} × {side} cells"
    print(f"{config.init}: position embeddings interpolated {cells}, for {wanted} pixels instead of {found}")
    return resized


def make_task(
    config: PretrainConfig, model: CLIP, captions: Iterable[str] = ()
) -> ContrastiveTask | PredictionTask:
    """Returns the training task of `model`; random weights get the objective's initial logit scale.

    Args:
        config: names the objective.
        model: of which an objective that predicts captions may take the vision tower alone.
        captions: in which such an objective counts tokens.
    """
    if predicts_text(config.objective):
        options = text_options(config.objective)
        spec = {"name": config.objective["name"], **asdict(options)}
        vocabulary = frequent_tokens(captions, model.config.text.context_length, options.words)
        predictor = build_text_objective(spec, model.config, model.visual, vocabulary)
        if options.contrastive:
            return JointTask(model, predictor, spec)
        return PredictionTask(TextPredictor(model.config, predictor, model.visual), spec)
    objective = build_plugin(OBJECTIVES, config.objective)
    start = getattr(objective, "initial_logit_scale", None)
    if start is not None and not config.init:
        nn.init.constant_(model.logit_scale, start)
    return ContrastiveTask(model, objective, config.accumulate)


def pretrain(config: PretrainConfig) -> None:
    """Trains a CLIP on image-text pairs; writes `out/model.safetensors`.

    With an objective that predicts captions the file holds a vision tower and that objective's part instead,
    which `zeroshot` and `classify` take; with `objective.contrastive` it holds a CLIP, and
    `out/predictor.safetensors` the other two.
    With `train.ema` those are the averaged weights, and `out/model_raw.safetensors` holds the last step's.
    """
    _check(config)
    inputs = {**weight_files(config, "init"), **files_of(config, "source")}
    run = RunFolder(config.out, config, "pretrain", inputs)
    metrics, file = run.finished(), run.path / "model.safetensors"
    measured_on = config.evaluate.identity()
    if metrics is None:
        metrics = _train(config, run)
    elif measured_on not in ("", metrics.get("measured_on")):
        metrics = {key: value for key, value in metrics.items() if not key.startswith(VALIDATED)}
        metrics |= _measured(config, file, metrics["steps"])
        run.log({"step": metrics["steps"], **validated(metrics)})
    else:
        print(f"{run.path} is complete: {file}")
        return
    run.finish(metrics | ({"measured_on": measured_on} if measured_on else {}))
    shown = "".join(f", {name} {value:.3f}" for name, value in validated(metrics).items())
    print(f"{file}: {metrics['steps']} steps on {metrics['pairs']} images, loss {metrics['loss']:.3f}{shown}")


def _check(config: PretrainConfig) -> None:
    """Raises an InputError for options that do not go together."""
    if config.text_precision == "bf16":
        _check_text_precision(config)
    if not predicts_text(config.objective):
        return
    name, options = config.objective["name"], text_options(config.objective)
    if config.accumulate > 1:
        raise InputError(
            f"accumulate={config.accumulate} is for losses over embeddings; with objective.name={name} lower "
            "train.batch_size, or use train.checkpointing=true"
        )
    if not options.contrastive and config.evaluate.source["name"] != "none":
        raise InputError(
            f"evaluate.source: objective.name={name} trains no text tower to measure retrieval with; use "
            "evaluate.images, or objective.contrastive=1"
        )


def _check_text_precision(config: PretrainConfig) -> None:
    """Raises an InputError where weights of bfloat16 would lose their updates, or there are none."""
    train = config.train
    if train.optimizer not in ROUND_STOCHASTICALLY:
        raise InputError(
            f"text_precision=bf16 with train.optimizer={train.optimizer} would lose most updates; use "
            f"{' or '.join(ROUND_STOCHASTICALLY)}, which round stochastically"
        )
    if train.ema:
        raise InputError("text_precision=bf16: an average in bfloat16 stands still; use train.ema=0")
    if train.parallel == "fsdp":
        raise InputError("text_precision=bf16: fsdp shards weights of one type; use train.parallel=ddp")
    if predicts_text(config.objective) and not text_options(config.objective).contrastive:
        name = config.objective["name"]
        raise InputError(f"text_precision=bf16: objective.name={name} trains no text tower; omit it")


def captions_of(pairs: Pairs, limit: int) -> Iterator[str]:
    """Yields the captions of at most `limit` pairs spread evenly over all, of all of them when it is 0.

    Pairs that cannot be used are left out.
    """
    for index in spread_over(len(pairs), limit):
        with contextlib.suppress(InputError):
            yield from pairs[index].captions


def _train(config: PretrainConfig, run: RunFolder) -> dict[str, Any]:
    """Trains, writes the weights, and returns what `metrics.json` says."""
    source: Source = build_plugin(SOURCES, config.source)
    pairs = source.pairs()
    require_present(listed_images(pairs), config.train.max_skipped, "source")
    model = make_model(config)
    sizes = model.config
    data = CaptionedImages(
        pairs, Tokenizer(sizes.text.context_length), sizes.vision.resolution, config.crop, config.cache
    )
    train = config.train
    loader = Loader(
        data,
        data.collate,
        train.batch_size,
        seed=train.seed,
        workers=train.workers,
        skipped=run.path / "skipped.jsonl",
        max_skipped=train.max_skipped,
        weights=weights_of(pairs),
        replacement=config.replacement,
    )
    model.to(memory_format=torch.channels_last)
    if config.text_precision == "bf16":
        model.text.to(torch.bfloat16)
    task = make_task(config, model, captions_of(pairs, config.objective.get("count_from", 0)))
    steps = fit(task, loader, train, run, Validation(config.evaluate, task.model) or None)
    task.save(run.path / "model.safetensors")
    figures = task.log_scalars()
    if train.ema:
        _save_last(task, run)
    loss, skipped = last_loss(run.log_path), len(loader.broken)
    metrics = {"steps": steps, "pairs": len(pairs), "skipped": skipped, "loss": loss, **figures}
    return metrics | last_validation(run.log_path, steps)


def _measured(config: PretrainConfig, file: Path, step: int) -> dict[str, float]:
    """Returns what the validation measures of a finished training's weights."""
    device = pick_device(config.train.device)
    model = (load_predictor(file) if is_predictor(file) else load_clip(file)).to(device)
    with torch.no_grad(), autocast(config.train.precision, device):
        return Validation(config.evaluate, model)(step)


def _save_last(task: ContrastiveTask | PredictionTask, run: RunFolder) -> None:
    """Writes the last step's weights beside their average: `model_raw.safetensors`."""
    found = checkpoints.newest(run.path / "checkpoints")
    assert found is not None
    step, weights, _ = found
    load_exactly(task, weights, run.path / f"checkpoints/{step:08d}")
    task.save(run.path / "model_raw.safetensors")


def validated(figures: dict[str, Any]) -> dict[str, float]:
    """Returns those of some figures that a validation measured."""
    return {name: value for name, value in figures.items() if name.startswith(VALIDATED)}


def last_validation(log: Path, step: int) -> dict[str, float]:
    """Returns what a training log says of the validation after `step`; nothing without one."""
    entries = reversed(read_log(log, "log"))
    return next((validated(entry) for entry in entries if entry.get("step") == step and validated(entry)), {})


def last_loss(log: Path) -> float:
    """Returns the sum of the losses in the last line of a training log."""
    for entry in reversed(read_log(log, "log")):
        losses = [value for key, value in entry.items() if key not in NO_LOSS]
        if "lr" in entry and all(isinstance(value, int | float) for value in losses):
            return float(sum(losses))
    return math.nan
