"""Kernels are compiled once for each node: which process compiles, waits, records and stops.

Workers are small scripts with the worker's protocol; one slow test uses the real one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_hydra.config.loading import to_yaml
from megatron_hydra.errors import HydraError
from megatron_hydra.ops import kernel_cache
from megatron_hydra.ops.compiler_output import COMPILE_LOG
from megatron_hydra.stopping import REQUEUE_EXIT_CODE, StopRequest
from megatron_hydra.training import warm_up
from megatron_hydra.training.rehearsal import scenes
from megatron_hydra.training.warm_up import WarmUp, compile_once_per_node, warning_of
from tests.training import tiny

_WORKER = """
import json, os, sys, time

first = json.loads(sys.stdin.readline())
journal = open(os.environ["JOURNAL"], "a", buffering=1)


def say(**answer):
    print(json.dumps(answer), flush=True)


def note(what):
    journal.write(json.dumps([os.getpid(), what, time.time()]) + "\\n")


note(["started", first["device"], os.environ.get("RANK"), os.environ.get("LOCAL_RANK")])
say(ready=True)
for line in sys.stdin:
    order = json.loads(line)
    if "end" in order:
        break
    number = order.get("scene", "check")
    number = order["kernel"]["name"] if "kernel" in order else "play" if "play" in order else number
    note(["begin", number])
    say(part=f"scene {number}")
    say(kernel="a kernel")
    {behaviour}
    time.sleep(0.2)
    note(["end", number])
    for name in ("bwd", "a", "forward") if number == "play" else ():
        say(noted={"name": name, "source": len(name)})
    say(done=order, memory=0)
