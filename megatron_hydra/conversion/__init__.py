"""Hugging Face ⇄ Megatron, and making the student: names, configs, weights, start values, calibration."""
