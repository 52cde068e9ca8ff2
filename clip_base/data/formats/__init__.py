"""Annotations in other formats, brought into COCO's format: group `clip_base.annotation_formats`."""
