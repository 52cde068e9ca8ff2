"""The quickstart: all jobs on a synthetic dataset."""
