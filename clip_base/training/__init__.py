"""The training loop, contrastive pretraining and its losses."""
