"""Which rank holds and does what: layouts of heads, tokens and gradients, and the CPU platform."""

import megatron_hydra.parallel.platform  # noqa: F401  (before any module here imports megatron)
