"""Parallelism: distribution of heads, tokens and gradients over ranks, and the CPU platform."""

import megatron_hydra.parallel.platform  # noqa: F401  (before any module here imports megatron)
