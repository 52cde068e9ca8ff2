"""Boxes, regions, transforms, detections, drawing."""
