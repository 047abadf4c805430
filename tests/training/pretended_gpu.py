"""A pretended GPU on the CPU: tensors have a device, and operators refuse tensors of two devices.

A run under :func:`pretended_gpu` computes on the CPU. But every tensor has a pretended device, by its storage.
It is ``cuda:0`` for tensors that are made there, moved there or computed from such tensors. It is ``cpu`` for
all others, also for the optimizer's step counts and the states of random generators. An operator on both raises
an error as CUDA does, and so does a NCCL collective of a tensor on the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed.distributed_c10d as c10d
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_hydra.config.run import BackendConfig
from megatron_hydra.model import hydra_attention, layer_spec
from megatron_hydra.ops import device_cache
from megatron_hydra.ops.backends import choose_kernels
from megatron_hydra.ops.kernels import Case, Kernels
from megatron_hydra.parallel import platform
from megatron_hydra.training import checkpoint_write

GPU = torch.device("cuda", 0)
_HOST = torch.device("cpu")

_aten = torch.ops.aten
_COPIES = (_aten.copy_.default, _aten._to_copy.default, _aten.copy.default)
_TAKE_HOST_INDICES = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default)

# Keys are addresses of storages; the weak reference prevents reuse of an address.
_on_the_gpu: dict[int, StorageWeakRef] = {}


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether the pretended device of a tensor is the GPU."""
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()._cdata in _on_the_gpu


def _place(tensor: torch.Tensor, on_gpu: bool) -> None:
    with torch._C.DisableTorchFunction():
        storage = tensor.untyped_storage()
        if on_gpu:
            _on_the_gpu.setdefault(storage._cdata, StorageWeakRef(storage))