"""


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TILELANG_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "caches" / name))
    monkeypatch.setenv("JOURNAL", str(tmp_path / "journal"))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    return tmp_path / "caches"


def _worker(folder: Path, behaviour: str = "pass") -> tuple[str, str]:
    script = folder / "worker.py"
    script.write_text(_WORKER.replace("{behaviour}", behaviour))
    return sys.executable, str(script)


def _journal(folder: Path) -> list[tuple[int, list[Any], float]]:
    return [json.loads(line) for line in (folder / "journal").read_text().splitlines()]


def _config(folder: Path, **sections: Any) -> Any:
    sections = {"parallel": {"tensor": 2}, **sections}
    return tiny.run_config(folder, "finetune", "run", **sections)


MODEL = tiny.student_config(tiny.DEEP)


def _compile(
    folder: Path, *, config: Any = None, model: Any = MODEL, **options: Any
) -> tuple[WarmUp, list[str]]:
    lines: list[str] = []
    options = {"cards": 2, "local_rank": 1, "tell": lines.append, **options}
    options["worker"] = options.get("worker") or _worker(folder)
    with StopRequest():
        return compile_once_per_node(config or _config(folder), model, None, **options), lines


def test_the_first_scene_runs_alone_and_the_check_runs_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(warm_up, "PROGRESS_SECONDS", 0.0)
    result, lines = _compile(tmp_path)
    count = len(scenes(_config(tmp_path), MODEL))
    assert count >= 3
    assert (result.ready, result.compiled, result.problem) == (True, count, "")
    journal = _journal(tmp_path)
    begun = [what[1] for _, what, _ in journal if what[0] == "begin"]
    assert begun[0] == 0
    assert sorted(begun, key=str) == sorted([*range(count), "check"], key=str)
    times = {(what[0], what[1]): at for _, what, at in journal if what[0] != "started"}
    assert all(times["begin", n] >= times["end", 0] for n in (*range(1, count), "check"))
    starts = [what for _, what, _ in journal if what[0] == "started"]
    assert len(starts) == 3  # half of the cores compile
    assert {what[1] for what in starts} == {0, 1}  # on both cards
    assert all(what[2:] == [None, None] for what in starts)  # not a rank of the run
    assert lines[0].startswith("compiling this run's kernels: ")
    assert str(tmp_path / "run" / COMPILE_LOG) in lines[0]
    assert any("; now scene 0: a kernel" in line for line in lines), lines


def test_the_check_waits_for_no_scene_but_the_first(tmp_path: Path) -> None:
    """It compiles its own kernels, so it must not start last."""
    todo = [{"scene": 0}, {"scene": 1}, {"scene": 2}, {"check": True}]
    team = warm_up._WorkerPool({"log": "x"}, todo, 0, 1, _worker(tmp_path), print)
    assert team.waiting == [{"scene": 0}, {"check": True}, {"scene": 1}, {"scene": 2}]
    alone = warm_up._WorkerPool({"log": "x"}, todo[3:], 0, 1, _worker(tmp_path), print)
    assert (alone.waiting, alone.num_scenes) == ([{"check": True}], 0)


@pytest.mark.parametrize(
    "behaviour",
    [
        "pass",
        "if number == 'bwd': say(failed='no layout found'); continue",
        "if number == 'play': say(failed='a call failed'); continue",
        "if number == 'play': say(noted={'name': 'early', 'source': 1}); time.sleep(1); os._exit(7)",
        "if number == 'play': os._exit(7)",
    ],
    ids=["all compile", "one fails", "the list fails", "the lister dies later", "the lister dies"],
)
def test_tilelangs_kernels_are_listed_by_a_process_of_their_own_and_compiled_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    """What fails there fails again in its scene, so it is no problem yet."""
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(warm_up, "_asks_for_tilelang", lambda *given: True)
    result, _ = _compile(tmp_path, worker=_worker(tmp_path, behaviour))
    count = len(scenes(_config(tmp_path), MODEL))
    assert (result.ready, result.compiled, result.problem) == (True, count, "")
    journal = _journal(tmp_path)
    begun = [what[1] for _, what, _ in journal if what[0] == "begin"]
    listed = [] if "'play'" in behaviour else ["bwd", "a", "forward"]
    if "say(noted" in behaviour:
        listed = ["early"]
    assert (begun[0], set(begun[1 : 1 + len(listed)])) == ("play", set(listed))
    assert begun[1 + len(listed)] == 0
    assert sorted(begun[2 + len(listed) :], key=str) == sorted([*range(1, count), "check"], key=str)
    of = {what[1]: pid for pid, what, _ in journal if what[0] == "begin"}
    assert list(of.values()).count(of["play"]) == 1
    ended = {what[1]: at for _, what, at in journal if what[0] == "end"}
    first_scene = next(at for _, what, at in journal if what == ["begin", 0])
    assert all(ended[name] <= first_scene for name in listed if name in ended)


def test_a_listed_kernel_is_compiled_once_for_all_runs(
    tmp_path: Path, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_up, "_asks_for_tilelang", lambda *given: True)
    names = {"bwd", "a", "forward"}

    def compiled_of_a_run(tokens: int, behaviour: str = "pass") -> set[str]:
        before = len(_journal(tmp_path)) if (tmp_path / "journal").exists() else 0
        config = _config(tmp_path, data={"sequence_length": tokens})
        assert _compile(tmp_path, config=config, worker=_worker(tmp_path, behaviour))[0].ready
        new = [what[1] for _, what, _ in _journal(tmp_path)[before:] if what[0] == "begin"]
        assert "play" in new
        return names.intersection(map(str, new))

    assert compiled_of_a_run(48, "if number == 'a': say(failed='no layout'); continue") == names
    assert compiled_of_a_run(96) == {"a"}  # it had failed
    assert compiled_of_a_run(144) == set()
    for record in (caches / "TRITON_CACHE_DIR" / kernel_cache.RECORDS).glob("kernel-*"):
        record.unlink()  # as for the cache itself
    assert compiled_of_a_run(192) == names


def test_ready_kernels_are_not_compiled_again(tmp_path: Path, caches: Path) -> None:
    _compile(tmp_path)
    done = len(_journal(tmp_path))
    result, lines = _compile(tmp_path)
    assert result.ready
    assert (result.compiled, lines, len(_journal(tmp_path))) == (0, [], done)
    elsewhere = _config(tmp_path, schedule={"steps": 9}, seed=5)
    assert _compile(tmp_path, config=elsewhere)[0].compiled == 0  # no kernel depends on these
    longer = _config(tmp_path, data={"sequence_length": 96})
    assert _compile(tmp_path, config=longer)[0].compiled
    for record in (caches / "TRITON_CACHE_DIR" / kernel_cache.RECORDS).glob("warm-scene-*"):
        record.unlink()  # as for the cache itself
    assert _compile(tmp_path)[0].compiled


def _begun(folder: Path, **options: Any) -> list[Any]:
    """What the workers of one more run begin."""
    before = len(_journal(folder)) if (folder / "journal").exists() else 0
    _compile(folder, **options)
    return [what[1] for _, what, _ in _journal(folder)[before:] if what[0] == "begin"]


def test_another_head_map_compiles_only_layers_of_new_shapes(tmp_path: Path) -> None:
    """Which heads are FA decides no kernel; how many of a layer, and on which KV heads, does."""
    config = _config(tmp_path, parallel={})
    one, two = ((0,), (1,)), ((0, 1), (2,))
    moved = ((3,), (2,))

    def begun(*heads: tuple[int, ...], verb: str = "finetune", **changes: Any) -> list[Any]:
        model = dataclasses.replace(
            MODEL, num_layers=len(heads), full_attention_heads=heads, **changes
        )
        run = dataclasses.replace(config, verb=verb)
        return _begun(tmp_path, config=run, model=model)

    assert begun(*one) == [0, "check"]
    assert begun(*moved) == []
    assert begun(*moved, (0,), (1,)) == []  # nor does the number of layers
    assert begun(*two) == [1, "check"]  # a new number of GDN heads is checked
    assert begun(*two, *moved) == []
    assert sorted(begun(*two, verb="distill"), key=str) == [0, 1]  # the check knows no verb
    assert begun(*two, norm_eps=1e-5) == [0, "check", 1]


def test_rotary_heads_in_every_second_layer_have_scenes_of_their_own(tmp_path: Path) -> None:
    config = _config(tmp_path, parallel={})
    assert MODEL.hydra is not None

    def begun(every: int) -> list[Any]:
        hydra = dataclasses.replace(MODEL.hydra, fa_rotary_every=every)  # type: ignore[type-var]
        heads = ((0,), (0,))
        model = dataclasses.replace(MODEL, num_layers=2, full_attention_heads=heads, hydra=hydra)
        return _begun(tmp_path, config=config, model=model)

    assert begun(0) == [0, "check"]
    both = begun(2)
    assert len(both) == 1 and both != ["check"]
    assert begun(1) == []


def test_only_what_has_failed_runs_again(tmp_path: Path) -> None:
    config = _config(tmp_path)
    fails = "if number == 1: say(failed='OutOfResources'); continue"
    assert len(_begun(tmp_path, config=config, worker=_worker(tmp_path, fails))) > 2
    assert _begun(tmp_path, config=config) == [1]
    assert _begun(tmp_path, config=config) == []


def test_without_a_gpu_there_is_nothing_to_do(tmp_path: Path) -> None:
    result, lines = _compile(tmp_path, cards=None)
    assert result == WarmUp(True, 0, 0.0)
    assert not lines
    assert not (tmp_path / "journal").exists()


@pytest.mark.parametrize(
    ("behaviour", "problem"),
    [
        ("if number == 1: say(failed='OutOfResources: shared memory'); continue", "OutOfResources"),
        ("if number == 1: os._exit(7)", "a compiling process ended with status 7"),
        ("if number == 0: os.kill(os.getpid(), 11)", "status -11"),
    ],
)
def test_a_failed_scene_is_reported_and_not_recorded(
    tmp_path: Path, behaviour: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    result, _ = _compile(tmp_path, worker=_worker(tmp_path, behaviour))
    assert not result.ready
    assert problem in result.problem
    text = warning_of(result, str(tmp_path / "run"))
    assert problem in text
    assert COMPILE_LOG in text
    begun = {what[1] for _, what, _ in _journal(tmp_path) if what[0] == "begin"}
    assert set(range(len(scenes(_config(tmp_path), MODEL)))) <= begun  # the others still run
    assert _compile(tmp_path)[0].compiled  # it runs again next time


def test_without_workers_the_run_starts_anyway(tmp_path: Path) -> None:
    result, _ = _compile(tmp_path, worker=(sys.executable, "-c", "raise SystemExit(3)"))
    assert not result.ready
    assert "all compiling processes have ended" in result.problem


def test_a_wrong_kernel_ends_the_run_and_the_workers(tmp_path: Path) -> None:
    behaviour = (
        "if number == 'check': say(refused='backend.gated_delta_net=fla is wrong'); continue"
    )
    with pytest.raises(HydraError, match=r"gated_delta_net=fla is wrong .*compile\.log"):
        _compile(tmp_path, worker=_worker(tmp_path, behaviour))
    assert all(_is_gone(pid) for pid, _, _ in _journal(tmp_path))


def test_memory_limits_the_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first worker's memory decides: 30 of 100 bytes leave room for five workers on two cards."""
    team = warm_up._WorkerPool({"log": ""}, [], 0, 2, (), lambda text: None)
    members = [warm_up._WorkerProcess(None) for _ in range(8)]  # type: ignore[arg-type]
    assert team._fitting_workers(members) == 8
    members[0].memory = 30
    monkeypatch.setattr(warm_up.platform, "device_memory_bytes", lambda: 100)
    assert team._fitting_workers(members) == 5
    members[0].memory = 1000
    assert team._fitting_workers(members) == 1


