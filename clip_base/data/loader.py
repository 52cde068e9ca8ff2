"""Batches whose order depends only on seed and step, so that a run can resume at the next sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from clip_base.data.sampler import epoch_length, epoch_order
from clip_base.runtime import distributed
from clip_base.runtime.errors import InputError, JobError, quote
from clip_base.storage.files import read_log, write_text
from clip_base.storage.remote import RemoteError

Item = TypeVar("Item", covariant=True)
B = TypeVar("B")

Key = tuple[int, int]  # (index, turn)


class Items(Protocol[Item]):
    """What a Loader draws from."""

    def __len__(self) -> int:
        """The number of samples."""

    def item(self, index: int, generator: torch.Generator) -> Item:
        """Returns sample `index`; all chance comes from `generator`. An unusable sample raises InputError."""


class Loader(Generic[B]):
    """An endless, seekable stream of shuffled batches.

    Sample i of step s is position s · batch_size + i of the concatenated epochs' permutations, and its
    augmentation is seeded by (seed, epoch, index): nothing depends on workers or on what was drawn before.
    Where an epoch may show a sample more than once, the position takes the epoch's place in that seed.
    Of W processes each loads its own W-th of every batch: what they load together is one process's order.

    Args:
        items: the samples.
        collate: makes a batch of a list of samples.
        batch_size: samples a batch, of all processes together.
        seed: decides order and augmentation.
        workers: processes that load; 0: this one.
        skipped: a file to list unusable samples in; each is replaced by its neighbor. What it already lists
            counts, so that a resumed run ends with the same list.
        max_skipped: the share of unusable samples above which the run stops.
        weights: [N], how often an epoch shows each sample on average; None: once. See `epoch_order`.
        replacement: draw samples independently of each other instead of each once an epoch.
        order: returns [N] int64, all samples in the order of an epoch, whose chance comes from the generator;
            None: shuffled. Not together with `weights` or `replacement`.
    """

    def __init__(
        self,
        items: Items[Any],
        collate: Callable[[list[Any]], B],
        batch_size: int,
        *,
        seed: int = 0,
        workers: int = 0,
        skipped: Path | None = None,
        max_skipped: float = 0.1,
        weights: torch.Tensor | None = None,
        replacement: bool = False,
        order: Callable[[torch.Generator], torch.Tensor] | None = None,
    ) -> None:
        if not len(items):
            raise InputError("nothing to train on: the data has no usable sample")
        self.items, self.collate, self.batch_size = items, collate, batch_size
        self.seed, self.workers, self.max_skipped = seed, workers, max_skipped
        self.weights, self.replacement, self.order = weights, replacement, order
        self.epoch_length = epoch_length(len(items), weights)
        self.broken: dict[int, str] = {}
        self._skipped, self._step = None if skipped is None else distributed.own_file(skipped), 0
        if self._skipped is not None and self._skipped.exists():
            self._recall(self._skipped)

    def __len__(self) -> int:
        """The number of batches that make an epoch, rounded, at least one."""
        return max(round(self.epoch_length / self.batch_size), 1)

    def seek(self, step: int) -> None:
        """Makes the next iteration begin with the batch of `step`."""
        self._step = step

    def names(self, step: int) -> list[str]:
        """Returns what the samples of this process's batch of `step` are called: a name, or a number."""
        name = getattr(self.items, "name", str)
        return [name(index) for index, _ in next(self._keys(step))]

    def _keys(self, step: int) -> Iterator[list[Key]]:
        """Yields the keys of this process's share of one batch after another, from `step` on, for ever."""
        position, epoch, order = step * self.batch_size, -1, torch.empty(0, dtype=torch.int64)
        rows = distributed.share(self.batch_size)
        first = distributed.rank() * rows
        repeats = self.weights is not None or self.replacement
        while True:
            keys = []
            for place in range(position, position + self.batch_size):
                if place // self.epoch_length != epoch:
                    epoch = place // self.epoch_length
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    if self.order is not None:
                        order = self.order(generator)
                    else:
                        order = epoch_order(len(self.items), generator, self.weights, self.replacement)
                keys.append((int(order[place % self.epoch_length]), place if repeats else epoch))
            yield keys[first : first + rows]
            position += self.batch_size

    def __iter__(self) -> Iterator[B]:
        fetch = _Fetch(self.items, self.collate, self.seed)
        if self.workers == 0:
            batches: Any = map(fetch, self._keys(self._step))
        else:
            batches = DataLoader(
                _Positions(fetch),
                sampler=_Stream(self),
                batch_size=None,
                num_workers=self.workers,
                collate_fn=_as_it_is,
                # Without one of its own it would draw from the generator that the task draws from.
                generator=torch.Generator(),
            )
        for batch, broken in batches:
            self._note(broken)
            if isinstance(batch, InputError):
                raise batch
            self._step += 1
            yield batch

    def _recall(self, skipped: Path) -> None:
        whole = []
        for number, entry in enumerate(read_log(skipped, "list of skipped samples", ("sample", "reason")), 1):
            sample = entry["sample"]
            if not isinstance(sample, int) or not 0 <= sample < len(self.items):
                raise InputError(
                    f"list of skipped samples {skipped}, line {number}: there is no sample {quote(sample)}; "
                    "correct or delete that line"
                )
            self.broken[sample] = str(entry["reason"])
            whole.append(json.dumps(entry) + "\n")
        write_text(skipped, "".join(whole))

    def _note(self, broken: dict[int, str]) -> None:
        new = {index: reason for index, reason in broken.items() if index not in self.broken}
        if not new:
            return
        self.broken |= new
        if self._skipped is not None:
            lines = [json.dumps({"sample": i, "reason": reason}) + "\n" for i, reason in new.items()]
            with self._skipped.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        if len(self.broken) > max(self.max_skipped * len(self.items) / distributed.world(), 1):
            where = f"; all are listed in {self._skipped}" if self._skipped else ""
            share = f"{len(self.broken)} of {len(self.items)} samples are unusable"
            last = next(reversed(new.values()))
            raise JobError(
                f"{share}, more than train.max_skipped={self.max_skipped:g} allows; the last: {last}{where}"
            )


