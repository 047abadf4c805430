"""One parameter of a layer on one rank: shape, rows, marks for the optimizer, and its place in a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from megatron_hydra.model.parameters import HOLDERS, PARAMETERS, Holder
from megatron_hydra.parallel.gradients import mark_partial
from megatron_hydra.parallel.head_weights import Segment


@dataclasses.dataclass(frozen=True)
class LocalParameter:
    """A parameter of a layer's attention on one rank.

    Attributes:
        name: as in the module, e.g. ``projections.in_proj.weight`` or ``gdn.A_log``.
        key: prefix of its canonical keys below ``self_attention.``.
        shape: local, with padding.
        segments: its rows; ``None``: the whole canonical tensor ``key``.
        axis: the axis of the rows.
        sharded: whether only this rank has its heads; otherwise every rank has all of it.
        like_norm, fp32, decays: see :class:`.HeadParameter`.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...] | None
    axis: int
    sharded: bool
    like_norm: bool
    fp32: bool
    decays: bool

    @property
    def rows(self) -> int:
        """Rows with padding."""
        return self.shape[self.axis]

    @property
    def is_used(self) -> bool:
        """Whether any row is not padding. A linear with only padding still takes part in collectives."""
        return self.segments != () or self.name.endswith(".weight")


_NAMES = tuple(
    dict.fromkeys(
        name
        for holder in (
            *HOLDERS,
            *(Holder(row.key, row.key) for row in PARAMETERS if not row.holder),
        )
        for name in (holder.own, holder.replicated, holder.shared)
        if name
    )
)
"""Names of all parameters that some layer has."""


def declare(
    module: torch.nn.Module,
    parameters: Sequence[LocalParameter],
    prefix: str,
    dtype: torch.dtype,
    sequence_parallel: bool = False,
) -> None:
    """Set a module's parameters whose names begin with ``prefix``; ``None`` for those that the layer does not
    have.

    Values come from a checkpoint; before that they are zero. Linears have their own parameters (``….weight``).

    Args:
        module: gets one attribute for each name.
        parameters: all parameters of the layer on this rank.
        prefix: of the module's names in the layer, for example ``gdn.``.
        dtype: of parameters that are not always fp32.
        sequence_parallel: whether tensor-parallel ranks have slices of the sequence between layers.
    """
    held = {parameter.name: parameter for parameter in parameters}
    for name in _NAMES:
        own = name.removeprefix(prefix)
        if "." in own or not name.startswith(prefix):
            continue
        local = held.get(name)
        module.register_parameter(
            own, None if local is None else _allocated(local, dtype, sequence_parallel)
        )


def _allocated(
    local: LocalParameter, dtype: torch.dtype, sequence_parallel: bool
) -> torch.nn.Parameter:
    """The parameter, with the marks for its gradient and its optimizer state."""
    parameter = torch.nn.Parameter(
        torch.zeros(
            local.shape,
            dtype=torch.float32 if local.fp32 else dtype,
            device=torch.cuda.current_device(),
        )
    )
    if local.like_norm:
        parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
    elif local.sharded:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    else:
        mark_partial(parameter)
    parameter.hydra_fp32 = local.fp32  # type: ignore[attr-defined]
    parameter.hydra_decays = local.decays  # type: ignore[attr-defined]
    return parameter


def leading(parameter: torch.Tensor, count: int) -> torch.Tensor:
    """The first ``count`` rows, or the parameter itself if it has no padding.

    The backward of a slice fills a tensor with zeros and writes a part of it, which would be two needless
    launches.
    """
    return parameter if parameter.shape[0] == count else parameter[:count]
