"""An index of images: their unit-length embeddings in half precision, memory-mapped, searched exactly."""

# N images of an index, n of a shard, D embedding size
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_base.runtime.errors import InputError, quote
from clip_base.storage.files import existing, read_json, write_json
from clip_base.weights.native import open_safetensors, write_weights

ABOUT, FORMAT, VERSION = "index.json", "clip_base.index", 1
SHARD_ROWS = 8192


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Attributes:
        key: what the image was added as: its path, or `TAR/MEMBER`.
        score: cosine with the query, in [-1, 1].
    """

    key: str
    score: float


@dataclass
class Shard:
    """Some images of an index.

    Attributes:
        keys: n names.
        stamps: n texts that change with the images' files; "" where they are not checked.
        vectors: [n, D] float16, unit length.
        file: where it is kept; None: not yet.
    """

    keys: list[str]
    stamps: list[str]
    vectors: Tensor
    file: Path | None = None


@dataclass
class Index:
    """Images by what a CLIP sees in them.

        index = Index(1024, model="RN50")
        index.add(["a.jpg", "b.jpg"], vectors)
        index.save("my.index")
        Index.load("my.index").search(text_vector, k=10)

    Attributes:
        width: D, the embedding size.
        model: the weights that made the vectors, as their user names them.
        weights_hash: of those weights; "" if they are not compared.
        shards: in the order in which they were added.
    """

    width: int
    model: str = ""
    weights_hash: str = ""
    shards: list[Shard] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(shard.keys) for shard in self.shards)

    @property
    def keys(self) -> Iterator[str]:
        """The images' names, in order."""
        return (key for shard in self.shards for key in shard.keys)

    def add(self, keys: Sequence[str], vectors: Tensor, stamps: Sequence[str] = ()) -> None:
        """Adds images.

        Args:
            keys: n names; an existing name stands for another image of that name.
            vectors: [n, D], of any length above 0.
            stamps: n texts, see `Shard`.

        Raises:
            ValueError: vectors of another number or width.
            InputError: a vector is not finite, or has length 0.
        """
        if vectors.shape != (len(keys), self.width):
            raise ValueError(
                f"vectors must be [{len(keys)}, {self.width}], one for each key, got {list(vectors.shape)}"
            )
        vectors = vectors.detach().float().cpu()
        lengths = vectors.norm(dim=1)
        bad = (~(lengths.isfinite() & (lengths > 0))).nonzero().flatten().tolist()
        if bad:
            raise InputError(f"the embedding of {keys[bad[0]]} is zero or not finite")
        units = F.normalize(vectors, dim=1).half()
        stamps = list(stamps) or [""] * len(keys)
        for start in range(0, len(keys), SHARD_ROWS):
            part = slice(start, start + SHARD_ROWS)
            self.shards.append(Shard(list(keys[part]), list(stamps[part]), units[part]))

    def search(self, query: Tensor, k: int = 10) -> list[Hit]:
        """Returns the k images that are nearest to a query by cosine, best first.

        Args:
            query: [D], of any length above 0.
            k: how many; all when there are fewer.

        Raises:
            ValueError: a query of another width, or k below 1.
        """
        if query.shape != (self.width,) or k < 1:
            raise ValueError(f"query must be [{self.width}] and k above 0, got {list(query.shape)} and {k}")
        unit = F.normalize(query.detach().float().cpu(), dim=0).half()
        best: list[tuple[float, int, Shard]] = []
        for shard in self.shards:
            scores = (shard.vectors @ unit).float()  # [n]
            values, rows = scores.topk(min(k, len(scores)))
            pairs = zip(values.tolist(), rows.tolist(), strict=True)
            best = sorted(best + [(*pair, shard) for pair in pairs], key=lambda one: -one[0])[:k]
        return [Hit(shard.keys[row], score) for score, row, shard in best]

    def duplicates(self, threshold: float) -> Iterator[tuple[str, str, float]]:
        """Yields pairs of images whose cosine is at least `threshold`, in the order of the index."""
        for place, shard in enumerate(self.shards):
            for start in range(0, len(shard.keys), 1024):
                rows = shard.vectors[start : start + 1024].float()  # [b, D]
                for other in self.shards[place:]:
                    scores = rows @ other.vectors.float().T  # [b, n]
                    if other is shard:
                        scores = scores.triu(start + 1)
                    for row, column in (scores >= threshold).nonzero().tolist():
                        yield shard.keys[start + row], other.keys[column], float(scores[row, column])

    def keep(self, stamps: dict[str, str]) -> int:
        """Drops the images that `stamps` (key -> stamp) lacks or has another one of; returns how many."""
        dropped, kept = 0, []
        for shard in self.shards:
            rows = [
                row
                for row, (key, stamp) in enumerate(zip(shard.keys, shard.stamps, strict=True))
                if stamps.get(key) == stamp
            ]
            dropped += len(shard.keys) - len(rows)
            if len(rows) < len(shard.keys):
                vectors = shard.vectors[rows].clone()
                shard = Shard([shard.keys[r] for r in rows], [shard.stamps[r] for r in rows], vectors)
            if rows:
                kept.append(shard)
        self.shards = kept
        return dropped

    def save(self, path: str | Path) -> None:
        """Writes what is new to a folder; a kill leaves it with whole shards.

        Raises:
            InputError: the folder holds another index, or something else.
        """
        folder = Path(path)
        self._require_own(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"format": FORMAT, "version": VERSION, "width": self.width, "model": self.model}
        write_json(folder / ABOUT, {**about, "weights_hash": self.weights_hash}, indent=2)
        number = 1 + max((int(file.stem.split("-")[1]) for file in _files(folder)), default=-1)
        for shard in self.shards:
            if shard.file is None:
                shard.file = folder / f"shard-{number:06d}.safetensors"
                number += 1
                metadata = {"keys": json.dumps(shard.keys), "stamps": json.dumps(shard.stamps)}
                write_weights(shard.file, {"vectors": shard.vectors.contiguous()}, metadata)
        # After the new ones: an image that moves between shards is then here twice, never nowhere.
        mine = {shard.file for shard in self.shards}
        for file in _files(folder):
            if file not in mine:
                file.unlink()

    def _require_own(self, folder: Path) -> None:
        if folder.is_file() or (folder.exists() and any(folder.iterdir()) and not (folder / ABOUT).exists()):
            raise InputError(f"{folder} already exists and is no index; give another out=")
        if (folder / ABOUT).exists():
            _about(folder).require_model(self.weights_hash, str(folder))

    def require_model(self, weights_hash: str, where: str) -> None:
        """Raises an InputError when these are not the weights that made the vectors; "" is not known."""
        if self.weights_hash and weights_hash and self.weights_hash != weights_hash:
            raise InputError(
                f"{where} is an index of another model ({self.model or 'unnamed'}): its embeddings and those "
                "of these weights cannot be compared; give the same weights, or make another index"
            )

    @classmethod
    def load(cls, path: str | Path) -> Index:
        """Opens an index; vectors are read when they are searched.

        Raises:
            InputError: there is no index, or it is damaged or of another version.
        """
        folder = existing(path, "index")
        index = _about(folder)
        index.shards = [_read_shard(file, index.width) for file in _files(folder)]
        # A kill between writing and deleting leaves an image in two shards; the later one counts.
        if len(set(index.keys)) < len(index):
            index._drop_repeated()
        return index

    def _drop_repeated(self) -> None:
        seen: set[str] = set()
        for place, shard in reversed(list(enumerate(self.shards))):
            rows = [row for row, key in enumerate(shard.keys) if key not in seen]
            seen.update(shard.keys)
            if len(rows) < len(shard.keys):
                keys, stamps = ([column[row] for row in rows] for column in (shard.keys, shard.stamps))
                self.shards[place] = Shard(keys, stamps, shard.vectors[rows].clone())
        self.shards = [shard for shard in self.shards if shard.keys]


