"""The HydraHead layer as a Megatron-Core spec: FA branch, GDN branch, fusion."""

import megatron_hydra.parallel.platform  # noqa: F401  (before any module here imports megatron)
