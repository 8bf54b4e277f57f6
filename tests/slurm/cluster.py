"""A throw-away SLURM cluster on this machine, everything in one temporary folder.

It has munged, slurmctld and two slurmd (n0, n1).

    with Cluster(folder) as cluster:
        job = cluster.sbatch("--nodes=2", "job.sh")
        cluster.wait(job)

Nothing outside the folder is written, so that clusters can stand side by side; ports are free ones
of the loopback interface. By
hand, to try commands on it: ``python -m tests.slurm.cluster FOLDER`` prints the line that points
SLURM's commands at it, and runs until Ctrl-C. Needs Debian's slurm-wlm and munge.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests import waiting

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
NODES = ("n0", "n1")
LAUNCH = Path(__file__).parents[2] / "launch"
MARK = "PORTRAIT_DIST_TEST_CLUSTER"
"""In the environment of every process of the cluster and of its jobs."""

# cred_expire is also how long SLURM holds back a requeued job (120 s by default).
CONFIGURATION = """
ClusterName=portrait
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmctldParameters=idle_on_node_suspend
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=15
KillWait=5
MessageTimeout=10
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
{nodes}
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Which of SLURM's and munge's programs this machine lacks."""
    return [name for name in PROGRAMS if _program(name) is None]


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


class Cluster:
    """Start with ``with``. ``environment`` points SLURM's commands at this cluster.

    Args:
        folder: an empty folder for configuration, logs and state; its path must be short enough for
            a socket (< 90 characters).
        cpus: CPUs that each node claims to have.
    """

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self.folder = folder
        self.cpus = cpus
        self.environment = dict(
            os.environ, SLURM_CONF=str(folder / "slurm.conf"), **{MARK: str(folder)}
        )
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start all daemons and wait until both nodes are idle."""
        (self.folder / "state").mkdir(parents=True)
        controller_port, *node_ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={self.cpus} RealMemory=1000 Gres=gpu:2"
            for name, port in zip(NODES, node_ports, strict=True)
        )
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=self.folder,
                host=socket.gethostname(),
                controller_port=controller_port,
                user=pwd.getpwuid(os.getuid()).pw_name,
                nodes=nodes,
            )
        )
        for number in (0, 1):  # GPUs that SLURM counts and hands out, but that are not there
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(
            f"NodeName={','.join(NODES)} Name=gpu File={self.folder}/gpu[0-1]\n"
        )
        self._start_munge()
        self._start_daemon("slurmctld", "-D", "-c", "-f", str(self.folder / "slurm.conf"))
        for name in NODES:
            self.start_node(name)
        self.until(lambda: self.states() == dict.fromkeys(NODES, "idle"), 30, "both nodes are idle")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        suffixes = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        options = [
            f"--{option}={self.folder}/munge.{suffix}" for option, suffix in suffixes.items()
        ]
        self._start_daemon("munged", "--foreground", "--force", "--num-threads=2", *options)
        self.until((self.folder / "munge.socket").exists, 10, "munged listens")

    def start_node(self, name: str) -> None:
        """Start a node's slurmd."""
        (self.folder / f"spool-{name}").mkdir(exist_ok=True)
        self._start_daemon(
            "slurmd",
            "-D",
            "-N",
            name,
            "-f",
            str(self.folder / "slurm.conf"),
            label=f"slurmd-{name}",
        )

    def lose_node(self, name: str) -> None:
        """Kill a node's slurmd and everything that runs on it, at once, as a power cut would."""
        daemon = self.daemons.pop(f"slurmd-{name}")
        daemon.kill()
        daemon.wait()
        victims = [
            pid for pid, variables in self.processes() if variables.get("SLURMD_NODENAME") == name
        ]
        managers = {_parent(pid) for pid in victims if "slurmstepd" in _command(_parent(pid))}
        # First who would report that the others ended, which no power cut gives anybody time for.
        for pid in [*managers, *victims]:
            _kill(pid)

    def _start_daemon(self, program: str, *arguments: str, label: str = "") -> None:
        path = _program(program)
        assert path, f"{program} is not installed"
        with (self.folder / f"{label or program}.out").open("ab") as output:
            self.daemons[label or program] = subprocess.Popen(
                [path, *arguments],
                env=self.environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
            )

    def stop(self) -> None:
        """Stop the jobs and the daemons; leave no process behind."""
        for name in sorted(self.daemons, key=lambda name: name == "munged"):
            self.daemons[name].terminate()
        deadline = time.monotonic() + 3
        for daemon in self.daemons.values():
            try:
                daemon.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()
        waiting.wait_for(self._kill_what_is_left, what="every process of the cluster is gone")

    def _kill_what_is_left(self) -> bool:
        leftovers = [pid for pid, _ in self.processes()]
        for pid in leftovers:
            _kill(pid)
        return not leftovers

    def processes(self) -> Iterator[tuple[int, dict[str, str]]]:
        """(pid, environment) of every process of this cluster and of its jobs."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                parts = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            variables = dict(part.partition("=")[::2] for part in parts)
            if variables.get(MARK) == str(self.folder) and _alive(int(entry.name)):
                yield int(entry.name), variables

    def command(
        self,
        *arguments: str,
        check: bool = True,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> str:
        """Run one of SLURM's commands on this cluster and return what it printed."""
        done = subprocess.run(
            arguments,
            env=self.environment | dict(variables or {}),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def sbatch(self, *arguments: str, cwd: Path | None = None, **variables: str) -> int:
        """Queue a job; returns its number."""
        printed = self.command("sbatch", "--parsable", *arguments, cwd=cwd, variables=variables)
        return int(printed.split(";")[0])

    def states(self) -> dict[str, str]:
        """Return the state of each node as sinfo names it."""
        lines = self.command(
            "sinfo", "-h", "-N", "-o", "%N %T", "-p", "normal", check=False
        ).splitlines()
        return {line.split()[0]: line.split()[1] for line in lines}

    def job(self, number: int | str) -> dict[str, str]:
        """Return what scontrol knows of a job: JobState, Restarts, ExitCode, Reason and more."""
        text = self.command("scontrol", "show", "job", str(number), "--oneliner")
        return dict(part.partition("=")[::2] for part in text.split() if "=" in part)

    def wait(self, number: int | str, seconds: float = 120) -> dict[str, str]:
        """Wait until a job is over; returns what ``job`` does."""
        over = (
            "COMPLETED",
            "FAILED",
            "CANCELLED",
            "TIMEOUT",
            "NODE_FAIL",
            "BOOT_FAIL",
            "OUT_OF_MEMORY",
        )
        self.until(lambda: self.job(number)["JobState"] in over, seconds, f"job {number} is over")
        return self.job(number)

    def until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for a condition; TimeoutError that says what never happened, with the logs' ends."""
        try:
            # Most conditions start a program of SLURM's: asked less often, they disturb less.
            waiting.wait_for(condition, seconds, what, pause=0.2)
        except AssertionError as error:
            raise TimeoutError(f"{error}\n{self.report()}") from None

    def report(self) -> str:
        """The ends of the daemons' logs and the queue, for a failing test."""
        parts = [self.command("squeue", check=False), self.command("sinfo", "-N", check=False)]
        for path in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")]):
            parts.append(
                f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            )
        return "\n".join(parts)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    if missing := missing_programs():
        sys.exit(f"missing: {', '.join(missing)}; apt-get install slurm-wlm munge")
    with Cluster(folder):
        print(f"export SLURM_CONF={folder}/slurm.conf", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    main()
