"""launch/: the commands made from a command line, and the local launcher with real processes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.payload import expected_value

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ROOT / "launch" / "local.sh"
SLURM = ROOT / "launch" / "slurm.sh"
PAYLOAD = ["--python", sys.executable, "--module", "tests.launch.payload"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with two configs and an array file."""
    for name in ("align", "distill"):
        (tmp_path / f"{name}.yaml").write_text(f"output: {tmp_path / name}\nsteps: 3\n")
    lines = ("# three seeds", "seed=1 note=a", "", "seed=2 note=b", "seed=3 note=c")
    (tmp_path / "array.txt").write_text("\n".join(lines))
    (tmp_path / "fails.py").write_text("raise SystemExit(7)\n")
    (tmp_path / "tool.py").write_text("import sys\nprint('tool got', sys.argv[1:])\n")
    return tmp_path


def launch(script: Path, *arguments: str, cwd: Path, check: bool = True) -> list[str]:
    """Lines that the launcher printed."""
    done = subprocess.run(
        ["bash", str(script), *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, done.stderr
    return (done.stdout + done.stderr).splitlines()


def words_after(line: str, marker: str) -> list[str]:
    words = shlex.split(line)
    return words[words.index(marker) :]


# -- what would be run --------------------------------------------------------------------------


def test_local_dry_run_prints_each_step(folder: Path) -> None:
    lines = launch(
        LOCAL, "--dry-run", "--procs-per-node", "2", "--python", "py",
        "align.yaml", "a.b=c d", "e='$f'",
        "--then", "--procs-per-node=1", "distill.yaml", "align.yaml", "k=v.yaml",
        "--then", "tool.py", "--ratio", "7:1",
        cwd=folder,
    )  # fmt: skip
    agent = str(ROOT / "launch" / "agent.py")
    torchrun = ["py", agent, "--nnodes", "1", "--nproc-per-node"]
    train = ["--standalone", "-m", "megatron_hydra.train", "--config"]
    assert [shlex.split(line) for line in lines] == [
        [*torchrun, "2", *train, "align.yaml", "a.b=c d", "e='$f'"],
        [*torchrun, "1", *train, "distill.yaml", "--config", "align.yaml", "k=v.yaml"],
        ["py", "tool.py", "--ratio", "7:1"],
    ]
    assert not (folder / "align").exists()


def test_kernels_are_compiled_before_each_training_run(folder: Path) -> None:
    """One process on one GPU compiles them, for training runs only; the run keeps its process count."""
    lines = launch(
        LOCAL, "--dry-run", "--warm", "--procs-per-node", "2", "--python", "py", "align.yaml", "k=v",
        "--then", "tool.py",
        cwd=folder,
    )  # fmt: skip
    words = [shlex.split(line) for line in lines]
    assert [words_after(line, "--nproc-per-node")[1] for line in lines] == ["1", "2", "2"]
    ends = [line[line.index("-m") :] if "-m" in line else line[-1:] for line in words]
    assert ends == [
        ["-m", "megatron_hydra.warm", "--config", "align.yaml", "k=v"],
        ["-m", "megatron_hydra.train", "--config", "align.yaml", "k=v"],
        ["tool.py"],
    ]
    lines = launch(
        SLURM, "--dry-run", "--warm", "--nodes", "2", "--python", "py", "align.yaml", cwd=folder
    )
    warm, _, warm_run, train, _, train_run = lines
    assert {"--nodes=1", "--gpus-per-node=1", "--job-name=warm-align"} <= set(shlex.split(warm))
    assert {"--nodes=2", "--gpus-per-node=8", "--job-name=align"} <= set(shlex.split(train))
    assert "--dependency=afterok:JOBID_OF_align.yaml" in shlex.split(train)
    assert "megatron_hydra.warm" in warm_run
    assert "megatron_hydra.train" in train_run


def test_slurm_dry_run_chains_by_dependency(folder: Path) -> None:
    lines = launch(
        SLURM, "--dry-run", "--nodes", "2", "--time", "1:00:00", "--after", "17", "--python", "py",
        "align.yaml", "x=$HOME", "--then", "--nodes", "1", "--sbatch=--exclusive", "distill.yaml",
        cwd=folder,
    )  # fmt: skip
    first, _, first_run, second, _, second_run = lines
    assert {"sbatch", "--dependency=afterok:17", "--nodes=2", "--time=1:00:00", "--requeue",
            "--signal=USR1@300", "--gpus-per-node=8", "--kill-on-invalid-dep=yes",
            } <= set(shlex.split(first))  # fmt: skip
    assert words_after(first, "--")[1:] == ["align.yaml", "x=$HOME"]
    assert {"--dependency=afterok:JOBID_OF_align.yaml", "--nodes=1", "--exclusive"} <= set(
        shlex.split(second)
    )
    assert words_after(first_run, "--nnodes") == [
        "--nnodes", "2", "--nproc-per-node", "8", "--master-addr", "FIRST_NODE", "--master-port",
        "PORT", "-m", "megatron_hydra.train", "--config", "align.yaml", "x=$HOME",
    ]  # fmt: skip
    assert "--standalone" in second_run
    assert not (folder / "logs").exists()


def test_slurm_dry_run_arrays(folder: Path) -> None:
    lines = launch(
        SLURM, "--dry-run", "--array", "array.txt", "--array-limit", "2", "align.yaml",
        "--then", "distill.yaml",
        "--then", "--array=", "--container", "i.sqsh", "--mounts", "/a:/b", "tool.py",
        cwd=folder,
    )  # fmt: skip
    first, _, first_run, second, _, _, third, _, third_run = lines
    assert "--array=0-2%2" in shlex.split(first)
    assert shlex.split(first_run)[-3:] == ["align.yaml", "seed=1", "note=a"]
    # Line n follows line n; a job that is not an array follows the whole array.
    assert "--dependency=aftercorr:JOBID_OF_align.yaml" in shlex.split(second)
    assert "--dependency=afterok:JOBID_OF_distill.yaml" in shlex.split(third)
    assert not any(word.startswith("--array") for word in shlex.split(third))
    assert "--container-image=i.sqsh" in shlex.split(third_run)
    assert any(word.endswith(",/a:/b") for word in shlex.split(third_run))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no step given"),
        (["--nodes", "0", "align.yaml"], "--nodes 0"),
        (["--nodes", "two", "align.yaml"], "--nodes two"),
        (["--node", "2", "align.yaml"], "--node is unknown"),
        (["--nodes"], "--nodes needs a value"),
        (["missing.yaml"], "missing.yaml: no such file"),
        (["align"], "step align: it must be a CONFIG.yaml or a SCRIPT.py"),
        (["align.yaml", "missing.yaml", "x=1"], "missing.yaml: no such file"),
        (["align.yaml", "--then"], "--then needs another step"),
        (["--then", "align.yaml"], "options without a step"),
        (["align.yaml", "--then", "missing.yaml"], "missing.yaml: no such file"),
        (["--array", "missing.txt", "align.yaml"], "missing.txt: no such file"),
        (["--mounts", "/a:/b", "align.yaml"], "--mounts needs --container"),
    ],
)
@pytest.mark.parametrize("script", [LOCAL, SLURM])
def test_mistakes_are_refused_before_anything_runs(
    script: Path, arguments: list[str], message: str, folder: Path
) -> None:
    done = subprocess.run(
        ["bash", str(script), *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


# -- what runs ----------------------------------------------------------------------------------


def start_payload(*steps: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(LOCAL), "--procs-per-node", "2", *PAYLOAD, *steps],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


def test_local_stop_and_resume_equals_an_undisturbed_run(folder: Path) -> None:
    step = [str(folder / "align.yaml"), "steps=80"]
    process = start_payload(*step)
    wait_for(folder / "align" / "started.json", process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 85, output
    assert "the same command resumes from there" in output
    assert not (folder / "align" / "final.json").exists()
    resumed = start_payload(*step)
    assert resumed.wait(240) == 0, resumed.communicate()[0]
    final = json.loads((folder / "align" / "final.json").read_text())
    assert final == {"step": 80, "value": expected_value(80, 2), "starts": 2}


def test_local_chain_ends_at_the_step_that_fails(folder: Path) -> None:
    done = subprocess.run(
        ["bash", str(LOCAL), "--procs-per-node", "1", "--python", sys.executable,
         "tool.py", "one", "--then", "fails.py", "--then", "tool.py", "three"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 7
    assert "tool got ['one']" in done.stdout
    assert "tool got ['three']" not in done.stdout


def test_a_signal_between_two_steps_stops_the_chain(folder: Path) -> None:
    """The first step has ended when the launcher forwards the signal."""
    (folder / "last_moment.py").write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(0))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(30)\n"
    )
    lines = launch(
        LOCAL, "--procs-per-node", "1", "--python", sys.executable, "last_moment.py",
        "--then", "tool.py", "two", cwd=folder, check=False,
    )  # fmt: skip
    assert "stopped by a signal between two steps; the same command resumes from there" in lines
    assert not any("tool got" in line for line in lines)


def test_the_exit_status_of_a_step_that_ends_on_the_signal_at_once_is_kept(folder: Path) -> None:
    """The step ends before the launcher, having forwarded the signal, looks at it again."""
    (folder / "at_once.py").write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(85))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(30)\n"
    )
    (folder / "slow_kill.sh").write_text(
        'kill() { builtin kill "$@"; local s=$?; [[ $1 != -s ]] || sleep 0.5; return $s; }\n'
    )
    done = subprocess.run(
        ["bash", str(LOCAL), "--procs-per-node", "1", "--python", sys.executable, "at_once.py"],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "BASH_ENV": str(folder / "slow_kill.sh")},
    )  # fmt: skip
    assert done.returncode == 85, done.stderr
    assert "stopped by a signal after saving" in done.stderr


