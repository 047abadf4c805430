"""How the Triton kernels of the GDN heads are tuned and compiled when an engine starts.

Six kernels of vLLM's copy of flash-linear-attention compute the delta rule of a prompt. For each kernel,
Triton times every configuration (88 in all on Hopper) and keeps the fastest. The number of heads is a
compile-time constant and part of the key of the choice. The layers of a head-level hybrid have up to ten
numbers of heads. So a start would compile and time the 88 configurations for each number, one after the other.

This module makes the choice once: for the number of heads that most layers have, on a prompt that fills a
step. All other numbers of heads use the same choice. The number changes strides and how many programs run. It
does not change the shared memory of a program, which decides whether a configuration can run. Threads compile
kernels in parallel: the 88 configurations while vLLM measures memory, and the kernels of all layers before
the first step of each kind (prompts, single tokens, both).
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from megatron_hydra.errors import HydraError
from megatron_hydra.ops.one_parser import one_parser

OPTION = "hydrahead_tuning"
"""Key of vLLM's ``--additional-config``."""

TUNINGS = ("once", "full", "off")
"""Its values: one choice for all numbers of heads; Triton's own way; the first configuration, untimed."""

PACKAGE = "vllm.third_party.flash_linear_attention.ops"
KERNELS = {
    "cumsum": "chunk_local_cumsum_scalar_kernel",
    "chunk_scaled_dot_kkt": "chunk_scaled_dot_kkt_fwd_kernel",
    "solve_tril": "merge_16x16_to_64x64_inverse_kernel",
    "wy_fast": "recompute_w_u_fwd_kernel",
    "chunk_delta_h": "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
    "chunk_o": "chunk_fwd_kernel_o",
}
"""Module → kernel of the delta rule of a prompt, in the order in which they run."""

HEADS = "H"
"""The kernels' argument with the number of heads."""

MOST_THREADS = 32
"""Each compiles with tens of megabytes of memory."""


def read_tuning(additional_config: Any, first_only: bool = False) -> str:
    """The value of :data:`OPTION`.

    Args:
        additional_config: vLLM's, usually a dict.
        first_only: vLLM takes the first configuration of every kernel (``VLLM_TRITON_FORCE_FIRST_CONFIG``), so
            there is no choice that could be shared.

    Raises:
        HydraError: a value that is none of :data:`TUNINGS`.
    """
    given = additional_config.get(OPTION) if isinstance(additional_config, Mapping) else None
    if given is not None and given not in TUNINGS:
        raise HydraError(
            f"--additional-config: {OPTION}={given!r} is not one of {', '.join(TUNINGS)}"
        )
    tuning = TUNINGS[0] if given is None else str(given)
    return "off" if first_only and tuning == "once" else tuning


def delta_rule_tuners(package: str = PACKAGE) -> list[Any]:
    """Triton's ``Autotuner`` of every kernel of :data:`KERNELS`.

    Raises:
        HydraError: vLLM has no such kernels, or they are not tuned by their number of heads.
    """
    from triton.runtime.autotuner import Autotuner

    found = []
    for module, name in KERNELS.items():
        try:
            kernel = getattr(importlib.import_module(f"{package}.{module}"), name)
        except (ImportError, AttributeError) as error:
            raise _unknown(f"it has no {package}.{module}.{name} ({error})") from error
        while not isinstance(kernel, Autotuner):
            if not hasattr(kernel, "fn"):
                raise _unknown(f"{package}.{module}.{name} is not tuned")
            kernel = kernel.fn
        if HEADS not in kernel.keys:
            raise _unknown(
                f"{package}.{module}.{name} is not tuned by {HEADS}, but by {kernel.keys}"
            )
        found.append(kernel)
    return found


def _unknown(why: str) -> HydraError:
    return HydraError(
        f"the kernels of the delta rule in this version of vLLM are not those that this package knows: {why}. "
        f'--additional-config \'{{"{OPTION}": "full"}}\' leaves tuning and compilation to Triton'
    )


class SharedChoices(dict[tuple[Any, ...], Any]):
    """A tuner's choices by key, without the number of heads.

    Args:
        position: of the number of heads in a key.
    """

    def __init__(self, position: int) -> None:
        super().__init__()
        self.position = position

    def _common(self, key: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*key[: self.position], None, *key[self.position + 1 :])

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(self._common(key))

    def __getitem__(self, key: tuple[Any, ...]) -> Any:
        return super().__getitem__(self._common(key))

    def __setitem__(self, key: tuple[Any, ...], choice: Any) -> None:
        super().__setitem__(self._common(key), choice)


_as_shipped: dict[int, tuple[list[Any], bool]] = {}
"""Configurations and ``cache_results`` of tuners that were changed, by id: they live with the process."""


def set_tuning(tuners: Sequence[Any], tuning: str) -> None:
    """Set how ``tuners`` choose. Choices that were made in the same way are kept.

    With ``once``, Triton also writes the choices to its cache folder, so the next start reads them.
    """
    for tuner in tuners:
        configs, cached = _as_shipped.setdefault(id(tuner), (tuner.configs, tuner.cache_results))
        tuner.configs = configs[:1] if tuning == "off" else configs
        tuner.cache_results = cached or tuning == "once"
        if (tuning == "once") != isinstance(tuner.cache, SharedChoices):
            position = tuner.keys.index(HEADS)
            tuner.cache = SharedChoices(position) if tuning == "once" else {}


