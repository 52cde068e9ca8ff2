"""The reader of all CLIP formats: it recognizes the format from the file's content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clip_base.jobs import config as configs
from clip_base.models import zoo
from clip_base.models.clip import CLIP
from clip_base.models.configs import ACTIVATIONS, CLIPConfig
from clip_base.runtime.errors import InputError, quote, shortened
from clip_base.storage.files import existing, read_json
from clip_base.weights import formats, infer_config, key_names, unpickle
from clip_base.weights.native import (
    FORMAT,
    load_exactly,
    maker,
    read_metadata,
    read_weights,
    require_sizes,
    sizes_in,
)

# Names of dtypes, not dtypes: `--help` lists them without PyTorch.
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# The key under which a file that `convert` wrote for others carries our sizes.
CONFIG_KEY = "clip_base.config"
# What others put under "format": the framework, which says nothing about the content.
FRAMEWORKS = ("pt", "np", "tf", "flax", "mlx")
# The format of files that `predictors.save_predictor` writes.
TEXT_PREDICTOR = "clip_base.text_predictor/1"
_OPEN_CLIP_CONFIG = "open_clip_config.json"
# The weights in a folder, in the order of preference.
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


@dataclass(frozen=True)
class Report:
    """What a weights file turned out to be.

    Attributes:
        path: the file that holds the weights.
        form: the form in words.
        config: sizes of the towers.
        tensors: how many tensors there are.
        parameters: how many trainable numbers the model has.
        precision: how many numbers of each type the file stores, e.g. {"float16": 102010000}.
        matches: the published models that have these sizes.
        assumed: what the file does not say and was assumed; wrong assumptions give wrong results.
        unused: what the file holds beside the CLIP.
    """

    path: Path
    form: str
    config: CLIPConfig
    tensors: int
    parameters: int
    precision: dict[str, int]
    matches: tuple[str, ...]
    assumed: tuple[str, ...]
    unused: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """All there is to tell of the file."""
        return self.assumed + self.unused


@dataclass(frozen=True)
class _Found:
    """Tensors by our names, and what is known of their sizes."""

    path: Path
    form: str
    state: dict[str, Tensor]
    hints: infer_config.Hints
    config: CLIPConfig | None = None
    assumed: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    kind: type[CLIP] = CLIP


def read_clip(path: str | Path, activation: str = "", precision: str = "fp32") -> tuple[CLIP, Report]:
    """Reads a CLIP from a file or folder in any known format.

    Known are our own safetensors; OpenAI's TorchScript archives, whose code is not run; state dicts, plain or
    inside a training checkpoint, as `torch.save` or safetensors write them; open_clip's files and folders;
    Hugging Face CLIP folders; and the forms that other packages declare, see `formats`. Sizes come from a
    config in or beside the file, else from the tensors' shapes.

    Args:
        path: file or folder.
        activation: "quick_gelu" or "gelu" for files that do not say; a file that says otherwise is an error.
        precision: type of the model's weights: "fp32", "fp16", "bf16", or "stored" for what the file holds
            most of.

    Returns:
        The model on the CPU, in evaluation mode and channels-last, and what the file turned out to be.

    Raises:
        InputError: the file is missing, damaged, of no known format, holds more than tensors, or its tensors
            are missing, left over or misshapen (they are listed).
    """
    if activation and activation not in ACTIVATIONS:
        raise InputError(f"activation must be one of {', '.join(ACTIVATIONS)}, found {activation!r}")
    if precision not in PRECISIONS and precision != "stored":
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)} or stored, found {precision!r}")
    found = _find(existing(path, "weights file"))
    assumed = [*_check_activation(found, activation), *found.assumed]
    hints = infer_config.Hints(
        activation or found.hints.activation,
        found.hints.head_width,
        found.hints.text_heads,
        found.hints.source,
    )
    config = found.config or infer_config.infer(found.state, hints, found.path)
    matches = tuple(name for name in zoo.available_models() if zoo.config(name) == config)
    if found.config is None and not found.hints.head_width and not matches:
        wide = config.vision.head_width
        assumed.append(
            f"heads are taken to be {wide} (vision) and 64 (text) channels wide: there is no config"
        )
    empty = [name for name, value in found.state.items() if value.ndim > 1 and not bool(value.any())]
    if empty:
        assumed.append(
            f"{len(empty)} matrices hold zeros alone, such as {empty[0]}; was it trained? "
            "Embeddings that come out of one are all alike"
        )
    stored: Counter[str] = Counter()
    for value in found.state.values():
        stored[str(value.dtype).removeprefix("torch.")] += value.numel()
    model = _build(config, found, _dtype(precision, found.state))
    report = Report(
        found.path,
        found.form,
        config,
        len(found.state),
        sum(parameter.numel() for parameter in model.parameters()),
        dict(stored),
        matches,
        tuple(assumed),
        found.unused,
    )
    return model, report


def _build(config: CLIPConfig, found: _Found, dtype: torch.dtype) -> CLIP:
    odd = [
        f"{name} ({str(value.dtype).removeprefix('torch.')})"
        for name, value in found.state.items()
        if not value.is_floating_point() and not name.endswith("num_batches_tracked")
    ]
    if odd:
        raise InputError(f"{found.path}: {len(odd)} weights are not floating-point: {', '.join(odd[:4])}")
    require_sizes(found.kind, config, found.state, found.path)
    with torch.device("meta"):  # no time is spent on random weights that the file replaces
        model = found.kind(config)
    model = model.to(dtype).to_empty(device="cpu")
    # Statistics' counters came later to batch norms than some files; they are not used with a fixed momentum.
    own = model.state_dict()
    counters = {k: torch.zeros_like(v) for k, v in own.items() if k.endswith("num_batches_tracked")}
    load_exactly(model, {**counters, **found.state}, found.path)
    return model.eval().to(memory_format=torch.channels_last)


def _dtype(precision: str, state: Mapping[str, Tensor]) -> torch.dtype:
    if precision != "stored":
        dtype: torch.dtype = getattr(torch, PRECISIONS[precision])
        return dtype
    counts: Counter[torch.dtype] = Counter()
    for value in state.values():
        if value.is_floating_point():
            counts[value.dtype] += value.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32


def _check_activation(found: _Found, asked: str) -> list[str]:
    known = found.config.activation if found.config is not None else found.hints.activation
    if known and asked and known != asked:
        raise InputError(
            f"{found.path} was trained with {known} ({found.hints.source}); drop activation={asked}"
        )
    if known or asked:
        return []
    return [
        "the file does not say which activation it was trained with; quick_gelu is assumed, as in OpenAI's "
        f"models (open_clip's own trainings use gelu: pass activation=gelu, or write it into a file with "
        f"`clip-base convert {found.path} activation=gelu out=FILE`)"
    ]


def _find(path: Path) -> _Found:
    if path.is_dir():
        return _find_in_folder(path)
    _check_magic(path)
    if _is_pickle(path):
        return _from_pickle(path)
    weights, metadata = read_weights(path)
    form = metadata.get("format", "")
    if form == FORMAT:
        config = configs.check(CLIPConfig, sizes_in(metadata, "config", path), f"sizes in {path}")
        hints = infer_config.Hints(source="its metadata")
        return _Found(path, "clip_base", weights, hints, config, kind=maker(metadata))
    if form == TEXT_PREDICTOR:
        raise InputError(
            f"{path} was pretrained by predicting captions and has no text tower: `zeroshot` and `classify` "
            "take it, nothing that embeds texts does"
        )
    if form and form not in FRAMEWORKS:
        raise InputError(
            f"{path} holds {quote(form)}, no CLIP; `clip-base inspect {path}` shows what is in it"
        )
    state = key_names.strip(weights)
    known = formats.recognize(state, path)
    if known is not None:
        return _from_another(known, path)
    if CONFIG_KEY in metadata:
        config = configs.check(CLIPConfig, sizes_in(metadata, CONFIG_KEY, path), f"sizes in {path}")
        hints = infer_config.Hints(source="its metadata")
        return _Found(path, f"{_style(state)}, safetensors", key_names.to_ours(state), hints, config)
    form = f"{'training ' if len(state) and set(state) != set(weights) else ''}{_style(state)}, safetensors"
    return _Found(path, form, key_names.to_ours(state), _hints(path, state))


def _from_pickle(path: Path) -> _Found:
    if unpickle.is_torchscript(path):
        state = key_names.strip(unpickle.read_torchscript(path))
        hints = infer_config.Hints("quick_gelu", head_width=64, source="OpenAI's archives use it")
        return _Found(path, "OpenAI's TorchScript archive", key_names.to_ours(state), hints)
    content = unpickle.read_pickle(path)
    if isinstance(content, Tensor):
        other = formats.recognize(content, path)
        what = other.form if other is not None else f"one tensor of shape {list(content.shape)}"
        raise InputError(
            f"{path} holds {shortened(what)}, not a CLIP; `clip-base inspect {path}` shows what is in it"
        )
    state, wrapped = key_names.unwrap(content, path)
    known = formats.recognize(state, path)
    if known is not None:
        return _from_another(known, path)
    form = f"{'training checkpoint' if wrapped else 'state dict'}: {_style(state)}"
    return _Found(path, form, key_names.to_ours(state), _hints(path, state))


def _from_another(content: formats.Content, path: Path) -> _Found:
    """Returns the CLIP in a file of another package's form."""
    if content.clip is None:
        raise InputError(
            f"{path} is {content.form}, which has no complete CLIP; `clip-base inspect {path}` shows its "
            "parts"
        )
    hints = infer_config.Hints(content.activation, source=f"{content.form} has it")
    unused = tuple(f"not needed: {one}" for one in content.unused())
    return _Found(path, content.form, content.clip, hints, assumed=content.notes, unused=unused)


