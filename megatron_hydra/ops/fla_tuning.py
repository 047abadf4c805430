"""Shorten the preparation of FLA's kernels: imports, tuning, and parallel compilation.

For every number of heads, FLA's Triton kernels are compiled again, each in several configurations. These are
timed, and the fastest is kept. In a head-level hybrid the number of heads differs between layers, so this would
happen ten times. Here it happens once: the choice is written in FLA's own format, and FLA uses it for other
numbers of heads (``FLA_CACHE_MODE=fuzzy``), which then compile one configuration. The configurations of one
kernel are compiled in parallel.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_hydra.files import write_json_atomic
from megatron_hydra.ops import kernel_cache
from megatron_hydra.ops.kernels import Case
from megatron_hydra.ops.one_parser import one_parser

_log = logging.getLogger(__name__)

_MODE, _FOLDER = "FLA_CACHE_MODE", "FLA_CONFIG_DIR"
_FLASH_QLA, _FLASH_QLA_PACKAGE = "FLA_FLASH_QLA", "flash_qla"

_PREFIX = "fla-"
"""Prefix of the folders of choices, which are beside the records of the kernel cache."""

_NOT_NEEDED = ("fla.layers", "fla.models")
"""Packages of flash-linear-attention that are not used here. They import transformers' models, which takes
seconds."""


_refused: set[int] = set()
"""Numbers of heads that FlashQLA cannot compute on this process's card."""


def flash_qla_refuses(heads: int) -> bool:
    """Whether FLA's own kernels compute so many heads, because FlashQLA failed on them."""
    return heads in _refused


def is_flash_qla(case: Case, heads: int) -> bool:
    """Whether FLA would give so many heads to FlashQLA, and we may prevent it.

    If the user sets ``FLA_FLASH_QLA``, we do not prevent it, and a failure of FlashQLA is an error.
    """
    fla = case.rule.fla
    if fla is None or case.head_dim != fla.flash_qla_head_dim or _FLASH_QLA in os.environ:
        return False
    if case.dtype not in (torch.bfloat16, torch.float16) or heads in _refused:
        return False
    return importlib.util.find_spec(_FLASH_QLA_PACKAGE) is not None


def refuse_flash_qla(case: Case, heads: int, why: str) -> None:
    """Let FLA's own kernels compute so many heads from now on, here and in later processes.

    For some numbers of heads, TileLang finds no layout for FlashQLA's kernels (7, with FlashQLA 0.1.3 and
    TileLang 0.1.15), while other layers of the same run work. The record is for this card, these versions and
    sources.
    """
    _refused.add(heads)
    kernel_cache.record(_refusal(case, heads), {"heads": heads, "why": why})
    _log.warning(
        "FlashQLA cannot compute the gated delta rule of %d heads here (%s): FLA's own kernels do, more "
        "slowly. FLA_FLASH_QLA=1 insists on FlashQLA, FLA_FLASH_QLA=0 never uses it",
        heads, why,
    )  # fmt: skip


def _refusal(case: Case, heads: int) -> str:
    facts = {**kernel_cache.fingerprint(case.device), "environment": {}}
    return f"no-flash-qla-{kernel_cache.key_of([facts, str(case.dtype), heads])}"


def use_choices(case: Case, flas_own_cp: bool = False) -> None:
    """Let FLA use the configurations that were chosen for this card, dtype and head dimension.

    FLA's own kernels compute the numbers of heads on which FlashQLA has failed.

    Call it before FLA is imported. It does not change variables that the user has set.

    Args:
        case: the run's.
        flas_own_cp: whether FLA passes states between ranks itself. FLA then refuses FlashQLA at every call
            under context parallelism. FlashQLA is switched off, so that the start-up check does not compile it.
    """
    _refused.update(
        heads
        for heads in case.gdn_heads
        if is_flash_qla(case, heads) and kernel_cache.is_recorded(_refusal(case, heads))
    )
    if case.context_parallel and flas_own_cp:
        kernel_cache.decide(_FLASH_QLA, "0")
    mine = kernel_cache.RECORDS in os.environ.get(_FOLDER, kernel_cache.RECORDS)
    if not mine or (_MODE in os.environ and _FOLDER not in os.environ):
        return
    os.environ[_MODE] = "fuzzy"
    os.environ[_FOLDER] = str(choices_folder(case))


