"""One vocabulary for the teacher's concepts, the student's targets and the detector's classifier.

Names and the unit-length text embeddings that stand for them: to detect something else, swap the vocabulary.
"""

# C names, D embedding size, K prompt templates, N texts in a batch, T token positions
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clip_base.evaluation.prompts import (
    DEFAULT_TEMPLATES,
    TextEncoder,
    TextTokenizer,
    ensemble,
)
from clip_base.jobs.plugins import did_you_mean
from clip_base.runtime.errors import InputError, shortened
from clip_base.storage.files import existing
from clip_base.storage.hashing import content_hash
from clip_base.weights.native import open_safetensors, sizes_in, write_weights
from clip_base.weights.unpickle import read_pickle
from regionclip.data.categories import check_names

FORMAT = "regionclip.vocabulary"
VERSION = 1


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Names and their text embeddings.

    Attributes:
        names: C distinct names.
        embeddings: [C, D] float32, unit length.
        novel: [C] bool, which names training must not see boxes of; None when there is no such split.
        provenance: where the embeddings come from: a hash of the weights, the templates, a source file.
        negatives: [M, D] float32, unit length: what shares the probabilities with the names and is not
            reported, in place of generic names; None: there is nothing of the kind.
    """

    names: tuple[str, ...]
    embeddings: Tensor
    novel: Tensor | None = None
    provenance: dict[str, str] = field(default_factory=dict)
    negatives: Tensor | None = None

    def __post_init__(self) -> None:
        """Checks names, shapes, types and lengths."""
        if self.embeddings.ndim != 2 or len(self.embeddings) != len(self.names):
            raise ValueError(f"embeddings must be [{len(self.names)}, D], got {list(self.embeddings.shape)}")
        if self.novel is not None and (
            self.novel.shape != (len(self.names),) or self.novel.dtype != torch.bool
        ):
            raise ValueError(f"novel must be bool [{len(self.names)}], got {list(self.novel.shape)}")
        if self.negatives is not None and self.negatives.shape != (len(self.negatives), self.width):
            raise ValueError(f"negatives must be [M, {self.width}], got {list(self.negatives.shape)}")
        if self.embeddings.dtype != torch.float32:
            raise ValueError(f"embeddings must be float32, got {self.embeddings.dtype}")
        check_names(self.names)
        lengths = self.embeddings.norm(dim=1)
        off = ((lengths - 1).abs() < 1e-3).logical_not().nonzero().flatten().tolist()
        if off:
            raise ValueError(
                f"the embedding of {self.names[off[0]]!r} has length {lengths[off[0]]:.4g}, not 1"
            )

    def __len__(self) -> int:
        """Returns C."""
        return len(self.names)

    @property
    def width(self) -> int:
        """D, the embedding size."""
        return self.embeddings.shape[1]

    @property
    def fingerprint(self) -> str:
        """sha256 over names, embeddings and which are novel: equal for equal vocabularies."""
        digest = hashlib.sha256(json.dumps(self.names).encode())
        digest.update(_bytes(self.embeddings))
        for further in (self.novel, self.negatives):
            if further is not None:
                digest.update(_bytes(further))
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Vocabulary:
        """Returns the same vocabulary on `device`."""
        novel = None if self.novel is None else self.novel.to(device)
        negatives = None if self.negatives is None else self.negatives.to(device)
        return Vocabulary(self.names, self.embeddings.to(device), novel, self.provenance, negatives)

    def index(self, name: str) -> int:
        """Returns the row of `name`; an unknown one is an InputError that names the nearest."""
        try:
            return self.names.index(name)
        except ValueError:
            raise InputError(f"{name!r} is not in the vocabulary; {self._hint(name)}") from None

    def subset(self, names: Sequence[str]) -> Vocabulary:
        """Returns the vocabulary of `names` alone, in their order; an unknown one is an InputError."""
        rows = {name: row for row, name in enumerate(self.names)}
        missing = [name for name in names if name not in rows]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(names)} names are not in the vocabulary, first {missing[0]!r}; "
                f"{self._hint(missing[0])}"
            )
        chosen = torch.tensor(
            [rows[name] for name in names], dtype=torch.int64, device=self.embeddings.device
        )
        novel = None if self.novel is None else self.novel[chosen]
        embeddings, provenance = self.embeddings[chosen], dict(self.provenance)
        return Vocabulary(tuple(names), embeddings, novel, provenance, self.negatives)

    def require_width(self, width: int, path: str | Path = "") -> None:
        """Raises an InputError unless the embeddings have `width` numbers.

        Args:
            width: the model's embedding size.
            path: the weights' or the vocabulary's file, for the message.
        """
        if self.width != width:
            which = f"vocabulary ({path})" if path else "vocabulary"
            raise InputError(
                f"the {which} has embeddings of width {self.width}, the model {width}; give names instead, "
                "or a vocabulary made with the same model"
            )

    def save(self, path: str | Path) -> None:
        """Writes the embeddings, and the rest as JSON in the file's metadata. Atomic.

        Raises:
            InputError: `path` does not end in `.safetensors`.
        """
        if Path(path).suffix != ".safetensors":
            raise InputError(f"a vocabulary is written as .safetensors, {path} ends otherwise")
        tensors = {"embeddings": self.embeddings.cpu().contiguous()}
        if self.novel is not None:
            tensors["novel"] = self.novel.cpu().contiguous()
        if self.negatives is not None:
            tensors["negatives"] = self.negatives.cpu().contiguous()
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "names": json.dumps(self.names, ensure_ascii=False),
            "provenance": json.dumps(self.provenance, ensure_ascii=False),
        }
        write_weights(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path, names: Sequence[str] | None = None) -> Vocabulary:
        """Reads a vocabulary.

        Args:
            path: our `.safetensors`; RegionCLIP's `.pth`, a pickled tensor; Detic's `.npy`. The last two are
                [C, D] or [D, C] of any float type and carry no names.
            names: for `.pth` and `.npy` the names of the rows in order; for `.safetensors` the names to take.

        Raises:
            InputError: missing, cut off or foreign file; names missing or not as many as embeddings.
        """
        path = existing(path, "vocabulary")
        if path.suffix == ".safetensors":
            vocabulary = _load_safetensors(path)
            return vocabulary if names is None else vocabulary.subset(names)
        if path.suffix == ".npy":
            matrix = _load_npy(path)
        elif path.suffix in (".pth", ".pt"):
            matrix = _load_pth(path)
        else:
            raise InputError(f"vocabulary {path} is of an unknown kind; give .safetensors, .pth or .npy")
        if names is None:
            raise InputError(f"vocabulary {path} holds no names; give the list of its names with it")
        embeddings = _unit(_rows_are_names(matrix, len(names), path).float(), names, str(path))
        return cls(tuple(names), embeddings, None, {"source": path.name, "sha256": content_hash(path)})

    @classmethod
    def from_regions(cls, regions: Mapping[str, Tensor], others: Tensor | None = None) -> Vocabulary:
        """Returns what looks for things that were shown instead of named: one-shot search.

            mug = predictor.region_features("desk.jpg", [[210, 90, 330, 240]])
            predictor.set_vocabulary(Vocabulary.from_regions({"my mug": mug}, others))

        Args:
            regions: for each name the [n, D] embeddings of regions that show it, whose directions are
                averaged; from `Predictor.region_features`.
            others: [M, D] embeddings of regions that show something else. A softmax over one name gives it a
                probability of 1 everywhere, and words are far from all regions: without others the scores
                only rank.

        Raises:
            InputError: no regions, or an embedding without a direction.
        """
        lacking = next((name for name, rows in regions.items() if rows.ndim != 2 or not len(rows)), None)
        if lacking is not None or not regions:
            raise InputError(f"from_regions needs [n, D] embeddings for each name, {lacking!r} has none")
        names = list(regions)
        means = [
            _unit(rows.float().cpu(), [name] * len(rows), "a region").mean(0)
            for name, rows in regions.items()
        ]
        embeddings = _unit(torch.stack(means), names, "the mean of regions")
        if others is None:
            others = embeddings.new_zeros(0, embeddings.shape[1])
        beside = _unit(others.float().cpu(), ["something else"] * len(others), "a region")
        return cls(tuple(names), embeddings, None, {"source": "regions"}, beside)

    def _hint(self, name: str) -> str:
        return did_you_mean(name, list(self.names)) if len(self) <= 50 else _closest(name, self.names)


def embed(
    model: TextEncoder,
    tokenizer: TextTokenizer,
    names: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    novel: Tensor | None = None,
    batch_size: int = 256,
    cache: Path | None = None,
) -> Vocabulary:
    """Embeds names by a prompt ensemble (`clip_base.evaluation.prompts.ensemble`).

    Args:
        model: gives [N, D] for tokens [N, T]; put into evaluation mode meanwhile.
        tokenizer: makes int64 [N, T] of texts; texts that are too long are cut.
        names: C distinct names; underscores are read as spaces.
        templates: K prompts with `{}` where the name goes, and `{article}` where "a" or "an" should stand.
        novel: [C] bool, kept with the names.
        batch_size: texts that are encoded at once.
        cache: a folder for the embeddings of the same weights, templates and names.

    Raises:
        InputError: no name, repeated names, a template without `{}`.
    """
    check_names(names)
    provenance = {
        "weights": weights_hash(model),
        "templates": json.dumps(list(templates), ensure_ascii=False),
    }
    key = hashlib.sha256(json.dumps([VERSION, provenance, list(names)]).encode()).hexdigest()[:32]
    file = None if cache is None else Path(cache) / f"{key}.safetensors"
    if file is not None and file.exists():
        vocabulary = _load_safetensors(file)
    else:
        embeddings = _unit(
            ensemble(model, tokenizer, names, templates, batch_size), names, "the text encoder"
        )
        vocabulary = Vocabulary(tuple(names), embeddings, None, provenance)
        if file is not None:
            vocabulary.save(file)
    return (
        vocabulary
        if novel is None
        else Vocabulary(vocabulary.names, vocabulary.embeddings, novel, provenance)
    )


def weights_hash(model: TextEncoder) -> str:
    """Returns a sha256 over a model's weights, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _unit(embeddings: Tensor, names: Sequence[str], source: str) -> Tensor:
    """Returns [C, D] embeddings at length 1.

    Raises:
        InputError: a row has no direction; its name is told.
    """
    lengths = embeddings.norm(dim=1, keepdim=True)
    bad = (~(lengths.isfinite() & (lengths > 1e-6))).flatten().nonzero().flatten().tolist()
    if bad:
        raise InputError(
            f"{source} gives {names[bad[0]]!r} an embedding of zeros or NaN; is the file or the model "
            "damaged?"
        )
    unit: Tensor = embeddings / lengths
    return unit


