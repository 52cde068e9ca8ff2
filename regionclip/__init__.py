"""Regions of images and their names: mining, pretraining, open-vocabulary detection."""
