"""Annotations in other formats, brought into COCO's form: group `clip_base.annotation_formats`."""
