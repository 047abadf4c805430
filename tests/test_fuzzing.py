# ruff: noqa: E501  (tables of arguments)
"""Any content of a file, an argument or the environment gives a result or a named error.

    pytest -m slow tests/test_fuzzing.py --fuzz-seconds 600 --fuzz-seed 7

tries other inputs for ten minutes in total. A failed case prints its number; --fuzz-seed with this number runs
it first.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megatron_hydra.config import load_run_config, to_yaml
from megatron_hydra.errors import HydraError, command
from tests.data.corpora import train_tokenizer, write_jsonl
from tests.experiments.conftest import BODY
from tests.fuzzing import (
    NASTY_TEXTS,
    NASTY_YAML,
    Target,
    mutate_arguments,
    mutate_file,
    other_text,
)
from tests.selection.helpers import tiny_model
from tests.training import tiny

ROOT = Path(__file__).parents[1]
CASE_SECONDS = 180
"""Seconds: a case that takes longer hangs."""
MEMORY_BYTES = 24 * 2**30
"""Address space of a case: an absurdly large size must not take the machine's memory."""


def _main(module: str) -> Callable[[list[str]], int]:
    def main(arguments: list[str]) -> int:
        sys.argv = [module, *arguments]
        return importlib.import_module(module).main()

    return main


TARGETS = {
    "train --dry-run": Target(
        _main("megatron_hydra.train"),
        lambda f: ["--config", f"{f}/run.yaml", "--dry-run", "--world-size", "2", "schedule.steps=3"],
        ("run.yaml", "student/*.json"),
    ),
    "train": Target(
        _main("megatron_hydra.train"),
        lambda f: ["--config", f"{f}/run.yaml", "schedule.steps=2", "optimizer.lr=1e-3", "data.blend.0.weight=2"],
        ("run.yaml", "student/*.json", "text.*", "student/weights/*"),
    ),
    "tokenize": Target(
        _main("data_prep.tokenize"),
        lambda f: ["--input", f"{f}/corpus.jsonl", "--tokenizer", f"{f}/tokenizer", "--output", f"{f}/out",
                   "--workers", "0", "--max-tokens", "1000", "--unit-size", "0.01", "--max-bad-rows", "3"],
        ("corpus.jsonl", "tokenizer/*"),
        ("--chat", "--shard", "--format", "--column", "--eod-token", "--exact", "--keep-empty", "--tools-column"),
    ),
    "pack": Target(
        _main("data_prep.pack"),
        lambda f: ["--input", f"{f}/text", "--sequence-length", "64", "--seed", "1"],
        ("text.*",),
        ("--upsample", "--packing", "--cache-dir"),
    ),
    "pack --config": Target(
        _main("data_prep.pack"), lambda f: ["--config", f"{f}/run.yaml"], ("run.yaml", "text.*")
    ),
    "inspect": Target(
        _main("data_prep.inspect"),
        lambda f: ["--input", f"{f}/text", "--tokenizer", f"{f}/tokenizer", "--samples", "1", "--first", "0",
                   "--steps", "2", "--sequence-length", "64", "--duplicates"],
        ("text.*", "tokenizer/*"),
        ("--upsample", "--verify", "--histogram"),
    ),
    "sample": Target(
        _main("data_prep.sample"),
        lambda f: ["--model", f"{f}/hf", "--tokenizer", f"{f}/tokenizer", "--input", f"{f}/corpus.jsonl", "--device", "cpu",
                   "--output", f"{f}/written.jsonl", "--max-new-tokens", "2", "--batch-size", "8", "--max-bad-rows", "30"],
        ("corpus.jsonl", "hf/*.json", "tokenizer/*"),
        ("--chat", "--shard", "--temperature", "--top-p", "--top-k", "--samples", "--format", "--column", "--dtype"),
    ),
    "merge": Target(
        _main("data_prep.merge"),
        lambda f: ["--input", f"{f}/one", f"{f}/two", "--output", f"{f}/both"],
        ("one.*", "two.*"),
        ("--shards", "--force"),
    ),
    "plan": Target(
        _main("tools.plan"),
        lambda f: ["--model", f"{f}/hf", "--seq", "2048", "--gpus", "2", "--gpu", "h100", "--ratio", "2:1"],
        ("hf/config.json",),
        ("--tokens", "--top", "--efficiency", "--verb", "--price-per-gpu-hour"),
    ),
    "partition": Target(
        _main("tools.partition"),
        lambda f: ["--checkpoint", f"{f}/student", "--tensor", "2", "--sequence-length", "64"],
        ("student/*.json",),
        ("--fa-partition", "--head-map"),
    ),
    "hf_to_megatron": Target(
        _main("tools.hf_to_megatron"),
        lambda f: ["--hf-path", f"{f}/hf", "--output", f"{f}/new"],
        ("hf/config.json", "hf/model.safetensors"),
        ("--head-map", "--set", "--half-life", "--seed", "--calibration-file", "--calibration-tokens"),
    ),
    "megatron_to_hf": Target(
        _main("tools.megatron_to_hf"),
        lambda f: ["--checkpoint", f"{f}/student", "--output", f"{f}/export"],
        ("student/*.json", "student/weights/*"),
        ("--dtype", "--max-shard-size"),
    ),
    "evaluate": Target(
        _main("tools.evaluate"),
        lambda f: ["--model", f"{f}/hf", "--tasks", f"{f}/task.jsonl", "--lengths", "64", "--samples", "1", "--depths", "2",
                   "--output", f"{f}/results", "--quiet", "--device", "cpu"],
        ("hf/*.json", "task.jsonl"),
        ("--seed", "--batch-tokens", "--prefill-chunk", "--cache-length", "--haystack", "--dtype", "--lm-eval"),
    ),
    "select_heads": Target(
        _main("tools.select_heads"),
        lambda f: ["--hf-path", f"{f}/hf", "--output", f"{f}/map.json", "--ratio", "2:1", "--strategy", "global_random",
                   "--seed", "1"],
        ("hf/config.json",),
        ("--tasks", "--num-prompts", "--task-weight", "--min-per-layer", "--max-per-layer"),
    ),
    "head_map": Target(
        _main("tools.head_map"), lambda f: ["show", f"{f}/head_map.json", "--top", "3"], ("head_map.json",)
    ),
    "experiment": Target(
        _main("tools.experiment"),
        lambda f: ["run", f"{f}/experiment.yaml", "--output", f"{f}/runs", "--dry-run"],
        ("experiment.yaml",),
        ("--only", "--tokens-scale", "--base", "--gpus", "--workers"),
    ),
    "run_report": Target(
        _main("tools.run_report"), lambda f: [f"{f}/run"], ("run/*",), ("--output",)
    ),
}  # fmt: skip