def _find_in_folder(folder: Path) -> _Found:
    name = next((name for name in _FOLDER_FILES if (folder / name).exists()), None)
    if name is None:
        raise InputError(
            f"folder {folder} holds none of {', '.join(_FOLDER_FILES)}; give the weights file itself"
        )
    if not name.endswith(".index.json"):
        return _find(folder / name)
    index = read_json(folder / name, "list of shards")
    shards = (
        sorted(set(index["weight_map"].values())) if isinstance(index, dict) and "weight_map" in index else []
    )
    if not shards or any(Path(shard).name != shard for shard in shards):
        raise InputError(f"{folder / name} lists no shards in its folder")
    state: dict[str, Tensor] = {}
    for shard in shards:
        state |= read_weights(folder / shard)[0]
    state = key_names.strip(state)
    form = f"{_style(state)}, {len(shards)} safetensors"
    return _Found(folder / name, form, key_names.to_ours(state), _hints(folder / name, state))


def _hints(path: Path, state: Mapping[str, Tensor]) -> infer_config.Hints:
    """Returns what the config beside a weights file says: Hugging Face's or open_clip's, by the names."""
    if key_names.is_huggingface(state):
        beside = path.with_name("config.json")
        return (
            infer_config.from_huggingface(read_json(beside), str(beside))
            if beside.exists()
            else infer_config.Hints()
        )
    beside = path.with_name(_OPEN_CLIP_CONFIG)
    return (
        infer_config.from_open_clip(read_json(beside), str(beside))
        if beside.exists()
        else infer_config.Hints()
    )