def choices_folder(case: Case) -> Path:
    """The folder of a case's choices. It is in Triton's cache and disappears with it."""
    facts = [kernel_cache.fingerprint(case.device), str(case.dtype), case.head_dim]
    name = _PREFIX + kernel_cache.key_of(facts)
    return kernel_cache.triton_folder() / kernel_cache.RECORDS / name


def import_fla() -> None:
    """Import FLA's gated delta rule, without its layers and models.

    Raises:
        ImportError: FLA or something that it needs is missing.
    """
    hidden = [name for name in _NOT_NEEDED if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        import fla.ops.gated_delta_rule  # noqa: F401
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


def write_choices() -> int:
    """Write the chosen configuration of every FLA kernel of this process.

    Returns:
        The number of new choices in the folder.
    """
    folder = os.environ.get(_FOLDER, "")
    if kernel_cache.RECORDS not in folder:
        return 0
    from fla.ops.utils.cache import CachedAutotuner

    # By type: isinstance also reads an object's __class__, for which some objects warn.
    tuned = [x for x in gc.get_objects() if issubclass(type(x), CachedAutotuner) and x.cache]
    return sum(_write(Path(folder), kernel) for kernel in tuned)


def _write(folder: Path, kernel: Any) -> int:
    """``folder/<kernel>.json``, in the format of ``fla/ops/utils/cache.py``."""
    from fla.ops.utils.cache import AutotuneKey

    if len(kernel.configs) < 2:
        return 0
    path = folder / f"{kernel.kernel_name}.json"
    entries: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        entries = json.loads(path.read_text())["autotune_entries"]
    before = len(entries)
    for key, chosen in kernel.cache.items():
        entries.setdefault(
            AutotuneKey.key_hash(key),
            {"autotune_key": AutotuneKey.normalize_autotune_key(key), "config": _as_json(chosen)},
        )
    if len(entries) == before:
        return 0
    body = {"kernel_name": kernel.kernel_name, "autotune_entries": entries}
    write_json_atomic(path, body)
    return len(entries) - before


def _as_json(config: Any) -> dict[str, Any]:
    names = ("kwargs", "num_warps", "num_stages", "num_ctas", "maxnreg", "ir_override")
    return {name: getattr(config, name, None) for name in names}


@contextlib.contextmanager
def configurations_compiled_together(
    threads: int, tell: Callable[[str], None] = lambda name: None
) -> Iterator[None]:
    """While the block runs, a Triton kernel compiles all configurations in parallel before it is tuned.

    They are then timed one after the other, as usual. Without this block, each is compiled just before its
    timing.

    Args:
        threads: compilations at a time; most of each is outside the interpreter's lock.
        tell: called with a kernel's name before it is compiled.
    """
    try:
        from triton.runtime._async_compile import AsyncCompileMode
        from triton.runtime.autotuner import Autotuner
    except ImportError:  # no Triton, or one without these: kernels compile one by one
        yield
        return
    one_by_one = Autotuner.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        key = _tuning_key(self, args, kwargs)
        if (
            len(self.configs) > 1
            and key not in self.cache
            and key not in seen.setdefault(id(self), set())
        ):
            seen[id(self)].add(key)
            tell(self.base_fn.__name__)
            _compile_all(self, args, kwargs, AsyncCompileMode, pool)
        return one_by_one(self, *args, **kwargs)

    seen: dict[int, set[tuple[Any, ...]]] = {}
    with one_parser(), concurrent.futures.ThreadPoolExecutor(threads, "compile") as pool:
        Autotuner.run = run
        try:
            yield
        finally:
            Autotuner.run = one_by_one


def _tuning_key(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """As ``triton.runtime.autotuner.Autotuner.run`` makes it."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    tracked = {name: value for name, value in given.items() if name in kernel.arg_names}
    key = [tracked[name] for name in kernel.keys if name in tracked]
    return (*key, *(str(value.dtype) for value in tracked.values() if hasattr(value, "dtype")))


def _compile_all(
    kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: Any, pool: Any
) -> None:
    """Compile every configuration that would be timed; one that does not compile is not an error here."""
    options = {name: value for name, value in kwargs.items() if name != "warmup"}
    try:
        with mode(pool, ignore_errors=True):
            kernel.warmup(*args, **options)
    except Exception as error:  # then they compile one by one and report the error
        _log.debug("%s: not compiled ahead: %s", kernel.base_fn.__name__, error)
