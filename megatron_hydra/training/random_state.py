"""Pack the states of all random generators of a process into one byte vector, and restore them."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

_JSON_BYTES = 24 * 1024


def _tensors() -> dict[str, Tensor]:
    """Generator states that are byte tensors, in a fixed order."""
    states = {"torch": torch.get_rng_state(), "device": torch.cuda.get_rng_state()}
    tracker = get_cuda_rng_tracker().get_states()
    return states | {f"tracker.{name}": tracker[name] for name in sorted(tracker)}


def capture_random_state() -> Tensor:
    """``[n]`` uint8 on the CPU; n is the same on every rank of a run."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    plain = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
    }
    text = json.dumps(plain).encode().ljust(_JSON_BYTES)
    parts = [state.cpu().flatten() for state in _tensors().values()]
    return torch.cat([*parts, torch.frombuffer(bytearray(text), dtype=torch.uint8)])


def restore_random_state(packed: Tensor) -> None:
    """Inverse of :func:`capture_random_state`, in a process with the same generators."""
    current = _tensors()
    sizes = [state.numel() for state in current.values()]
    *parts, text = packed.split([*sizes, _JSON_BYTES])
    states = dict(zip(current, (part.clone() for part in parts), strict=True))
    torch.set_rng_state(states.pop("torch"))
    torch.cuda.set_rng_state(states.pop("device"))
    tracker: Any = get_cuda_rng_tracker()
    tracker.set_states({name.removeprefix("tracker."): state for name, state in states.items()})
    plain = json.loads(bytes(text.tolist()))
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
