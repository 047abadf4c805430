"""Tiny exports, vLLM engines in this process, and the transformers export's answers."""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hydra.hf.configuration_hydrahead import HydraHeadConfig
from megatron_hydra.hf.modeling_hydrahead import HydraHeadForCausalLM
from tests.hf.models import export, random_model
from tests.required import VARIABLE

# One process, so that tests can inspect the engine; the machine's number of threads; on a GPU, Triton's fp32
# products in fp32 (by default it rounds them to TF32).
ENVIRONMENT = {
    "TRITON_F32_DEFAULT": "ieee",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
UNEVEN = [[1, 2, 3], [], [0, 1, 2, 3, 4, 5], [4]]
NEW = 12
"""Number of tokens generated for each prompt."""
CACHE_BYTES = 1 << 30
"""Bytes that an engine reserves for its cache: as many as ``VLLM_CPU_KVCACHE_SPACE`` says on a CPU."""


def need_vllm() -> None:
    """Skip this module without vLLM; fail if ``HYDRA_REQUIRE`` names it."""
    os.environ.update(ENVIRONMENT)
    if "vllm" in os.environ.get(VARIABLE, "").split(","):
        importlib.import_module("vllm")
    else:
        pytest.importorskip("vllm", exc_type=ImportError)


def save_export(
    folder: Path,
    heads: Sequence[Sequence[int]] = UNEVEN,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> HydraHeadForCausalLM:
    """Write a random export whose gates, norms, convolutions and slow decays all change the output."""
    config = HydraHeadConfig(
        **{**SHAPE, "num_hidden_layers": len(heads), **changes},
        full_attention_heads=[list(layer) for layer in heads],
    )
    model = random_model(config).to(dtype)
    export(model, folder)
    return model


@contextlib.contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """A vLLM engine; its memory is freed at the end."""
    from vllm import LLM

    defaults = {
        "skip_tokenizer_init": True,
        "dtype": "float32",  # vLLM would take 16 bits for a 32-bit export
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "disable_log_stats": False,  # tests read its metrics
    }
    if torch.cuda.is_available():  # a part of the card, so that several tests can share it
        defaults |= {"kv_cache_memory_bytes": CACHE_BYTES, "gpu_memory_utilization": 0.04}
    llm = LLM(model=str(folder), **{**defaults, **options})
    try:
        yield llm
    finally:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def sampling(new: int = NEW) -> Any:
    """Greedy, with the log probability of every token."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=new, ignore_eos=True, logprobs=0, detokenize=False
    )


def random_prompts(lengths: Sequence[int], seed: int = 1, vocabulary: int = 128) -> list[list[int]]:
    """One prompt of each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]


def generate(llm: Any, prompts: Sequence[list[int]], new: int = NEW) -> list[Any]:
    """Answers of all prompts, sent together."""
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [r.outputs[0] for r in llm.generate(requests, sampling(new), use_tqdm=False)]


@torch.no_grad()
def check(model: HydraHeadForCausalLM, prompt: list[int], answer: Any, tolerance: float) -> float:
    """Assert that an answer is the export's own greedy one; returns the largest |Δ log probability|.

    The export reads one prompt with its answer in one forward, without a cache. A token may differ from the
    export's best one only if both are equally likely, within the tolerance.
    """
    tokens = list(answer.token_ids)
    logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0].float()
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    chosen = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    short = (logprobs.max(-1).values - chosen).max().item()
    assert short <= tolerance, f"{len(prompt)} tokens of prompt: not the likeliest by {short}"
    given = torch.tensor([answer.logprobs[i][t].logprob for i, t in enumerate(tokens)])
    apart = (given - chosen).abs().max().item()
    assert apart <= tolerance, f"{len(prompt)} tokens of prompt: |Δ logprob| {apart}"
    return apart


@torch.no_grad()
def check_rounded(
    model: HydraHeadForCausalLM, prompt: list[int], answer: Any, tolerance: float = 3.0
) -> float:
    """As :func:`check`, for an export in 16 bits; ``tolerance`` is in units of its own rounding.

    The rounding is the difference between the export and itself in fp32, on the answer.
    """
    wide = HydraHeadForCausalLM(model.config).eval()
    wide.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    tokens = torch.tensor([prompt + list(answer.token_ids)])
    part = slice(len(prompt) - 1, -1)
    own, true = (
        m(tokens, use_cache=False).logits[0, part].float().log_softmax(-1) for m in (model, wide)
    )
    rounding = (own - true).abs().max().item()
    return check(wide, prompt, answer, tolerance * rounding) / rounding


def cache_config(llm: Any) -> Any:
    """vLLM's groups of layers that share pages, and the number of pages."""
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config


def pages(llm: Any) -> tuple[int, int]:
    """Tokens of a page of keys, and the pages that a request takes that is one page and 30 tokens long."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    config, whole = cache_config(llm), llm.llm_engine.vllm_config
    keys = [
        group.kv_cache_spec.block_size
        for group in config.kv_cache_groups
        if isinstance(group.kv_cache_spec, FullAttentionSpec)
    ]
    (tokens,) = set(keys)
    # vLLM counts a request of the largest length: pages of keys, and pages of states, which do not grow.
    most = config.num_blocks / get_max_concurrency_for_kv_cache_config(whole, config)
    states = math.ceil(most) - len(keys) * math.ceil(whole.model_config.max_model_len / tokens)
    return tokens, states + 2 * len(keys)


def metric(llm: Any, name: str) -> float:
    """A counter of the engine."""
    values = [m.value for m in llm.get_metrics() if m.name == f"vllm:{name}"]
    assert values, f"vLLM has no counter {name}"
    return sum(values)
