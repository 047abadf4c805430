"""Out of memory on a GPU: an error that names the used memory and the settings to change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from megatron_hydra.errors import HydraError

GIB = 2**30

_OTHER_TEXTS = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA_ERROR_OUT_OF_MEMORY",
)


class OutOfMemory(HydraError):
    """A GPU's memory did not suffice."""


@contextlib.contextmanager
def convert_out_of_memory(message: Callable[[BaseException], str]) -> Iterator[None]:
    """Convert torch's error within the block to ours.

    Args:
        message: makes the text, from torch's error.

    Raises:
        OutOfMemory: instead of ``torch.OutOfMemoryError``.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(message(error)) from error


def out_of_memory_names(what: str, *advice: str) -> AbstractContextManager[None]:
    """As :func:`convert_out_of_memory`, with a message that names settings to change.

    Args:
        what: the activity, for the message.
        advice: settings that reduce memory, the best one first.
    """
    return convert_out_of_memory(lambda error: explained(what, error, advice))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory did not suffice; does not import torch.

    Torch has a class for it, but libraries that allocate without torch's allocator report other errors.
    """
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _OTHER_TEXTS)
    )


def explained(
    what: str, error: BaseException, advice: list[str] | tuple[str, ...], expected: str = ""
) -> str:
    """One line: used and total memory, expected memory, settings to change."""
    from megatron_hydra.parallel import platform

    used = f"{platform.peak_memory_bytes() / GIB:.1f} GiB were in use at most"
    total = platform.device_memory_bytes()
    if total:
        used += f" of {total / GIB:.1f} GiB on {platform.device_name()}"
    torch_said = str(error).split(". ")[0].strip()[:200]
    return (
        f"out of GPU memory in {what}: {used}{expected}. To make it fit: {'; or '.join(advice)}. "
        f"(torch: {torch_said})"
    )
