"""A third party's plugin: one job and one proposer."""
