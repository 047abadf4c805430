"""Checkpoints: the canonical state dict, its storage and its verification."""
