"""The verbs: forward step and loss of each stage."""

import megatron_hydra.parallel.platform  # noqa: F401  (before any module here imports megatron)
