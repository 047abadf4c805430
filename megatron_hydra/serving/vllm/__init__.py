"""The vLLM plug-in: with this package installed, ``vllm serve EXPORT`` and ``LLM(model=EXPORT)`` work.

vLLM calls :func:`register` in every one of its processes (entry point ``vllm.general_plugins``). See
docs/serving.md.
"""

from __future__ import annotations

ATTENTION_OP = "hydrahead_attention"
"""The operator of a layer's attention with its projections, in vLLM's library of operators."""


def register() -> None:
    """Register the export's configuration and model in vLLM. It may be called more than once."""
    from transformers import AutoConfig
    from vllm.config import CompilationConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    from megatron_hydra.hf.configuration_hydrahead import HydraHeadConfig
    from megatron_hydra.hf.export_files import ARCHITECTURE
    from megatron_hydra.serving.vllm.support import SupportCheck

    AutoConfig.register(HydraHeadConfig.model_type, HydraHeadConfig, exist_ok=True)
    # By name: vLLM imports it in a process of its own first, before this one may touch a GPU.
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:HydraHeadForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = SupportCheck
    operator = f"vllm::{ATTENTION_OP}"  # compiled graphs are split there, as at vLLM's attention
    if operator not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(operator)
