"""What the plug-in supports, and what it refuses by name before it reads any weight."""

from __future__ import annotations

from typing import Any

from megatron_hydra.errors import HydraError
from megatron_hydra.hf.configuration_hydrahead import SWITCHES, HydraHeadConfig
from megatron_hydra.serving.vllm.kernel_start import read_tuning

COMPUTED = (
    "mixer", "window", "fusion", "fusion_norm", "fa_position", "fa_rotary_every", "fa_gate", "fa_gate_bias",
    "gdn_position", "qkv", "gdn_kv", "gdn_gate", "short_conv", "conv_width", "log_scale", "log_scale_a",
    "granularity",
)  # fmt: skip
"""Switches of the layer that the plug-in computes, except values that :func:`check_model` refuses. A new switch
is refused until it is listed here."""

KV_DTYPES = ("auto", "float16", "bfloat16", "float32")
"""Values of ``--kv-cache-dtype`` that do not quantise keys and values."""


class SupportCheck:
    """vLLM's hooks on a configuration of this architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Refuse unsupported models, and mark a model without GDN heads as not hybrid.

        Raises:
            HydraError: what is not supported, and what to do.
        """
        config = model_config.hf_config
        check_model(config)
        if all(len(layer) == config.num_attention_heads for layer in config.full_attention_heads):
            config.layer_types = ["full_attention"] * config.num_hidden_layers

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse unsupported ways of serving.

        Raises:
            HydraError: what is not supported, and what to do.
        """
        model_config = vllm_config.model_config
        check_model(model_config.hf_config)
        check_tensor_parallel(
            model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
        )
        check_options(
            quantization=model_config.quantization,
            speculative=vllm_config.speculative_config is not None,
            lora=vllm_config.lora_config is not None,
            kv_cache_dtype=vllm_config.cache_config.cache_dtype,
            decode_context_parallel=vllm_config.parallel_config.decode_context_parallel_size,
            prefill_context_parallel=vllm_config.parallel_config.prefill_context_parallel_size,
            runner=model_config.runner_type,
        )
        read_tuning(vllm_config.additional_config)


def check_model(config: HydraHeadConfig) -> None:
    """Refuse an architecture that the plug-in cannot compute.

    Raises:
        HydraError: naming the key of the export's ``config.json``.
    """
    for name, (absent, _) in SWITCHES.items():
        if name not in COMPUTED and config.hydra[name] != absent:
            raise HydraError(
                f"hydra.{name}={config.hydra[name]!r} in config.json is not supported under vLLM: the plug-in "
                "does not compute it. Run this export with transformers"
            )
    mixer = config.hydra["mixer"]
    if mixer != "head":
        raise HydraError(
            f"hydra.mixer={mixer!r} in config.json is not supported under vLLM: every head would be both "
            "FA and GDN. Serve mixer=head, or run this export with transformers"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise HydraError(
            f"hidden_act={config.hidden_act!r} in config.json is not supported under vLLM: use silu"
        )


def check_tensor_parallel(config: HydraHeadConfig, tp_size: int) -> None:
    """Refuse a number of tensor-parallel ranks that does not divide the MLP or the heads.

    Raises:
        HydraError: naming the flag and the key.
    """
    for key in ("num_attention_heads", "intermediate_size"):
        value = getattr(config, key)
        if value % tp_size:
            raise HydraError(
                f"--tensor-parallel-size {tp_size} does not divide {key}={value} of config.json: "
                "choose a size that does"
            )


def check_options(
    *,
    quantization: str | None,
    speculative: bool,
    lora: bool,
    kv_cache_dtype: str,
    decode_context_parallel: int,
    prefill_context_parallel: int,
    runner: str,
) -> None:
    """Refuse options of vLLM that the plug-in does not support.

    Raises:
        HydraError: naming the flag.
    """
    refused = {
        f"--quantization {quantization}": quantization is not None,
        "--speculative-config": speculative,
        "--enable-lora": lora,
        f"--kv-cache-dtype {kv_cache_dtype}": kv_cache_dtype not in KV_DTYPES,
        f"--decode-context-parallel-size {decode_context_parallel}": decode_context_parallel > 1,
        f"--prefill-context-parallel-size {prefill_context_parallel}": prefill_context_parallel > 1,
        f"--runner {runner}": runner != "generate",
    }
    for flag, given in refused.items():
        if given:
            raise HydraError(
                f"{flag} is not supported for HydraHead models under vLLM: leave it out"
            )


__all__ = ["SupportCheck", "check_model", "check_options", "check_tensor_parallel"]
