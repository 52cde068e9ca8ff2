"""What a CLIP can do without training on the task: zero-shot classification and its prompts."""
