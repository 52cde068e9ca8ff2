"""Pseudo region-phrase pairs from captioned images."""
