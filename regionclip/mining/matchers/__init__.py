"""Who belongs to whom: which regions of an image show which concepts."""
