"""A real SLURM for the tests of launch/: one slurmctld and two slurmd on this host, with munge."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.table import table  # noqa: F401  (a fixture)
from tests.required import skip_without

PROGRAMS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scontrol",
    "squeue",
    "scancel",
    "sinfo",
)

_CONFIG = """
ClusterName=hydra
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
# A finished job stays known: on a busy machine a test asks for it late.
MinJobAge=86400
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits as long as a job credential lives (120 s by default).
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=1
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


class Slurm:
    """The client side of the cluster."""

    def __init__(self, folder: Path) -> None:
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in [
            name for name in self.environment if name.startswith(("SLURM_JOB", "SBATCH_"))
        ]:
            del self.environment[name]

    def run(self, *command: str, cwd: Path | None = None, check: bool = True) -> str:
        """The output of a command that talks to this cluster."""
        done = subprocess.run(
            command, cwd=cwd, env=self.environment, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """``scontrol show job`` as a dict."""
        text = self.run("scontrol", "show", "job", job_id, "--oneliner")
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, job_id: str, *states: str, seconds: float = 600) -> dict[str, str]:
        """Wait until the job is in one of ``states``."""
        end = time.monotonic() + seconds
        while (job := self.job(job_id))["JobState"] not in states:
            assert time.monotonic() < end, f"job {job_id}: {job['JobState']} ({job.get('Reason')})"
            time.sleep(0.5)
        return job


def _start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )


def _free_ports(count: int) -> list[int]:
    """A run of free ports below those that the kernel and job.sbatch hand out."""
    for first in range(11000, 15000 - count, count):
        sockets = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.socket())
                sockets[-1].bind(("", port))
        except OSError:
            continue
        else:
            return list(range(first, first + count))
        finally:
            for bound in sockets:
                bound.close()
    raise RuntimeError("no free ports")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A two-node cluster; everything that it starts is ended with it."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        skip_without("slurm", f"{missing[0]} is missing: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        skip_without("slurm", "the daemons of a test cluster run as root")
    folder = tmp_path_factory.mktemp("slurm")
    # munge needs a socket that others can reach, in folders that only their owner can write.
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)
    host = socket.gethostname().split(".")[0]
    port, first, last = _free_ports(3)
    (folder / "slurm.conf").write_text(
        _CONFIG.format(folder=folder, host=host, port=port, first=first, last=last)
    )
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    cluster = Slurm(folder)
    cluster.environment["PATH"] = _path()
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        munge = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key"]
        munge += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
        munge += [f"--socket={folder}/munge.socket"]
        daemons.append(_start(munge, cluster.environment, folder / "munged.out"))
        _wait_until((folder / "munge.socket").exists, daemons, folder)
        daemons.append(_start(["slurmctld", "-D"], cluster.environment, folder / "slurmctld.out"))
        for node in ("n1", "n2"):
            command = ["slurmd", "-D", "-N", node]
            daemons.append(_start(command, cluster.environment, folder / f"{node}.out"))
        _wait_until(
            lambda: cluster.run("sinfo", "-h", "-o", "%D %t", check=False).startswith("2 idle"),
            daemons,
            folder,
        )
        yield cluster
        cluster.run("scancel", "--user=root", "--full", "--signal=KILL", check=False)
        cluster.run("scancel", "--user=root", check=False)
        _wait_until(lambda: not cluster.run("squeue", "-h", check=False), daemons, folder)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def _path() -> str:
    return os.environ["PATH"] + ":/usr/local/sbin:/usr/sbin:/sbin"


def _wait_until(condition, daemons: list[subprocess.Popen[bytes]], folder: Path) -> None:
    end = time.monotonic() + 60
    while not condition():
        dead = [daemon.args for daemon in daemons if daemon.poll() is not None]
        if dead or time.monotonic() > end:
            tails = [
                f"{p.name}: {p.read_text()[-1500:]}"
                for p in folder.glob("*.*")
                if p.suffix in (".log", ".out")
            ]
            raise RuntimeError(f"SLURM did not come up (ended: {dead})\n" + "\n".join(tails))
        time.sleep(0.2)
