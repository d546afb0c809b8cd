"""LLaDA checkpoints in their published layout: config.json and the table of tensors."""
