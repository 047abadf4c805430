"""One parameter of a layer on one rank, and how a module gets it: shape, rows, and marks for the optimizer."""

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
        key: what its canonical keys below ``self_attention.`` begin with.
        shape: local, with padding.
        segments: its rows; ``None``: the whole canonical tensor ``key``.
        axis: the axis of the rows.
        sharded: its heads are this rank's alone; else every rank holds all of it.
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
        """Whether anything of it is not padding. A linear of padding alone still takes part in collectives."""
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
    """Give a module the parameters whose names begin with ``prefix``; ``None`` for those that the layer lacks.

    Values come from a checkpoint; until then they are zero. Parameters of linears (``….weight``) are theirs.

    Args:
        module: gets one attribute for each name.
        parameters: all that the rank holds of the layer.
        prefix: of the module's own names in the layer, ``gdn.`` for example.
        dtype: of parameters that are not fp32 always.
        sequence_parallel: whether tensor-parallel ranks hold slices of the sequence between layers.
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
    """The parameter, with the marks that say how its gradient and its optimizer state are treated."""
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
    """The first ``count`` rows; without padding the parameter itself.

    The backward of a slice fills a tensor with zeros and writes a part of it: two launches for nothing.
    """
    return parameter if parameter.shape[0] == count else parameter[:count]
