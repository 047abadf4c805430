"""``deterministic: true``: equal runs give equal bits on a GPU, too.

Three things make equal runs differ on a GPU: kernels that add by atomics; libraries whose order of sums depends
on the current load; and autotuners that take the kernel that is fastest at the moment, so that the next process
may take another one with another order of sums. Kernels with a deterministic variant call
:func:`is_deterministic` when they run.
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
"""Variables that cuBLAS, FLA, NCCL and Transformer Engine read when they start, with deterministic values; the
default comes first. FLA's cache has configurations chosen by their speed; NVLS adds in the network's switch, in
the order of arrival."""


def is_deterministic() -> bool:
    """Whether this process must give equal bits."""
    return torch.are_deterministic_algorithms_enabled()


def make_deterministic() -> None:
    """Configure torch, and every library that allows it, to give equal bits in equal runs of this process.

    Call it before any of them is used: cuBLAS and NCCL read the environment only once.

    Raises:
        HydraError: an environment variable requests the opposite.
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
    """Make every Triton autotuner of this process take its first configuration that runs here.

    Raises:
        HydraError: the autotuner of this Triton is not known here.
    """
    try:
        from triton.runtime.autotuner import Autotuner
    except ImportError:
        return  # without Triton there is no autotuner
    if not (hasattr(Autotuner, "_bench") and hasattr(Autotuner, "check_disk_cache")):
        raise HydraError(
            "deterministic: true cannot pin the kernels that this version of Triton chooses by their "
            "speed; install Triton 3.6 or 3.7"
        )
    pin(Autotuner)


def pin(autotuner: Any) -> None:
    """Change an autotuner class as in :func:`pin_autotuning`; only once."""
    if getattr(autotuner, "_hydra_pinned", False):
        return
    timed = autotuner._bench

    def first_runnable_config(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        # Triton makes a new dict of arguments for every call, and tries all configurations in order.
        if getattr(self, "_hydra_settled", None) is self.nargs:
            return [float("inf")] * 3
        times: list[float] = timed(self, *args, config=config, **meta)
        if times[0] != float("inf"):
            self._hydra_settled = self.nargs
        return times

    def without_disk_cache(self: Any, key: Any, configs: Any, benchmark: Any) -> bool:
        benchmark()  # entries on the disk were chosen by their speed
        return False

    autotuner._bench = first_runnable_config
    autotuner.check_disk_cache = without_disk_cache
    autotuner._hydra_pinned = True
