"""``deterministic: true``: equal runs give equal bits on a GPU, too.

What makes equal runs differ there: kernels that add up by atomics, libraries that choose a different sum
order by what is in flight, and autotuners that take whatever was fastest at that moment, which is
another kernel, with another order of its sums, in the next process. Kernels that have a deterministic
variant ask :func:`is_deterministic` when they run.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from megatron_hydra.errors import HydraError

ENVIRONMENT: dict[str, tuple[str, ...]] = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "FLA_CACHE_MODE": ("disabled",),
    "NCCL_ALGO": ("^NVLS", "Tree", "Ring", "CollnetDirect", "CollnetChain"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}
"""What cuBLAS, FLA, NCCL and Transformer Engine read when they start: deterministic values, the default
first. FLA's cache holds configurations that were chosen by their speed, NVLS adds in the network's switch
in the order of arrival."""


def is_deterministic() -> bool:
    """Whether this process was asked for equal bits."""
    return torch.are_deterministic_algorithms_enabled()


def make_deterministic() -> None:
    """Ask torch, and every library that can be asked, for equal bits in equal runs of this process.

    To be called before any of them is used: cuBLAS and NCCL read the environment only once.

    Raises:
        HydraError: the environment asks one of them for the opposite.
    """
    for name, values in ENVIRONMENT.items():
        found = os.environ.setdefault(name, values[0])
        if found not in values:
            raise HydraError(
                f"deterministic: true, but the environment has {name}={found}, with which results "
                f"may differ from run to run; unset it or set it to one of {', '.join(values)}"
            )
    torch.use_deterministic_algorithms(True)
    if torch.cuda.is_available():
        pin_autotuning()


def pin_autotuning() -> None:
    """Make every Triton autotuner of this process take the first of its configurations that runs here.

    Raises:
        HydraError: this Triton has another autotuner than the one that is known here.
    """
    try:
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        return  # no Triton, no autotuner
    if not (hasattr(Autotuner, "_bench") and hasattr(Autotuner, "check_disk_cache")):
        raise HydraError(
            "deterministic: true cannot pin the kernels that this version of Triton chooses by their "
            "speed; install Triton 3.6 or 3.7"
        )
    pin(Autotuner)


def pin(autotuner: Any) -> None:
    """Change an autotuner class as :func:`pin_autotuning` says; once."""
    if getattr(autotuner, "_hydra_pinned", False):
        return
    timed = autotuner._bench

    def first_runnable_config(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        # Triton makes a new dict of arguments for every call, and asks for all configurations in order.
        if getattr(self, "_hydra_settled", None) is self.nargs:
            return [float("inf")] * 3
        times: list[float] = timed(self, *args, config=config, **meta)
        if times[0] != float("inf"):
            self._hydra_settled = self.nargs
        return times

    def without_disk_cache(self: Any, key: Any, configs: Any, benchmark: Any) -> bool:
        benchmark()  # what is on the disk was chosen by its speed
        return False

    autotuner._bench = first_runnable_config
    autotuner.check_disk_cache = without_disk_cache
    autotuner._hydra_pinned = True
