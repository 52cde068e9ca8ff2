"""The files of RegionCLIP's model zoo by name, with the folders that its scripts expect them in.

The names are those in `docs/MODEL_ZOO.md` and the scripts of github.com/microsoft/RegionCLIP. The files lie
in one shared folder that browsers open and programs do not; sizes and checksums are not published.
"""

from __future__ import annotations

from clip_base.weights.fetching.published import Published

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
