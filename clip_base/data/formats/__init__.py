"""Annotations in other formats, converted to COCO's format: group `clip_base.annotation_formats`."""