class _Operators(TorchDispatchMode):
    """Refuses operators on tensors of both devices; records the device of their results.

    Attributes:
        target: device of the next operators' results, whatever their inputs are: for a copy between devices, or
            a factory with a device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.target: bool | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if self.target is None:
            _refuse_two_devices(func, args, inputs)
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            given = {tensor.untyped_storage()._cdata for tensor in inputs}
            on_gpu = any(is_on_gpu(tensor) for tensor in inputs) or _is_of_autograd(inputs)
            for leaf in tree_leaves(result):
                if not isinstance(leaf, torch.Tensor):
                    continue
                if self.target is not None:
                    _place(leaf, self.target)
                elif leaf.untyped_storage()._cdata not in given:
                    _place(leaf, on_gpu)
        return result


def _is_of_autograd(inputs: list[torch.Tensor]) -> bool:
    """Whether autograd makes this tensor itself; it is then on the GPU, as the tensor that it stands for."""
    return not inputs and torch._C._current_graph_task_id() != -1


def _refuse_two_devices(func: Any, args: tuple, inputs: list[torch.Tensor]) -> None:
    host = [tensor for tensor in inputs if not is_on_gpu(tensor)]
    if func.namespace == "c10d" and host:
        raise RuntimeError(f"No backend type associated with device type cpu ({func})")
    if len(host) in (0, len(inputs)) or func in _COPIES:
        return
    if func in _TAKE_HOST_INDICES and is_on_gpu(args[0]):
        return
    written = func._schema.is_mutable and isinstance(args[0], torch.Tensor)
    if (
        torch.Tag.pointwise in func.tags
        and all(tensor.dim() == 0 for tensor in host)
        and not (written and not is_on_gpu(args[0]))
    ):
        return  # element by element, a number on the host may be an operand of GPU tensors
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
        f"and cpu! (when running {func})"
    )


class _Functions(TorchFunctionMode):
    """Returns a tensor's device, and moves tensors between the two."""

    def __init__(self, operators: _Operators) -> None:
        super().__init__()
        self._operators = operators

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if tensor is not None:
            if func == torch.Tensor.device.__get__:
                return GPU if is_on_gpu(tensor) else _HOST
            if func == torch.Tensor.is_cpu.__get__:
                return not is_on_gpu(tensor)
            if func is torch.Tensor.cpu:
                return self._moved(tensor, False)
            if func is torch.Tensor.to:
                return self._to(tensor, args[1:], kwargs)
            if func is torch.Tensor.pin_memory:
                if is_on_gpu(tensor):
                    raise RuntimeError(
                        "cannot pin 'torch.cuda.FloatTensor': only the host's can be pinned"
                    )
                return self._moved(tensor, False)
            if func is torch.Tensor.new_tensor and kwargs.get("device") is None:
                kwargs["device"] = GPU if is_on_gpu(tensor) else _HOST
            if func in (torch.Tensor.numpy, torch.Tensor.__array__) and is_on_gpu(tensor):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        on_gpu = _means_gpu(kwargs["device"])
        with self._into(on_gpu):
            return func(*args, **kwargs | {"device": _HOST})

    @contextlib.contextmanager
    def _into(self, on_gpu: bool) -> Iterator[None]:
        before, self._operators.target = self._operators.target, on_gpu
        try:
            yield
        finally:
            self._operators.target = before

    def _to(self, tensor: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        copy = kwargs.pop("copy", False)
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        on_gpu = is_on_gpu(tensor)
        if args and isinstance(args[0], torch.Tensor):
            on_gpu = is_on_gpu(args[0])
        elif device is not None:
            on_gpu = _means_gpu(device)
        return self._moved(tensor, on_gpu, dtype, copy)

    def _moved(
        self,
        tensor: torch.Tensor,
        on_gpu: bool,
        dtype: torch.dtype | None = None,
        copy: bool = False,
    ) -> torch.Tensor:
        dtype = dtype or tensor.dtype
        if on_gpu == is_on_gpu(tensor) and not copy:
            return tensor.to(dtype)
        with self._into(on_gpu):
            return tensor.to(dtype, copy=True)


def _type(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Any:
    if dtype is not None:
        return tensor.to(dtype)
    name = {torch.float32: "Float", torch.bfloat16: "BFloat16"}[tensor.dtype]
    return f"torch.{'cuda.' * is_on_gpu(tensor)}{name}Tensor"


def _means_gpu(device: Any) -> bool:
    return isinstance(device, int) or "cuda" in str(device)


def _kernels_of_the_cpu(config: BackendConfig, case: Case, **options: Any) -> Kernels:
    return choose_kernels(config, dataclasses.replace(case, device=_HOST), **options)


@contextlib.contextmanager
def _modes() -> Iterator[None]:
    operators = _Operators()
    with _Functions(operators), operators:
        yield


@contextlib.contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within this block, the process has a GPU, as far as devices of tensors are concerned.

    The kernels are the CPU's, because ``is_cuda`` is false, and they run in one stream.
    """
    with monkeypatch.context() as patch:
        patch.setattr(platform, "device", lambda: GPU)
        patch.setattr(layer_spec, "choose_kernels", _kernels_of_the_cpu)
        patch.setattr(
            hydra_attention, "side_by_side", lambda aside, reads, here: (aside(*reads), here())
        )
        patch.setattr(device_cache, "_copy_aside", lambda tensor, device: tensor.to(device))
        patch.setattr(torch.cuda, "current_device", lambda: GPU.index)
        patch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self.to(GPU))
        patch.setattr(torch.Tensor, "type", _type)
        patch.setattr(c10d, "_get_object_coll_device", lambda group=None: "cuda")
        for name in ("tensor", "zeros", "ones", "empty", "empty_like", "zeros_like", "full"):
            patch.setattr(torch, name, getattr(torch, name).__wrapped__)  # the platform's
        write = checkpoint_write.CheckpointWrite.write

        def write_under_modes(self: Any) -> None:  # each thread has its own modes
            with _modes():
                write(self)

        patch.setattr(checkpoint_write.CheckpointWrite, "write", write_under_modes)
        with _modes():
            yield
