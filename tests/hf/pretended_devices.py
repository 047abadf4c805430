"""Several devices on a CPU-only machine: tensors are on the CPU but report other devices.

As with GPUs, an operation with tensors of two devices fails, except for single numbers. A tensor that is made
without a device is on none of the pretended devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

HOST = torch.device("cpu")
FIRST, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)
_PLACE = "_pretended_device"


def place_of(x: torch.Tensor) -> torch.device:
    """The device that a tensor reports."""
    return getattr(x, _PLACE, HOST)


def put(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Let a tensor report this device."""
    setattr(x, _PLACE, device)
    return x


class PretendedDevices(TorchFunctionMode):
    """While active, every torch function checks its tensors' devices and sets the device of its results."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:  # a new object each time
            return place_of(args[0])
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        places = {place_of(x) for x in tensors if x.dim()}
        if func is torch.Tensor.to:
            return self._moved(args, kwargs)
        if len(places) > 1 and func is not torch.Tensor.copy_:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, found {sorted(map(str, places))} "
                f"in {getattr(func, '__name__', func)}"
            )
        here = next(iter(places), place_of(tensors[0]) if tensors else HOST)
        if kwargs.get("device") is not None:
            here = torch.device(kwargs["device"])
            kwargs["device"] = HOST
        out = func(*args, **kwargs)
        inputs = {id(x) for x in tensors}
        return tree_map_only(torch.Tensor, lambda x: x if id(x) in inputs else put(x, here), out)

    @staticmethod
    def _moved(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        x, *rest = args
        copied = kwargs.pop("copy", False)
        if rest and isinstance(rest[0], torch.Tensor):
            device, dtype = place_of(rest[0]), rest[0].dtype
        else:
            device, dtype, _, _ = torch._C._nn._parse_to(*rest, **kwargs)
        device, dtype = device or place_of(x), dtype or x.dtype
        if device == place_of(x) and dtype == x.dtype and not copied:
            return x
        return put(x.detach().to(dtype, copy=True), device)


def spread(model: torch.nn.Module, places: Mapping[str, torch.device]) -> None:
    """Do what accelerate's ``dispatch_model`` does with a ``device_map`` of GPUs."""
    from accelerate.hooks import attach_align_device_hook_on_blocks

    def device(name: str) -> torch.device:
        return next(
            (d for part, d in places.items() if f"{name}.".startswith(f"{part}.")),
            next(iter(places.values())),
        )

    attach_align_device_hook_on_blocks(
        model,
        execution_device={"": HOST, **dict.fromkeys(places, HOST)},
        skip_keys=model._skip_keys_device_placement,
    )
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            module._hf_hook.execution_device = device(name)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        put(tensor, device(name))