# -- with other processes --------------------------------------------------------------------------

_RANK = """
import json, logging, sys
from tests.training import tiny
from tests.training.test_warm_up import MODEL
from megatron_hydra.config.loading import load_run_config
from megatron_hydra.stopping import StopRequest
from megatron_hydra.training.warm_up import compile_once_per_node
from megatron_hydra.watchdog import Watchdog

config = load_run_config([sys.argv[1]], [])
with Watchdog(config.faults.timeout_seconds), StopRequest():
    result = compile_once_per_node(
        config, MODEL, None, tell=lambda text: print(text, file=sys.stderr, flush=True),
        worker=(sys.executable, sys.argv[2]), cards=1,
    )
print(json.dumps([result.compiled, result.seconds]))
"""


def _rank(folder: Path, behaviour: str = "pass") -> subprocess.Popen[str]:
    # Five times this is less than the slow scene takes, so waiting and compiling feed the watchdog.
    config = _config(folder, faults={"timeout_seconds": 1})
    (folder / "config.yaml").write_text(to_yaml(config))
    script = _worker(folder, behaviour)[1]
    return subprocess.Popen(
        [sys.executable, "-c", _RANK, str(folder / "config.yaml"), script],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_ranks_of_a_node_wait_for_the_one_that_compiles(tmp_path: Path) -> None:
    """They wait longer than their watchdogs allow without feeding; each scene is compiled once."""
    ranks = [_rank(tmp_path, "if number == 0: time.sleep(8)") for _ in range(2)]
    answers = [json.loads(rank.communicate(timeout=200)[0]) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    count = len(scenes(_config(tmp_path), MODEL))
    assert sorted(compiled for compiled, _ in answers) == [0, count]
    begun = [what[1] for _, what, _ in _journal(tmp_path) if what[0] == "begin"]
    assert sorted(begun, key=str) == sorted([*range(count), "check"], key=str)


def _is_gone(pid: int) -> bool:
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        try:
            if state.read_text().split()[2] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_a_stopped_rank_ends_its_workers(tmp_path: Path) -> None:
    """The next process compiles the scenes that they were compiling."""
    rank = _rank(tmp_path, "time.sleep(1000)")
    while not (tmp_path / "journal").exists() or "begin" not in (tmp_path / "journal").read_text():
        assert rank.poll() is None, rank.communicate()[1]
        time.sleep(0.1)
    rank.terminate()
    _, errors = rank.communicate(timeout=30)
    assert rank.returncode == REQUEUE_EXIT_CODE
    assert "nothing to save yet (kernels are being compiled)" in errors
    assert all(_is_gone(pid) for pid, _, _ in _journal(tmp_path))
    assert _compile(tmp_path)[0].compiled


@pytest.mark.gpu
def test_flash_qlas_kernels_are_compiled_by_several_processes_and_each_once(
    tmp_path: Path, caches: Path
) -> None:
    """The scene and the check find them all in TileLang's cache."""
    pytest.importorskip("flash_qla")
    shape = {"num_layers": 1, "num_query_heads": 16, "num_kv_heads": 8, "head_dim": 128}
    model = dataclasses.replace(MODEL, **shape, full_attention_heads=((0, 8),))  # type: ignore[arg-type]
    sections = {"parallel": {}, "precision": "bf16", "data": {"sequence_length": 8192}}
    config = _config(tmp_path, **sections)
    if not warm_up._asks_for_tilelang(config, model):
        pytest.skip("FlashQLA does not run on this GPU")
    with StopRequest():
        result = compile_once_per_node(config, model, None, tell=print)
    assert (result.ready, result.problem) == (True, "")
    print(f"{result.seconds:.0f} s with empty caches")
    compiled = (tmp_path / "run" / COMPILE_LOG).read_text().count("begins to compile kernel")
    kept = list((caches / "TILELANG_CACHE_DIR").glob("*/cuda-binaries/*"))
    assert compiled == len(kept) >= 10


@pytest.mark.slow
def test_the_real_worker_compiles_and_checks(tmp_path: Path) -> None:
    """On the CPU it compiles nothing but makes all calls; it ends with the process that started it."""
    config = _config(tmp_path, parallel={"tensor": 2, "sequence": True}, precision="bf16")
    model = dataclasses.replace(MODEL, num_layers=2, full_attention_heads=tiny.HEADS[:2])
    lines: list[str] = []
    with StopRequest():
        result = compile_once_per_node(config, model, None, tell=lines.append, cards=1)
    assert (result.ready, result.problem) == (True, "")
    assert result.compiled == len(scenes(config, model))
    assert (tmp_path / "run" / COMPILE_LOG).is_file()

    process = subprocess.Popen(
        warm_up.WORKER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) != 0
