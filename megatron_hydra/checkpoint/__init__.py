"""Checkpoints: the canonical state dict, how it is stored, and how Hugging Face names map to it."""
