"""Zero-shot classification, retrieval and linear probe, with their prompts and datasets."""
