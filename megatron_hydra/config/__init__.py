"""Typed configuration: what a model is (``model``), what a run does (``run``), and ``loading``."""

from megatron_hydra.config.loading import (
    apply_overrides,
    from_dict,
    load_run_config,
    to_dict,
    to_yaml,
)
from megatron_hydra.config.model import HydraConfig, ModelConfig
from megatron_hydra.config.run import RunConfig

__all__ = [
    "HydraConfig",
    "ModelConfig",
    "RunConfig",
    "apply_overrides",
    "from_dict",
    "load_run_config",
    "to_dict",
    "to_yaml",
]
