"""Worker process that calls a run's kernels once (:mod:`.rehearsal`) on orders of :mod:`.warm_up`.

    python -m megatron_hydra.training.warm_worker

It reads one JSON object per line from standard input: first the run, then one order after the other. It
answers with one JSON object per line on standard output. All other output goes to the compile log. It ends
when its input closes, so it does not outlive the process that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hydra.config.loading import from_dict
from megatron_hydra.config.model import ModelConfig
from megatron_hydra.config.run import RunConfig
from megatron_hydra.errors import HydraError
from megatron_hydra.watchdog import Watchdog

if TYPE_CHECKING:
    from megatron_hydra.training.rehearsal import Scene

LIMIT_SECONDS = 1800
"""Time limit of a part of a scene. After it, the process writes its stacks and ends."""


class Worker:
    """Carries out the orders of one run.

    Args:
        order: ``config``, ``model`` and ``teacher`` as plain data, ``device`` (index of the GPU) and
            ``threads``.
        say: function that sends an answer.
    """

    def __init__(self, order: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
        self.config = from_dict(RunConfig, order["config"])
        self.model = from_dict(ModelConfig, order["model"])
        teacher = order["teacher"]
        self.teacher = None if teacher is None else from_dict(ModelConfig, teacher)
        self.device, self.threads = order["device"], order["threads"]
        self.say = say

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Import all modules, select the GPU, and let a kernel's configurations compile in parallel."""
        from megatron_hydra.ops.determinism import make_deterministic
        from megatron_hydra.ops.fla_tuning import configurations_compiled_together
        from megatron_hydra.parallel import platform
        from megatron_hydra.training import rehearsal  # noqa: F401

        if self.config.deterministic:
            make_deterministic()  # uses other kernels, and does not choose them by speed
        if platform.device_count():
            platform.bind_process_to_device(self.device)

        def tell(kernel: str) -> None:
            self.say({"kernel": kernel})

        with configurations_compiled_together(self.threads, tell):
            yield

    def do(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out an order.

        Args:
            order: ``{"scene": number}``, ``{"check": true}``, ``{"kernel": kernel}``, or ``{"play": number}``,
                after which the process must end.

        ``play`` says ``{"noted": kernel}`` for every kernel of TileLang that the scene and the check ask for.

        Returns:
            ``{"done": …}`` with the highest memory so far in bytes.

        Raises:
            HydraError: a kernel fails the start-up check.
        """
        import torch

        from megatron_hydra.model.layer_spec import kernel_case
        from megatron_hydra.ops import fla_tuning, tilelang_kernels
        from megatron_hydra.parallel import platform
        from megatron_hydra.training.rehearsal import check, play, scenes

        if "kernel" in order:
            self.say({"part": order["kernel"]["name"]})
            tilelang_kernels.compile_kernel(order["kernel"])
        elif "play" in order:
            self.say({"part": "listing TileLang's kernels"})
            scene = scenes(self.config, self.model)[order["play"]]
            play(self.config, self.model, self.teacher, scene, lambda k: self.say({"noted": k}))
        elif "check" in order:
            self.say({"part": "start-up check"})
            check(self.config, self.model, self.teacher)
        else:
            scene = scenes(self.config, self.model)[order["scene"]]
            case = kernel_case(self.model, self.config)
            try:
                self._rehearse(scene)
            except Exception as error:
                is_room = isinstance(error, (torch.OutOfMemoryError, OSError))
                may_be_it = bool(scene.gdn_heads) and fla_tuning.is_flash_qla(case, scene.gdn_heads)
                if is_room or not may_be_it:
                    raise
                # FlashQLA's kernels fail most often. If another kernel has failed, the retry fails as well.
                traceback.print_exc()
                fla_tuning.refuse_flash_qla(
                    case, scene.gdn_heads, f"{type(error).__name__}: {error}"[:300]
                )
                self._rehearse(scene)
            fla_tuning.write_choices()
        return {"done": order, "memory": platform.peak_memory_bytes()}

    def _rehearse(self, scene: Scene) -> None:
        from megatron_hydra.training.rehearsal import rehearse

        for part in rehearse(self.config, self.model, self.teacher, scene):
            self.say({"part": part})


def serve(orders: Iterator[dict[str, Any]], say: Callable[[dict[str, Any]], None]) -> int:
    """Carry out orders until there are no more."""
    worker = Worker(next(orders), say)
    with worker.ready():
        say({"ready": True})
        for order in orders:
            try:
                with Watchdog(LIMIT_SECONDS):
                    say(worker.do(order))
            except HydraError as error:
                say({"refused": str(error)})
            # A compiler can raise any error; the run can start without this scene.
            except Exception as error:
                traceback.print_exc()
                say({"failed": f"{type(error).__name__}: {str(error)[:500]}"})
    return 0


def _lines(stream: Any) -> Iterator[dict[str, Any]]:
    for line in stream:
        yield json.loads(line)


def _orders_until_stdin_closes() -> Iterator[dict[str, Any]]:
    """Yield orders from standard input. When it closes, end this process group at once."""
    arrived: queue.Queue[dict[str, Any]] = queue.Queue()

    def read() -> None:
        for order in _lines(sys.stdin):
            arrived.put(order)
        if os.getpgrp() == os.getpid():  # ends the compilers that this process started as well
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while True:
        order = arrived.get()
        if "end" in order:
            return
        yield order


def main() -> int:
    """Entry point."""
    from megatron_hydra.ops.compiler_output import compiler_output_to

    orders = _orders_until_stdin_closes()
    first = next(orders)
    answers = os.fdopen(os.dup(1), "w", buffering=1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")

    def all_orders() -> Iterator[dict[str, Any]]:
        yield first
        yield from orders

    with compiler_output_to(Path(first["log"]), errors=True):
        return serve(all_orders(), say)


if __name__ == "__main__":
    raise SystemExit(main())
