"""The training loop on Megatron-Core for all verbs: set-up, step, checkpoints, metrics, stops, faults."""

import megatron_hydra.parallel.platform  # noqa: F401  (before any module here imports megatron)
