"""Average precision, recall, and matching to ground truth."""
