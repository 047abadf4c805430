"""The platform: GPU with NCCL, or CPU with gloo. Only this file distinguishes them.

Megatron-Core assumes CUDA in a few dozen places of its training path: it allocates on
``torch.cuda.current_device()``, reads and restores the CUDA generator's state, and names tensor types such as
``torch.cuda.FloatTensor``. On a machine without a GPU, :func:`install` replaces these calls by CPU versions, so
that the same code trains, saves checkpoints and is tested there. On a machine with a GPU it changes nothing.

It also refuses a Megatron-Core release that :mod:`.megatron_versions` does not support, before its import. The
import of this module does all this. Every package that imports Megatron-Core imports this module first (in its
``__init__``), because Megatron binds some of these names at its import.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime as dt
import functools
import gc
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._device

from megatron_hydra.environment import environment_number
from megatron_hydra.errors import HydraError
from megatron_hydra.parallel import megatron_versions

_CUDA_AVAILABLE = torch.cuda.is_available()
_installed = False

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""glibc's malloc.h."""


def has_gpu() -> bool:
    """Whether CUDA devices are used. Only the choice of kernels should need this."""
    return _CUDA_AVAILABLE


def device() -> torch.device:
    """The device of this process: the current CUDA device, or the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if _CUDA_AVAILABLE
        else torch.device("cpu")
    )


def device_count() -> int:
    """Number of GPUs that this process can see; 0 without a GPU."""
    return torch.cuda.device_count() if _CUDA_AVAILABLE else 0


def device_memory_bytes() -> int:
    """Memory of the current GPU in bytes; 0 without a GPU."""
    if not _CUDA_AVAILABLE:
        return 0
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def device_name() -> str:
    """Name of the current GPU, such as ``NVIDIA H100 80GB HBM3``; ``""`` without a GPU."""
    return torch.cuda.get_device_name() if _CUDA_AVAILABLE else ""


def communication_backend() -> str:
    """``nccl`` on GPUs, else ``gloo``."""
    return "nccl" if _CUDA_AVAILABLE else "gloo"


def bind_process_to_device(local_rank: int) -> None:
    """Select this process's GPU, and one thread for torch's operators on the host.

    With all cores of a node, an operator on a batch's 65,536 positions takes some ten milliseconds on the host,
    because 64 threads wait for each other (docs/PERFORMANCE.md). torchrun gives each of several processes one
    thread, but a process that is alone on its node all cores. ``OMP_NUM_THREADS`` sets another number. On a CPU
    do nothing.

    Raises:
        HydraError: this node has fewer GPUs than processes of the run.
    """
    if not _CUDA_AVAILABLE:
        return
    check_gpus(max(local_rank + 1, environment_number("LOCAL_WORLD_SIZE", 1)), device_count())
    torch.cuda.set_device(local_rank)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def check_gpus(processes: int, gpus: int) -> None:
    """Check that a node has at least one GPU per process.

    Raises:
        HydraError: it has fewer; names torchrun's option.
    """
    if processes > gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        raise HydraError(
            f"{processes} processes were started on this node, but it has {gpus} "
            f"{'GPU' if gpus == 1 else 'GPUs'}{seen}: start at most one per GPU (torchrun "
            "--nproc-per-node, launch/*.sh --gpus-per-node), and make parallel.tensor, "
            "parallel.context and parallel.pipeline fit"
        )


def peak_memory_bytes() -> int:
    """Peak memory of this process so far: allocated on its GPU, or resident memory without a GPU."""
    if _CUDA_AVAILABLE:
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def peak_reserved_bytes() -> int:
    """Most memory that torch's allocator has held on this process's GPU, in use or not; 0 without a GPU."""
    return torch.cuda.max_memory_reserved() if _CUDA_AVAILABLE else 0


def free_cached_memory() -> None:
    """Free the GPU memory that this process caches but does not use; does nothing on a CPU."""
    if _CUDA_AVAILABLE:
        gc.collect()  # frees models in reference cycles with their tensors
        torch.cuda.empty_cache()


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on ``device``, without a wait of the host for what the device still has to do.

    A copy from pageable memory would wait for the work before it, so that the host could launch nothing of a
    step while the device still updates the weights of the step before.
    """
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory in a CPU process that computes for a while.

    By default, glibc maps new memory for every large tensor and unmaps it when the tensor is freed. The system
    then zeroes every page of every result, which takes a sixth of a small model's training step. With this
    setting, the process keeps its peak size. It does nothing with a GPU or with another C library.
    """
    if _CUDA_AVAILABLE or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in (
            (_M_MMAP_THRESHOLD, 1 << 30),
            (_M_TRIM_THRESHOLD, (1 << 31) - 1),
            (_M_TOP_PAD, 1 << 26),
        ):
            mallopt(parameter, value)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that uses plain CPU memory instead of a CUDA device or pinned memory."""

    @functools.wraps(factory)
    def wrapped(
        *args: Any, pin_memory: bool = False, device: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        if device is not None and "cuda" in str(device):
            device = "cpu"
        return factory(*args, device=device, **kwargs)

    return wrapped


def _tensor_type(original: Callable) -> Callable:
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        # Megatron groups gradients and parameters by type names such as torch.cuda.FloatTensor.
        return original(self).replace("torch.", "torch.cuda.", 1)

    return tensor_type


@functools.cache
def _gloo_devices(_process: int) -> list[Any]:
    """Gloo's sockets and polling thread, one set a process: a fork has none of its parent's threads."""
    gloo: Any = dist.ProcessGroupGloo
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    if names:
        return [gloo.create_device(interface=name) for name in names]
    return [gloo.create_default_device()]


def _share_gloo_devices() -> None:
    """Let all gloo groups of a process use one polling thread.

    By default each group has its own, which wakes up a hundred times a second as long as the group
    exists. Megatron-Core makes some twenty groups, so that four ranks on a laptop spend most of a core
    on waking up.
    """
    gloo: Any = dist.ProcessGroupGloo
    original = gloo.__init__

    def initialise(self: Any, store: Any, rank: int, size: int, *args: Any, **kwargs: Any) -> None:
        given = args[0] if args else kwargs.get("options", kwargs.get("timeout"))
        if given is not None and not isinstance(given, dt.timedelta):
            original(self, store, rank, size, given)  # options: whose caller chose the devices
            return
        options = gloo._Options()
        options._devices = _gloo_devices(os.getpid())
        if given is not None:
            options._timeout = given
        original(self, store, rank, size, options)

    gloo.__init__ = initialise


def install() -> None:
    """Check Megatron-Core's version, and make it run without a GPU. Idempotent.

    Raises:
        HydraError: Megatron-Core is not installed, too old or too new.
    """
    global _installed
    if _installed:
        return
    megatron_versions.check(megatron_versions.installed())
    megatron_versions.quiet()
    _installed = True
    if _CUDA_AVAILABLE:
        return
    # Megatron's jit_fuser is torch.compile. On the CPU its warm-up takes minutes and brings nothing.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

    if dist.is_available() and dist.is_gloo_available():
        _share_gloo_devices()

    # ``with torch.device(…)`` recognises factories by identity, in a set that it builds at its first use. Let
    # it build the set from the originals. Otherwise from_pretrained of transformers does not initialise
    # rotary buffers.
    torch.utils._device._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "empty_like", "zeros_like", "full"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.type = _tensor_type(torch.Tensor.type)  # type: ignore[method-assign]

    # Each name gets its own function object: torch.compile fails if two names share one.
    cuda = torch.cuda
    cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    cuda.synchronize = lambda *args, **kwargs: None
    if megatron_versions.asks_for_streams():
        cuda.current_stream = lambda *args, **kwargs: None  # type: ignore[assignment]
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]  # noqa: PLW0108
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


install()
