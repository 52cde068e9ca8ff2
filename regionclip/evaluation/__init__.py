"""Evaluation of detections on base and novel categories."""
