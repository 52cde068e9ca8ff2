"""The files of RegionCLIP's model zoo by name, with the folders that its scripts expect them in.

The names are those in `docs/MODEL_ZOO.md` and the scripts of github.com/microsoft/RegionCLIP. The files lie
in one shared Google Drive folder; sizes and checksums are not published.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from clip_base.runtime.errors import InputError
from clip_base.storage.remote_cache import cache_folder
from clip_base.weights.fetching import download
from clip_base.weights.fetching.published import MIB, Published
from regionclip.data.categories import parse_names

PAGE = "https://drive.google.com/drive/folders/1hzrJBvcCrahoRcqJRqzkIGFO_HUSJIii"

_TOWERS = ("rn50", "rn50x4")
_REGIONCLIP = (
    *(f"regionclip_pretrained-cc_{tower}" for tower in _TOWERS),
    *(f"regionclip_finetuned-{data}_{tower}" for data in ("coco", "lvis") for tower in _TOWERS),
)
_RPN = (
    "rpn_coco_48",
    "rpn_coco_65",
    "rpn_coco_80",
    "rpn_lvis_866",
    "rpn_lvis_866_lsj",
    "rpn_lvis_1203_clipbackbone",
)
_CONCEPTS = (
    "coco_48_base_cls_emb",
    "coco_17_target_cls_emb",
    "coco_65_cls_emb",
    "coco_nouns_4764_emb",
    "lvis_866_base_cls_emb",
    "lvis_1203_cls_emb",
)
_CLIP = ("teacher_RN50_student_RN50_OAI_CLIP", "teacher_RN50x4_student_RN50x4_OAI_CLIP")


def _files(folder: str, names: tuple[str, ...]) -> dict[str, Published]:
    return {name: Published(f"{folder}/{name}.pth", page=PAGE) for name in names}


FILES: dict[str, Published] = {
    **_files("regionclip", _REGIONCLIP),
    **_files("rpn", _RPN),
    **_files("concept_emb", _CONCEPTS + tuple(f"{name}_rn50x4" for name in _CONCEPTS)),
    **_files("clip", _CLIP),
}

# What `detect` takes when no weights are given: the detector of COCO's 48 base classes.
DETECTOR = "regionclip_finetuned-coco_rn50"
# The CLIPs whose text towers embed names for the detectors, which have none.
_TEXT_TOWERS = {
    f"regionclip_finetuned-{data}_{tower}": clip
    for data in ("coco", "lvis")
    for tower, clip in (("rn50", "RN50"), ("rn50x4", "RN50x4"))
}


def text_tower(weights: str, names: Sequence[str]) -> str:
    """Returns the CLIP that embeds names for a published detector; "" where none is needed.

    Args:
        weights: a published name, or any other weights, which need none.
        names: what is looked for; COCO's detectors bring the embeddings of its 65 classes along.
    """
    known = weights.startswith("regionclip_finetuned-coco") and set(names) <= set(parse_names("coco65"))
    return "" if known else _TEXT_TOWERS.get(weights, "")


def fetch_detector(weights: str, text_weights: str) -> None:
    """Fetches a published detector that is not in the cache; says what it is, how large, and where it goes.

    Args:
        weights: one of the published detectors; of other weights nothing is fetched here.
        text_weights: its text tower; "" for none.

    Raises:
        InputError: it cannot be fetched; what to do then, for all that is missing.
    """
    known, folder = download.files(), cache_folder()
    wanted = [weights, text_weights] if weights in _TEXT_TOWERS and not Path(weights).exists() else []
    missing = [name for name in wanted if name in known and known[name].kept_in(folder) is None]
    if not missing:
        return
    told = " and ".join(f"{name} ({_size(known[name])})" for name in missing)
    print(f"downloading {told} to {folder}, once", file=sys.stderr, flush=True)
    failed = []
    for name in missing:
        try:
            download.fetch(name)
        except InputError as error:
            failed.append(str(error))
    if failed:
        raise InputError(f"the published detector is missing: give weights=FILE, or {' | '.join(failed)}")


def _size(file: Published) -> str:
    return f"{file.size / MIB:,.0f} MiB" if file.size else "of a size that Drive tells when it begins"
