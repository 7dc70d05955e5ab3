"""A real Slurm on loopback for tests: munged, slurmctld and two slurmd, none of them the machine's own."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cluster_runs import ROOT, free_port, wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
"""Debian's packages munge, slurmctld, slurmd and slurm-client."""

CONF = """
ClusterName=medtune
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/s/munge,cred_expire=5
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=1,sched_interval=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1024
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1024
PartitionName=low Nodes=n1,n2 Default=YES State=UP PriorityTier=1
PartitionName=urgent Nodes=n1,n2 State=UP PriorityTier=10
"""
"""cred_expire: a requeued job waits until its credential has expired, by default two minutes."""


def missing_programs() -> list[str]:
    places = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=places) is None]


@dataclass
class Slurm:
    folder: Path
    env: dict[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *command: str) -> None:
        with (self.folder / f"{Path(command[0]).name}.log").open("ab") as log:
            self.started.append(
                subprocess.Popen(
                    command, env=self.env, stdout=log, stderr=log, start_new_session=True
                )
            )

    def run(self, *command: object, code: int = 0) -> str:
        """Run one of Slurm's commands, or another in its environment, in the folder; returns its output."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, (
            f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done.stdout

    def medtune(self, *arguments: object) -> str:
        return self.run(sys.executable, "-m", "tune_app.cli", *arguments)

    def submit(self, script: Path | str, *options: str) -> str:
        """Submit a script, or a command; returns the job's id."""
        what = ["--wrap", script] if isinstance(script, str) else [script]
        return self.run("sbatch", "--parsable", *options, *what).strip()

    def job(self, number: str) -> dict[str, str]:
        """Slurm's record of a job: JobState, Restarts, ExitCode ..."""
        shown = self.run("scontrol", "show", "job", "-o", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, number: str, *states: str) -> None:
        wait_for(
            lambda: self.job(number)["JobState"] in states,
            f"job {number} in {states}",
            deadline_s=480,
        )

    def stop(self) -> None:
        for process in reversed(self.started):
            process.terminate()
        for process in self.started:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(15)


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Slurm]:
    """Slurm with two nodes of two CPUs; `folder` has a short path. Skips the test, and names the missing programs."""
    if missing := missing_programs():
        pytest.skip(f"no Slurm here: {', '.join(missing)} (Debian: slurm-wlm, munge)")
    for name in ("m", "s", "state"):
        (folder / name).mkdir(mode=0o755 if name == "s" else 0o700)
    key = folder / "m" / "key"
    key.write_bytes(secrets.token_bytes(64))
    key.chmod(0o400)
    folder.chmod(0o755)
    ports = [free_port() for _ in range(3)]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    conf = folder / "slurm.conf"
    conf.write_text(
        CONF.format(folder=folder, host=socket.gethostname(), ports=ports, user=user).lstrip()
    )
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))
    }
    env |= {
        "SLURM_CONF": str(conf),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}{os.pathsep}/usr/sbin",
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
    }
    slurm = Slurm(folder, env)
    munge = [f"--key-file={key}", f"--socket={folder}/s/munge", f"--pid-file={folder}/m/pid"]
    munge += [
        f"--log-file={folder}/m/log",
        f"--seed-file={folder}/m/seed",
        "--foreground",
        "--force",
    ]
    try:
        slurm.start("/usr/sbin/munged", *munge)
        wait_for((folder / "s" / "munge").exists, "munged")
        slurm.start("/usr/sbin/slurmctld", "-D")
        for node in ("n1", "n2"):
            slurm.start("/usr/sbin/slurmd", "-D", "-N", node)
        wait_for(lambda: "2 idle" in " ".join(_shown(slurm)), "two idle nodes", deadline_s=60)
        yield slurm
    finally:
        with_jobs = subprocess.run(
            ["scancel", "--user", user, "--full"], env=env, capture_output=True, timeout=60
        )
        deadline = time.monotonic() + 60
        while with_jobs.returncode == 0 and time.monotonic() < deadline:
            left = subprocess.run(["squeue", "-h"], env=env, capture_output=True, text=True)
            if not left.stdout.strip():
                break
            time.sleep(0.5)
        slurm.stop()


def _shown(slurm: Slurm) -> list[str]:
    asked = ["sinfo", "-h", "-p", "low", "-o", "%D %t"]
    return subprocess.run(asked, env=slurm.env, capture_output=True, text=True).stdout.split()
