"""Checkpoints: the canonical state dict, and how it is stored and checked."""
