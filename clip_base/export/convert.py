"""The job `convert`: from any known format to ours, open_clip's, Hugging Face's, or another package's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_base.export.hf_tokenizer import write_transformers_tokenizer
from clip_base.images.decode import DEVIATION, MEAN
from clip_base.jobs import plugins
from clip_base.jobs.config import REQUIRED, option
from clip_base.jobs.everyday import everyday
from clip_base.models.clip import CLIP, ImageTower, to_openai_names
from clip_base.models.tokenizer import VOCAB_SIZE
from clip_base.runtime.errors import InputError
from clip_base.storage.files import replacing, write_json
from clip_base.weights import formats, infer_config, key_names
from clip_base.weights.load import WeightsFile, find, read_any
from clip_base.weights.native import save_clip, write_weights
from clip_base.weights.reading import CONFIG_KEY, PRECISIONS, is_safetensors, read_foreign, read_notes

FORMS = ("native", "open_clip", "huggingface")
OTHERS = tuple(plugins.found(formats.WRITERS))  # of other packages
_PICKLES = (".pt", ".pth", ".bin")


@everyday(
    "convert RN50 to=open_clip out=rn50",
    input="file",
    output="out to precision",
    model="text_weights activation",
)
@dataclass
class ConvertConfig(WeightsFile):
    """Options of `convert`."""

    out: str = option(REQUIRED, "file to write; a folder for huggingface; either for open_clip")
    to: str = option("native", "format to write", choices=(*FORMS, *OTHERS))
    precision: str = option(
        "stored", "precision to write; stored: unchanged", choices=("stored", *PRECISIONS)
    )
    text_weights: str = option(
        "",
        "to=native: CLIP whose text tower is added to a detector that has none",
        renamed_from="text",
    )


def convert(config: ConvertConfig) -> None:
    """Converts weights from any known format to ours, open_clip's, Hugging Face's or another."""
    out, path = Path(config.out), find(config.file)
    if out.exists() and out.resolve() == path.resolve():
        raise InputError(f"out={out} is the input file; give another path")
    if config.to in OTHERS:
        if config.text_weights:
            raise InputError(f"text_weights={config.text_weights} is for to=native; omit it")
        write: formats.Writer = plugins.load(formats.WRITERS, config.to)
        print(f"{path} -> {write(path, out)}")
        return
    content = read_foreign(path) if config.to == "native" else None
    if content is not None and content.native is not None:
        print(f"{path} ({content.form}) -> {content.native(path, out, config.text_weights)}")
        return
    if config.text_weights:
        raise InputError(
            f"{path} is not a detector without a text tower; omit text_weights={config.text_weights}"
        )
    model, report = read_any(path, config.activation, config.precision)
    if out.exists() and out.resolve() == report.path.resolve():
        raise InputError(f"out={out} is the input file; give another path")
    for note in report.notes:
        print(f"note: {note}")
    if isinstance(model, ImageTower) and config.to != "native":
        raise InputError(f"{path} has no text tower, and to={config.to} is a whole CLIP's format")
    if config.to == "native":
        told = content.metadata if content else read_notes(path) if is_safetensors(path) else {}
        written = write_native(model, out, told)
    else:
        written = {"open_clip": write_open_clip, "huggingface": write_huggingface}[config.to](model, out)
    print(f"{report.path} ({report.form}) -> {written}")


def write_native(model: CLIP, out: Path, notes: Mapping[str, str]) -> str:
    """Writes our safetensors with the file's notes, see `save_clip`; returns what was written, in words."""
    if out.suffix != ".safetensors":
        raise InputError(f"out={out}: our format is a .safetensors file; give such a name")
    save_clip(model, out, notes)
    return str(out)


def write_open_clip(model: CLIP, out: Path) -> str:
    """Writes a file that open_clip's `pretrained=` takes, or a folder for its `local-dir:`.

    The file alone does not tell open_clip the activation; the returned words say how to load it.
    """
    infer_config.require_transformer(model.config, "open_clip")
    state = to_openai_names(_plain(model.state_dict()))
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(dataclasses.asdict(model.config))}
    if out.suffix == ".safetensors":
        write_weights(out, state, metadata)
    elif out.suffix in _PICKLES:
        with replacing(out) as temporary:
            torch.save(state, temporary)
    elif out.suffix and not out.is_dir():
        raise InputError(f"out={out}: open_clip reads .safetensors, {', '.join(_PICKLES)}, or a folder")
    else:
        write_weights(out / "open_clip_model.safetensors", state, metadata)
        write_json(out / "open_clip_config.json", infer_config.to_open_clip(model.config), indent=2)
        return f"{out}; load it with open_clip.create_model('local-dir:{out}')"
    quick = model.config.activation == "quick_gelu"
    return f"{out}; load it with open_clip.create_model(NAME, pretrained='{out}', force_quick_gelu={quick})"


def write_huggingface(model: CLIP, out: Path) -> str:
    """Writes a folder that transformers' `CLIPModel.from_pretrained` takes; vision transformers only."""
    described = infer_config.to_huggingface(model.config)
    if out.suffix == ".safetensors" or out.is_file():
        raise InputError(f"out={out}: Hugging Face's format is a folder; give a folder")
    if (out / "config.json").exists():
        raise InputError(f"{out} already has a model; give another out= or delete that folder")
    state = key_names.to_huggingface(_plain(model.state_dict()))
    write_weights(out / "model.safetensors", state, {"format": "pt"})
    if model.config.text.vocab_size == VOCAB_SIZE:  # else the texts are another tokenizer's affair
        write_transformers_tokenizer(out, model.config.text.context_length)
    write_json(out / "preprocessor_config.json", _preprocessing(model.config.vision.resolution), indent=2)
    write_json(out / "config.json", {**described, "dtype": _dtype(model)}, indent=2)
    return f"{out}; load it with transformers.CLIPModel and CLIPProcessor .from_pretrained('{out}')"


def _preprocessing(side: int) -> dict[str, Any]:
    """Returns the settings of transformers' CLIPImageProcessor; 3 is Pillow's bicubic filter."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(DEVIATION),
    }


def _dtype(model: CLIP) -> str:
    return str(model.text.text_projection.dtype).removeprefix("torch.")


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors in the usual memory order, which is what files hold."""
    return {name: value.detach().contiguous() for name, value in state.items()}