_KEYS = (
    "schedule.steps",
    "data.blend",
    "data.blend.0.weight",
    "data.blend.7",
    "seed",
    "output.x",
    "x.y",
)
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_JOB_END_TIME")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the commands of :data:`TARGETS` read; every case has a copy."""
    folder = tmp_path_factory.mktemp("fuzzed") / "files"
    tiny.write_all(folder)
    (folder / "tokenizer").mkdir()
    train_tokenizer(folder / "tokenizer")
    write_jsonl(folder / "corpus.jsonl", 20)
    tiny_model("qwen3", vocab_size=512).save_pretrained(folder / "hf")
    config = tiny.run_config(folder, "finetune", "run")
    (folder / "run.yaml").write_text(to_yaml(config), encoding="utf-8")
    # It is small, because a changed argument may let it run.
    (folder / "experiment.yaml").write_text(
        BODY.format(configs=ROOT / "configs").replace("seeds: [0, 1]", "seeds: [0]")
        + "variants:\n  HydraHead: {}\n  random: {selection: {strategy: global_random}}\n",
        encoding="utf-8",
    )
    with contextlib.redirect_stdout(None):
        _main("tools.select_heads")(
            ["--hf-path", f"{folder}/hf", "--output", f"{folder}/head_map.json", "--strategy", "global_random"]
        )  # fmt: skip
    for name in ("one", "two"):
        _main("data_prep.tokenize")(
            ["--input", f"{folder}/corpus.jsonl", "--tokenizer", f"{folder}/tokenizer", "--output", f"{folder}/{name}",
             "--workers", "0"]
        )  # fmt: skip
    task = [{"prompt": list(range(1, 9)), "answer": [3, 4]}, {"prompt": [5, 6], "answer": [7]}]
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task))
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text(to_yaml(config), encoding="utf-8")
    entry = {"step": 1, "loss": 2.0, "lr": 1e-3, "tokens": 10, "tokens_per_s": 3.0}
    (folder / "run/metrics.jsonl").write_text(json.dumps(entry) + "\n", encoding="utf-8")
    event = {"event": "start", "step": 0, "time": 1.7e9}
    (folder / "run/events.jsonl").write_text(json.dumps(event) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def budget(request: pytest.FixtureRequest) -> tuple[int, float]:
    """The seed of the first case, and the seconds to run."""
    return request.config.getoption("--fuzz-seed"), request.config.getoption("--fuzz-seconds")


def _run(target: Target, folder: Path, files: Path, seed: int) -> tuple[str, str, int]:
    """Run one case in a process of its own; a negative seed changes nothing.

    Returns:
        The change, the command's output, and its status; negative if a signal ended it.
    """
    rng = random.Random(seed)
    changes_wanted = rng.choice((1, 1, 1, 2)) if seed >= 0 else 0
    shutil.copytree(files, folder, symlinks=True)
    for text in ("run.yaml", "experiment.yaml", "run/config.yaml"):
        path = folder / text
        path.write_text(path.read_text().replace(str(files), str(folder)), encoding="utf-8")
    arguments, changes, environment = target.arguments(folder), [], {}
    values = [
        f"{folder}/{name}"
        for name in ("run.yaml", "text.bin", "student", "hf", "corpus.jsonl", "hf/config.json")
    ]
    for _ in range(changes_wanted):
        kind = rng.random()
        if kind < 0.5:
            path = rng.choice(
                sorted(p for f in target.files for p in folder.glob(f) if p.is_file())
            )
            changes.append(mutate_file(rng, path))
        elif kind < 0.55:
            environment[rng.choice(ENVIRONMENT)] = rng.choice(
                [t for t in NASTY_TEXTS if "\udc80" not in t]
            )
        elif kind < 0.7 and target.extra:
            arguments += [rng.choice(target.extra), rng.choice(NASTY_TEXTS + values)]
        else:
            arguments = mutate_arguments(rng, arguments, values)
    changes.append(f"{environment} {arguments}")
    log = folder.parent / "log"
    gc.freeze()
    pid = os.fork()
    if pid == 0:
        _child(target, folder, arguments, environment, log)
    _, status = os.waitpid(pid, 0)
    return "; ".join(changes), log.read_text(errors="replace"), os.waitstatus_to_exitcode(status)


def _child(
    target: Target, folder: Path, arguments: list[str], environment: dict[str, str], log: Path
) -> None:
    """Run the case in this fork; never returns."""
    status = 99
    try:
        (folder / "here").mkdir()
        os.chdir(folder / "here")
        os.environ.update(HOME=str(folder / "home"), HF_HUB_OFFLINE="1", **environment)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", buffering=1, errors="replace")  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, errors="replace")  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(CASE_SECONDS)
        status = target.main(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _check(what: str, printed: str, status: int, folder: Path) -> None:
    assert status in (0, 1, 2, 85), f"{what}\nstatus {status}:\n{printed[-3000:]}"
    assert "Traceback (most recent call last)" not in printed, f"{what}\n{printed[-3000:]}"
    if status == 2:
        assert "error:" in printed, f"{what}\n{printed[-2000:]}"
    made = [p.name for p in (folder / "here").rglob("*") if p.name[:1] in ("~", "$")]
    assert not made, f"{what}: made {made}"


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_the_command_works_before_anything_is_changed(
    name: str, files: Path, tmp_path: Path
) -> None:
    """The unchanged case works. Otherwise every case would be refused for the same reason."""
    _, printed, status = _run(TARGETS[name], tmp_path / "files", files, -1)
    assert status == 0, printed[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TARGETS)
def test_a_command_ends_in_a_result_or_a_named_error(
    name: str, files: Path, tmp_path: Path, budget: tuple[int, float]
) -> None:
    first, seconds = budget
    seconds /= len(TARGETS)
    failed, end, number = [], time.monotonic() + seconds, 0
    while number < 12 or time.monotonic() < end:
        seed = first + number
        place = tmp_path / str(seed)
        place.mkdir()
        folder = place / "files"
        what, printed, status = _run(TARGETS[name], folder, files, seed)
        try:
            _check(what, printed, status, folder)
        except AssertionError as error:
            failed.append(f"case {seed}: {error}")
        shutil.rmtree(place)
        number += 1
    print(f"{name}: {number} cases, {len(failed)} failed")
    assert not failed, f"{len(failed)} of {number} cases:\n" + "\n\n".join(failed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_config_loader_ends_in_a_config_or_a_named_error(
    files: Path, tmp_path: Path, budget: tuple[int, float]
) -> None:
    first, seconds = budget
    path = tmp_path / "run.yaml"
    text = (files / "run.yaml").read_text(encoding="utf-8")
    failed, end, number = [], time.monotonic() + seconds, 0
    while number < 500 or time.monotonic() < end:
        seed = first + number
        rng = random.Random(seed)
        path.write_text(text, encoding="utf-8")
        changes = [mutate_file(rng, path)]
        overrides = []
        if rng.random() < 0.5:
            overrides = [f"{rng.choice(_KEYS)}={rng.choice(NASTY_TEXTS + NASTY_YAML)}"]
            overrides[0] = other_text(rng, overrides[0]) if rng.random() < 0.2 else overrides[0]
        try:
            config = load_run_config(path, overrides)
            path.write_text(to_yaml(config), encoding="utf-8")
            assert load_run_config(path) == config
            json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")), allow_nan=False)
        except HydraError:
            pass  # named
        except Exception:
            failed.append(f"case {seed}: {changes} {overrides}\n{traceback.format_exc(limit=-3)}")
        number += 1
    print(f"config loader: {number} cases, {len(failed)} failed")
    assert not failed, f"{len(failed)} of {number} cases:\n" + "\n".join(failed[:20])


def test_a_case_that_raises_is_a_failure(tmp_path: Path) -> None:
    """The check above can fail: it finds commands that raise, die or make a folder ~."""
    for code, body in (("raise", lambda _: 1 / 0), ("die", lambda _: os.kill(os.getpid(), 9)),
                       ("folder", lambda _: os.mkdir("~") or 0)):  # fmt: skip
        place = tmp_path / code
        (place / "files").mkdir(parents=True)
        pid = os.fork()
        if pid == 0:
            _child(Target(body, lambda _: [], ()), place / "files", [], {}, place / "log")
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with pytest.raises(AssertionError):
            _check(code, (place / "log").read_text(), status, place / "files")


def test_a_command_out_of_memory_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main() -> int:
        raise MemoryError("Unable to allocate 8 EiB")

    assert main() == 2
    assert "error: out of memory: Unable to allocate 8 EiB" in capsys.readouterr().err
