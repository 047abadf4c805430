"""How long FLA's kernels take to be ready: what is imported, what is tuned, what is compiled at once.

FLA's Triton kernels are compiled again for every number of heads, each in several configurations, which
are timed; the fastest is kept. In a head-level hybrid the number differs from layer to layer, so that
would be done ten times over. Here it is done once: the choice is written down in FLA's own format, and
FLA takes it for other numbers of heads (``FLA_CACHE_MODE=fuzzy``), which then compile one configuration.
The configurations of one kernel are compiled side by side.
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

_log = logging.getLogger(__name__)

_MODE, _FOLDER = "FLA_CACHE_MODE", "FLA_CONFIG_DIR"
_FLASH_QLA, _FLASH_QLA_PACKAGE = "FLA_FLASH_QLA", "flash_qla"

_PREFIX = "fla-"
"""Of the folders of choices, beside the records of the kernel cache."""

_NOT_NEEDED = ("fla.layers", "fla.models")
"""Of flash-linear-attention: they import transformers' models, for seconds, and are not used here."""


_refused: set[int] = set()
"""Numbers of heads that FlashQLA cannot compute on this process's card."""


def flash_qla_refuses(heads: int) -> bool:
    """Whether FLA's own kernels compute so many heads, because FlashQLA failed on them."""
    return heads in _refused


def is_flash_qla(case: Case, heads: int) -> bool:
    """Whether FLA would hand so many heads to FlashQLA, and may be told not to.

    A user who sets ``FLA_FLASH_QLA`` has decided; then a failure of FlashQLA stays one.
    """
    fla = case.rule.fla
    if fla is None or case.head_dim != fla.flash_qla_head_dim or _FLASH_QLA in os.environ:
        return False
    if case.dtype not in (torch.bfloat16, torch.float16) or heads in _refused:
        return False
    return importlib.util.find_spec(_FLASH_QLA_PACKAGE) is not None


def refuse_flash_qla(case: Case, heads: int, why: str) -> None:
    """From now on FLA's own kernels compute so many heads, here and in later processes.

    TileLang finds no layout for FlashQLA's kernels for some numbers of heads (7, with FlashQLA 0.1.3 and
    TileLang 0.1.15), and other layers of the same run are fine. The record is for this card, these versions
    and sources.
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
    """Point FLA to the configurations that were chosen for this card, dtype and head dimension.

    Numbers of heads that FlashQLA was found to fail on go to FLA's own kernels.

    Call it before FLA is imported. Variables that the user has set stay as they are.

    Args:
        case: the run's.
        flas_own_cp: whether FLA passes states between ranks itself. It then declines FlashQLA at every call
            under context parallelism, which is switched off, so that the start-up check does not compile it.
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
    """Where the choices of a case are kept: in Triton's cache, and gone with it."""
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
    """Write down which configuration every FLA kernel of this process has settled on.

    Returns:
        How many choices the folder got that it did not have.
    """
    folder = os.environ.get(_FOLDER, "")
    if kernel_cache.RECORDS not in folder:
        return 0
    from fla.ops.utils.cache import CachedAutotuner

    # By type: isinstance also asks an object for its class, and some answer with a warning.
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
    """While the block runs, a Triton kernel that is to be tuned compiles all configurations at once.

    They are then timed one after the other, as always. Without this, each is compiled when its turn to
    be timed has come.

    Args:
        threads: compilations at a time; most of each is outside the interpreter's lock.
        tell: called with a kernel's name before it is compiled.
    """
    try:
        from triton.runtime._async_compile import AsyncCompileMode
        from triton.runtime.autotuner import Autotuner
    except ImportError:  # no Triton, or one without: kernels compile one by one
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
    with concurrent.futures.ThreadPoolExecutor(threads, "compile") as pool:
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
    except Exception as error:  # then they compile one by one, and say what is wrong
        _log.debug("%s: not compiled ahead: %s", kernel.base_fn.__name__, error)
