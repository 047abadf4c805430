"""The verbs (stages): forward step and loss of each."""

import megatron_hydra.parallel.platform  # noqa: F401  (before any module here imports megatron)
