"""Fast versions of Megatron-Core's functions on lists of parameters: few launches for all parameters.

Without Apex and Transformer Engine, Megatron-Core (0.16.1 to 0.19.2) uses slow fallbacks. They compute the
gradient norm tensor by tensor and read each norm back to the host, which waits for the device once per
parameter tensor (302 times a step for 135 million parameters in 30 layers). They also scale gradients and
copy weights one by one. Importing this module replaces these fallbacks. The functions of Apex and
Transformer Engine stay if they are installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as megatron_optimizer
from torch import Tensor


def l2_norm(
    _chunk_size: int, _noop: Tensor, tensor_lists: Sequence[Sequence[Tensor]], *_: Any
) -> tuple[Tensor, None]:
    """Norm over all tensors, ``[1]`` fp32 on their device; replaces ``amp_C.multi_tensor_l2norm``."""
    tensors = [tensor for tensors in tensor_lists for tensor in tensors]
    norms = torch.stack(torch._foreach_norm(tensors))
    return torch.linalg.vector_norm(norms, dtype=torch.float32).reshape(1), None


def scale(
    _chunk_size: int, _noop: Tensor, tensor_lists: Sequence[Sequence[Tensor]], factor: float
) -> None:
    """``destination = source · factor`` for lists; replaces ``amp_C.multi_tensor_scale``."""
    source, destination = (list(tensors) for tensors in tensor_lists)
    if not source:
        return
    if all(
        a is b or a.data_ptr() == b.data_ptr() for a, b in zip(source, destination, strict=True)
    ):
        torch._foreach_mul_(destination, factor)
        return
    scaled = source if factor == 1.0 else torch._foreach_mul(source, factor)
    torch._foreach_copy_(destination, list(scaled))


_copy_main_params = distrib_optimizer.DistributedOptimizer._copy_main_params_to_model_params


@torch.no_grad()
def _copy_main_params_to_model_params(self: distrib_optimizer.DistributedOptimizer) -> None:
    plain = not (
        self.is_stub_optimizer
        or self.ddp_config.use_megatron_fsdp
        or self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        or self.config.fp8_recipe is not None
    )
    if not plain:
        _copy_main_params(self)
        return
    # Two calls, each with one pair of dtypes: torch copies a list of mixed dtypes tensor by tensor.
    for master_groups, model_groups in (
        (self.shard_fp32_from_float16_groups, self.model_float16_groups),
        (self.shard_fp32_groups, self.model_fp32_groups),
    ):
        masters: list[Tensor] = []
        weights: list[Tensor] = []
        for master_group, model_group in zip(master_groups, model_groups, strict=True):
            for master, parameter in zip(master_group, model_group, strict=True):
                span = self._get_model_param_range_map(parameter)["gbuf_world_in_bucket"]
                buffer, _, bucket = self.model_param_gbuf_map[parameter]
                whole = self.buffers[buffer].buckets[bucket].param_data.view(-1)
                masters.append(master.view(-1))
                weights.append(whole[span.start : span.end])
        if masters:
            torch._foreach_copy_(weights, masters)


def install() -> None:
    """Replace Megatron-Core's fallbacks by these functions."""
    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm
    for module in (clip_grads, megatron_optimizer):
        if module.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
            module.multi_tensor_scale_impl = scale
    distrib_optimizer.DistributedOptimizer._copy_main_params_to_model_params = (
        _copy_main_params_to_model_params
    )


install()