def _about(folder: Path) -> Index:
    """Returns the index of a folder without its images."""
    if not (folder / ABOUT).is_file():
        raise InputError(f"{folder} is no index; `clip-base index` makes one")
    about = read_json(folder / ABOUT, "index")
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise InputError(f"{folder / ABOUT} does not describe an index")
    if about.get("version") != VERSION:
        raise InputError(
            f"{folder} is of version {quote(about.get('version'))}, this program reads {VERSION}"
        )
    width, model, weights = (about.get(key) for key in ("width", "model", "weights_hash"))
    if not isinstance(width, int) or width < 1 or not isinstance(model, str) or not isinstance(weights, str):
        raise InputError(f"{folder / ABOUT} is damaged: its width, model or weights_hash; index again")
    return Index(width, model, weights)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


def _read_shard(file: Path, width: int) -> Shard:
    try:
        with open_safetensors(file, "index file") as opened:
            metadata = opened.metadata() or {}
            vectors = opened.get_tensor("vectors")
        keys, stamps = json.loads(metadata["keys"]), json.loads(metadata["stamps"])
        if not all(isinstance(one, list) and all(isinstance(t, str) for t in one) for one in (keys, stamps)):
            raise ValueError("its names are no texts")
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(f"index file {file} is damaged ({error}); delete it and index again") from None
    if vectors.shape != (len(keys), width) or len(stamps) != len(keys) or vectors.dtype != torch.float16:
        raise InputError(f"index file {file} is damaged: its names and vectors do not fit; index again")
    return Shard(keys, stamps, vectors, file)