def _style(state: Mapping[str, Tensor]) -> str:
    if key_names.is_huggingface(state):
        return "Hugging Face CLIP"
    return (
        "clip_base names" if any(name.startswith("text.") for name in state) else "open_clip or OpenAI names"
    )


def read_foreign(path: Path) -> formats.Content | None:
    """Returns what a file of a form that another package declares holds; None for every other file.

    Raises:
        InputError: the file is damaged, or of such a form and not whole.
    """
    if path.is_dir():
        return None
    _check_magic(path)
    if _is_pickle(path):
        return None if unpickle.is_torchscript(path) else formats.recognize(formats.read(path), path)
    return formats.recognize(key_names.strip(read_weights(path)[0]), path)


def read_notes(path: Path) -> dict[str, str]:
    """Returns what a file says of its weights beside their sizes: see `save_clip`; {} for most files.

    Raises:
        InputError: the file is damaged.
    """
    if path.is_file() and is_safetensors(path):
        said = read_metadata(path)
        return {key: value for key, value in said.items() if key not in ("format", "config", CONFIG_KEY)}
    content = read_foreign(path)
    return {} if content is None else dict(content.metadata)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: with the length of a JSON object, and that object."""
    if path.is_dir():
        return False
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _is_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle or the archive of one does.

    So does one of 32 safetensors files: their first byte is the low one of the header's length.
    """
    if is_safetensors(path):
        return False
    with path.open("rb") as file:
        head = file.read(2)
    return head == b"PK" or head[:1] == b"\x80"


def _check_magic(path: Path) -> None:
    """Says what a file is when it is certainly no weights file."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise InputError(f"{path} is empty; copy it again")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if head.lstrip()[:1] == b"<" and not is_safetensors(path):  # whose first byte is a number
        raise InputError(
            f"{path} is a web page, not weights; the download gave an error page: fetch it again"
        )