def _load_safetensors(path: Path) -> Vocabulary:
    with open_safetensors(path, "vocabulary") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if metadata.get("format") != FORMAT or "embeddings" not in tensors:
        raise InputError(
            f"{path} is not a vocabulary (its tensors: {', '.join(list(tensors)[:3])}, …); are these weights?"
        )
    if metadata.get("version") != str(VERSION):
        raise InputError(
            f"vocabulary {path} is of format version {shortened(str(metadata.get('version')))}, "
            f"this program reads {VERSION}; make it again"
        )
    names, provenance = (sizes_in(metadata, key, path) for key in ("names", "provenance"))
    if not isinstance(names, list) or not isinstance(provenance, dict):
        raise InputError(f"vocabulary {path} is damaged: its names are no list; make it again")
    further = tensors.get("novel"), provenance, tensors.get("negatives")
    try:
        return Vocabulary(tuple(map(str, names)), tensors["embeddings"], *further)
    except ValueError as error:
        reason = shortened(str(error), 200)
        raise InputError(f"vocabulary {path} is damaged: {reason}; make it again") from None


def _load_npy(path: Path) -> Tensor:
    try:
        # Mapped, so that a size which the file only declares is not allocated.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header is Python's syntax, and may declare any size
        reason = shortened(" ".join(str(error).split()) or type(error).__name__, 200)
        raise InputError(f"vocabulary {path} is not a complete .npy file: {reason}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        found = shortened(str(getattr(array, "dtype", type(array).__name__)))
        raise InputError(f"vocabulary {path} must hold floats, found {found}")
    return torch.from_numpy(array.astype(np.float32))


def _load_pth(path: Path) -> Tensor:
    try:
        loaded = read_pickle(path)
    except InputError as error:
        raise InputError(f"vocabulary {path} is not a pickled tensor ({error})") from None
    if not isinstance(loaded, Tensor) or not loaded.is_floating_point():
        raise InputError(f"vocabulary {path} must hold one float tensor, found {type(loaded).__name__}")
    return loaded.detach()


def _rows_are_names(matrix: Tensor, count: int, path: Path) -> Tensor:
    if matrix.ndim == 2 and matrix.shape[0] == count:
        return matrix
    if matrix.ndim == 2 and matrix.shape[1] == count:
        return matrix.T.contiguous()
    raise InputError(
        f"vocabulary {path} is {list(matrix.shape)}, which does not match {count} names; give the list that "
        "belongs to it"
    )


def _closest(name: str, names: Sequence[str]) -> str:
    hint = did_you_mean(name, list(names))
    return hint if hint.startswith("did you mean") else f"it holds {len(names)} others"


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""