_SCONTROL = """#!/bin/bash
case "$2" in
  job) # asked by a subshell of the job script, which gets a signal while it waits
    [[ -e signalled ]] || kill -USR1 "$(ps -o ppid= -p $PPID)"
    touch signalled
    echo "JobId=7 JobState=RUNNING EndTime=2026-01-01T00:00:00 " ;;
  *) echo "$@" >> scontrol.log ;;
esac
"""


def test_a_signal_before_a_job_has_begun_requeues_it(folder: Path) -> None:
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("scontrol", _SCONTROL), ("srun", "#!/bin/bash\ntouch started\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = ROOT / "launch" / "job.sbatch"
    done = subprocess.run(
        ["bash", str(job), "--launch-dir", str(job.parent), "--python", "py", "--", "align.yaml"],
        cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
    )  # fmt: skip
    assert done.returncode == 85, done.stderr
    assert (folder / "scontrol.log").read_text() == "requeue 7\n"
    assert not (folder / "started").exists()


def test_local_runs_tools_and_arrays(folder: Path) -> None:
    lines = launch(
        LOCAL, "--procs-per-node", "1", "--python", sys.executable, "--array", "array.txt",
        str(folder / "tool.py"), "--flag", cwd=folder,
    )  # fmt: skip
    assert [line for line in lines if line.startswith("tool got")] == [
        f"tool got ['--flag', 'seed={n}', 'note={c}']" for n, c in ((1, "a"), (2, "b"), (3, "c"))
    ]


def test_agent_reports_a_crash_with_the_status_of_the_rank(folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "agent.py"), "--standalone", "--nproc-per-node", "1",
         "-m", "tests.launch.payload", "--config", str(folder / "align.yaml"), "fail_at=1"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert "exitcode  : 7" in done.stderr