@contextlib.contextmanager
def compiling(tuners: Sequence[Any], threads: int) -> Iterator[None]:
    """Compile the Triton kernels that are launched inside, in parallel, and do not run them.

    All kernels are compiled when the block ends. If a tuner has no choice yet, all of its configurations are
    compiled, and no choice is made. A configuration that fails to compile is skipped; the later launch that
    needs it raises the error. No kernel writes, so launch them on tensors that nobody reads.

    Args:
        tuners: every tuner whose kernels may be launched inside.
        threads: largest number of parallel compilations.
    """
    from concurrent.futures import ThreadPoolExecutor

    from triton import AsyncCompileMode
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    def untimed(call: Callable[[], Any], quantiles: Sequence[float]) -> list[float]:
        call()
        return [0.0 for _ in quantiles]

    with contextlib.ExitStack() as undo:
        for tuner in tuners:
            undo.callback(_restore, tuner, dict(tuner.__dict__), set(tuner.cache))
            tuner.do_bench, tuner.cache_results = untimed, False
        undo.callback(setattr, JITFunction, "run", launch)
        JITFunction.run = compile_only
        undo.enter_context(one_parser())
        executor = undo.enter_context(ThreadPoolExecutor(threads))
        undo.enter_context(AsyncCompileMode(executor, ignore_errors=True))
        yield


def _restore(tuner: Any, attributes: dict[str, Any], chosen: set[Any]) -> None:
    tuner.__dict__.clear()
    tuner.__dict__.update(attributes)
    for key in set(tuner.cache) - chosen:
        del tuner.cache[key]


class Layer(Protocol):
    """What :class:`KernelStart` needs from the GDN heads of a layer."""

    prefix: str
    local_heads: int

    def kernel_shape(self) -> tuple[Any, ...]:
        """A key that is equal for layers with equal kernels."""

    def launch_prompt(self, tokens: int) -> None:
        """Run the delta rule of one prompt with ``tokens`` tokens on random numbers."""

    def launch_step(self, metadata: Any) -> None:
        """Launch all kernels of a step on uninitialised numbers. No state changes."""


class KernelStart:
    """Tunes and compiles the kernels of all layers in this process.

    Args:
        layers: with GDN heads.
        tuning: one of :data:`TUNINGS`.
        tokens: length of the prompt that is timed.
        log: called with a line about each finished work.
        threads: parallel compilations; default: the cores of this process, :data:`MOST_THREADS` at most.
        tuners: default: the result of :func:`delta_rule_tuners`.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        tuning: str,
        tokens: int,
        log: Callable[[str], None],
        threads: int | None = None,
        tuners: Sequence[Any] | None = None,
    ) -> None:
        shapes = {layer.kernel_shape(): layer for layer in layers}
        counts = collections.Counter(layer.local_heads for layer in layers)
        self.layers = list(shapes.values())
        self.heads = max(counts, key=lambda heads: (counts[heads], heads))
        self.tuning, self.tokens, self.log = tuning, tokens, log
        self.threads = threads or max(1, min(len(os.sched_getaffinity(0)), MOST_THREADS))
        self._tuners = tuners
        self._tuned = False
        self._kinds: set[Any] = set()

    @property
    def tuners(self) -> Sequence[Any]:
        """The tuners, set to :attr:`tuning`."""
        if self._tuners is None:
            self._tuners = delta_rule_tuners()
        return self._tuners

    def tune(self) -> None:
        """Choose the configurations at the first call; later calls do nothing. Needs a GPU."""
        if self._tuned:
            return
        self._tuned = True
        if (
            self.tuning != "full" or _as_shipped
        ):  # another engine of this process may have changed them
            set_tuning(self.tuners, self.tuning)
        if self.tuning != "once":
            return
        layer = next(layer for layer in self.layers if layer.local_heads == self.heads)
        start = time.perf_counter()
        with compiling(self.tuners, self.threads):
            layer.launch_prompt(self.tokens)
        compiled = time.perf_counter()
        layer.launch_prompt(self.tokens)
        number = sum(len(tuner.configs) for tuner in self.tuners)
        self.log(
            f"delta rule of prompts: {number} configurations compiled in {compiled - start:.1f} s by "
            f"{self.threads} threads, timed for {self.heads} heads and {self.tokens} tokens in "
            f"{time.perf_counter() - compiled:.1f} s"
        )

    def step(self, kind: Any, metadata: Callable[[Layer], Any]) -> None:
        """Compile the kernels of all layers for the first step of a kind.

        Args:
            kind: steps of the same kind launch the same kernels.
            metadata: returns a layer's metadata of this step.
        """
        if kind in self._kinds:
            return
        self._kinds.add(kind)
        self.tune()  # where vLLM has not measured memory
        if self.tuning == "full":
            return
        start = time.perf_counter()
        with compiling(self.tuners, self.threads):
            for layer in self.layers:
                layer.launch_step(metadata(layer))
        self.log(
            f"kernels of steps with {kind}: compiled for {len(self.layers)} shapes of layers in "
            f"{time.perf_counter() - start:.1f} s by {self.threads} threads"
        )


__all__ = [
    "KERNELS",
    "OPTION",
    "TUNINGS",
    "KernelStart",
    "SharedChoices",
    "compiling",
    "delta_rule_tuners",
    "read_tuning",
    "set_tuning",
]
