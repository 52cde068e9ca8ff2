"""Weights formats of other packages, found by entry point.

    [project.entry-points."clip_base.formats"]
    regionclip = "regionclip.checkpoints.convert:content_with_readers"

A form is a function of what a file holds, a state dict or one tensor, and of the file's path. It returns what
each tensor is for, None when the file is not of its form, and raises an `InputError` when a file of its form
has unknown tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from clip_base.jobs import plugins
from clip_base.weights import key_names, unpickle

GROUP = "clip_base.formats"
# How `convert` writes forms of other packages: a function of the file and of where to write, which returns
# what it wrote, in words.
WRITERS = "clip_base.writers"
Writer = Callable[[Path, Path], str]
# The same in the other direction; its third argument is the CLIP whose text tower goes along, or "".
Reader = Callable[[Path, Path, str], str]


@dataclass(frozen=True)
class Group:
    """Tensors of a file that serve one purpose.

    Attributes:
        name: what they are, in a few words.
        purpose: what they are used for here, or why they are not needed.
        used: whether something here uses them.
        state: the tensors by the names that their user wants; of unused ones, by the file's names.
    """

    name: str
    purpose: str
    used: bool
    state: dict[str, Tensor]

    @property
    def numbers(self) -> int:
        """How many numbers its tensors hold."""
        return sum(value.numel() for value in self.state.values())


@dataclass(frozen=True)
class Content:
    """What a file of another package's form holds; every tensor of it is in one of the groups.

    Attributes:
        form: the form, in words.
        groups: its tensors by purpose.
        clip: a whole CLIP by our names; None when the file holds none.
        activation: of that CLIP.
        notes: what the file does not say and was assumed.
        check: a function of this and the path that raises an `InputError` when the tensors do not fit.
        native: writes that in our form, when it is more than a CLIP.
        metadata: what is known of the weights, as the metadata of our own files says it.
    """

    form: str
    groups: tuple[Group, ...]
    clip: dict[str, Tensor] | None = None
    activation: str = ""
    notes: tuple[str, ...] = ()
    check: Callable[[Content, Path], None] | None = None
    native: Reader | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def unused(self) -> tuple[str, ...]:
        """Returns a sentence for each group that nothing here uses."""
        return tuple(
            f"{group.name} ({len(group.state)} tensors): {group.purpose}"
            for group in self.groups
            if not group.used
        )


Recognizer = Callable[[Mapping[str, Tensor] | Tensor, Path], Content | None]


def recognize(content: Mapping[str, Tensor] | Tensor, path: Path) -> Content | None:
    """Returns what a file holds when one of the declared forms knows it."""
    for name in plugins.found(GROUP):
        form: Recognizer = plugins.load(GROUP, name)
        found = form(content, path)
        if found is not None:
            return found
    return None


def read(path: Path) -> dict[str, Tensor] | Tensor:
    """Returns the one tensor or the state dict that a pickled file holds, without wrappers.

    Raises:
        InputError: the file is damaged or holds something else.
    """
    content = unpickle.read_pickle(path)
    return content if isinstance(content, Tensor) else key_names.unwrap(content, path)[0]


def group_of(content: Content, name: str) -> dict[str, Tensor]:
    """Returns the tensors of the group called `name`; none when the file has no such group."""
    return next((group.state for group in content.groups if group.name == name), {})
