"""The whole path on a generated dataset."""