class _Fetch:
    """Makes a batch of a list of keys; picklable, so that it can run in another process.

    That no batch can be made is returned instead of raised: torch would prefix the message with a worker's
    traceback.
    """

    def __init__(self, items: Items[Any], collate: Callable[[list[Any]], Any], seed: int) -> None:
        self.items, self.collate, self.seed = items, collate, seed

    def __call__(self, keys: Sequence[Key]) -> tuple[Any, dict[int, str]]:
        broken: dict[int, str] = {}
        try:
            return self.collate([self._one(key, broken) for key in keys]), broken
        except InputError as error:
            return error, broken

    def _one(self, key: Key, broken: dict[int, str]) -> Any:
        index, turn = key
        for shift in range(min(100, len(self.items))):
            place = (index + shift) % len(self.items)
            seed = ((self.seed * 1_000_003 + turn) * 1_000_003 + index) % 2**63
            try:
                return self.items.item(place, torch.Generator().manual_seed(seed))
            except RemoteError:  # says nothing about the sample
                raise
            except InputError as error:
                broken[place] = str(error)
        last = next(reversed(broken.values()))
        raise JobError(f"{shift + 1} samples in a row are unusable; the last: {last}")


def _as_it_is(batch: Any) -> Any:
    return batch


class _Positions(Dataset[tuple[Any, dict[int, str]]]):
    """A map-style dataset for torch's DataLoader whose index is a list of keys."""

    def __init__(self, fetch: _Fetch) -> None:
        self.fetch = fetch

    def __getitem__(self, keys: Any) -> tuple[Any, dict[int, str]]:
        return self.fetch(keys)


class _Stream:
    def __init__(self, loader: Loader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[list[Key]]:
        return self.loader._keys(self.loader._step)
