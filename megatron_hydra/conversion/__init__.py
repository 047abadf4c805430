"""Hugging Face ⇄ Megatron, and the student's making: names, configs, weights, start values, calibration."""
