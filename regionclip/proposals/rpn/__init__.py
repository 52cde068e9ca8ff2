"""The region proposal network."""
