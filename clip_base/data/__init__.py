"""Sources of image-text pairs, COCO files, annotation formats, batches and the data loader."""
