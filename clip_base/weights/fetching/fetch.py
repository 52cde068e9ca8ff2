"""The job `fetch`: weights by name or address into the cache, and the list of the names.

clip-base fetch RN50 hf://laion/CLIP-ViT-B-32-laion2B-s34B-b79K
clip-base fetch --list
"""

from __future__ import annotations

from dataclasses import dataclass

from clip_base.jobs.config import option
from clip_base.jobs.everyday import everyday
from clip_base.runtime.errors import InputError, JobError
from clip_base.storage.remote_cache import cache_folder
from clip_base.weights.fetching import download, hub
from clip_base.weights.fetching.published import MIB
from clip_base.weights.load import find

Names = list[str]  # in the class below, `list` is an option


@everyday(
    "fetch RN50 hf://laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    input="names",
    output="list",
)
@dataclass
class FetchConfig:
    """Options of `fetch`."""

    names: Names = option(
        [],
        "published names, open_clip's MODEL/PRETRAINED, hf://owner/name[@revision][/file]",
        positional=True,
    )
    list: bool = option(False, "list the names, with sizes and which are in the cache")

    def __post_init__(self) -> None:
        if bool(self.names) == self.list:
            raise InputError("give the names of weights to fetch, or --list")


def fetch(config: FetchConfig) -> None:
    """Fetches published weights into the cache, checks them, and prints where they are."""
    if config.list:
        _print_names()
        return
    failed = []
    for name in config.names:
        try:
            print(f"{name}: {find(name)}", flush=True)
        except InputError as error:
            failed.append(str(error))
    if failed:
        raise JobError(" | ".join(failed) if len(failed) < 3 else f"{len(failed)} failed, first {failed[0]}")


def _print_names() -> None:
    folder = cache_folder()
    rows = [("name", "MiB", "here", "from")]
    pages: dict[str, None] = {}
    for name, file in download.files().items():
        size = f"{file.size / MIB:,.0f}" if file.size else "?"
        if file.page:
            pages[file.page] = None
        origin = "a folder of Google Drive" if file.page else file.url.split("/")[2]
        rows.append((name, size, "yes" if file.kept_in(folder) else "", origin))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, size, place, origin in rows:
        print(f"{name:<{widths[0]}}  {size:>{widths[1]}}  {place:<{widths[2]}}  {origin}")
    for page in pages:
        print(f"the folder of Google Drive:\n    {page}")
    print("\nopen_clip's names, and where they are on the hub")
    for name, place in hub.open_clip_table().items():
        print(f"{name}\n    {hub.SCHEME}{place}")
    print(f"\nthe cache is {folder};\nwhat comes from the hub is in that of huggingface_hub")
