"""One loop over Megatron-Core for every verb: set-up, step, checkpoints, metrics, stops, faults."""

import megatron_hydra.parallel.platform  # noqa: F401  (before any module here imports megatron)
