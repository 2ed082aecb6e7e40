"""A real Slurm of several nodes on this machine, in one folder: munged, slurmctld, and a slurmd per node.

A node is a set of namespaces (host name, mounts, processes) that one process holds, with an address of its own on the
loopback; killing the holder is a power cut. Nothing outside of the folder is touched. Needs Debian's slurm-wlm and
munge, and root or user namespaces. By hand: ``python -m tests.slurm.rig FOLDER`` runs one until Ctrl-C.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PACKAGES = "slurm-wlm munge"
INSTALL = f"apt-get install -y --no-install-recommends {PACKAGES}"
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "nsenter")
ACCOUNTING_PACKAGES = "slurmdbd mariadb-server-core"
ACCOUNTING_COMMANDS = ("slurmdbd", "mariadbd", "mariadb-install-db")
SBIN = "/usr/sbin:/sbin"
FIRST_ADDRESS = 11  # node1 is 127.0.0.11
KINDS = ("--uts", "--mount", "--pid")  # of namespaces that a node has of its own
# What a node's first process does: takes its name and its view of /etc/hosts, then collects orphans for ever.
HOLD = 'hostname "$1" && mount --bind "$2" /etc/hosts && echo up && while :; do sleep 3600 & wait; done'


def missing(names: Sequence[str] = COMMANDS) -> list[str]:
    """The commands that are not on this machine."""
    return [name for name in names if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None]


class Cluster:
    """``nodes`` nodes of 8 fake GPUs and 32 fake cores, two partitions: batch (default), and high, which preempts it.

    Times are as short as Slurm allows: a lost node is noticed in 5 to 15 s, a requeued job waits about 6 s.

    ``accounting``: with slurmdbd and a database, so that sacct answers; the controller soon forgets what has ended.
    """

    def __init__(self, nodes: int = 4, accounting: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # sockets' names are cut at 107 bytes
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self._conf = self.folder / "slurm.conf"
        self._accounting = accounting
        self._port = free_ports(nodes + 3)
        self._holders: dict[str, subprocess.Popen[str]] = {}
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """What makes Slurm's commands talk to this cluster."""
        return {"SLURM_CONF": str(self._conf), "PATH": f"{os.environ['PATH']}:{SBIN}"}

    def ask(self, *argv: str) -> str:
        """Run a command of Slurm's; its standard output."""
        environment = os.environ | self.environment
        return subprocess.run(argv, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout

    def up(self) -> None:
        """Write the configuration, start everything, and wait until every node is idle."""
        for name in ("state", "spool", "log", "dev"):
            (self.folder / name).mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o600)
        for number in range(8):  # a GPU needs a device file, and a link to a device is one
            (self.folder / "dev" / f"gpu{number}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/dev/gpu[0-7]\n")
        hosts = [f"{self._address(node)} {node}" for node in self.nodes]
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + "\n".join(hosts) + "\n")
        self._conf.write_text(self._configuration())
        self._daemon("munged", "--foreground", "--force", *(f"--{name}={self.folder}/{file}" for name, file in MUNGE))
        self._until((self.folder / "munge.socket").exists, "munged")
        if self._accounting:
            self._start_accounting()
        self._daemon("slurmctld", "-D", "-f", str(self._conf))
        for node in self.nodes:
            self._start_node(node)
        self.settle()

    def settle(self) -> None:
        """Wait until every node is idle: one that has just ended a job takes no other for some seconds."""
        self._until(self._all_idle, "the nodes")

    def down(self) -> None:
        """End everything and remove the folder."""
        for node in list(self._holders):
            self.power_cut(node)
        for process in reversed(self._daemons):
            process.terminate()
            process.wait(timeout=20)
        shutil.rmtree(self.folder, ignore_errors=True)

    def power_cut(self, node: str) -> None:
        """End a node with all that runs on it, at once."""
        holder = self._holders.pop(node)
        os.kill(self._first_process(holder), signal.SIGKILL)
        holder.wait(timeout=10)

    def power_on(self, node: str) -> None:
        """Start a node again after a power cut, and wait until it takes jobs.

        Slurm compares times of boots by whole seconds, so that a node that registers twice may be taken for one that
        was started twice, and is down again: it is back when it has been so for some seconds.
        """
        time.sleep(1.1)
        self._start_node(node, "-b")
        since = [time.monotonic()]

        def back() -> bool:
            shown = self.ask("scontrol", "-o", "show", "node", node)  # sinfo calls one completing that is down as well
            state = next(word[6:] for word in shown.split() if word.startswith("State="))
            if state.split("+")[0] == "DOWN":
                self.ask("scontrol", "update", f"nodename={node}", "state=resume")
            if state.split("+")[0] not in ("IDLE", "ALLOCATED", "MIXED"):
                since[0] = time.monotonic()
            return time.monotonic() - since[0] > 3

        self._until(back, node)

    def stop_controller(self) -> None:
        """End slurmctld: nodes and jobs go on, and no command is answered."""
        controller = next(one for one in self._daemons if "slurmctld" in str(one.args))
        controller.terminate()
        controller.wait(timeout=20)
        self._daemons.remove(controller)

    def start_controller(self) -> None:
        """Start slurmctld again, with the state that it has kept, and wait until it answers."""
        self._daemon("slurmctld", "-D", "-f", str(self._conf))

        def answers() -> bool:
            try:
                return "UP" in self.ask("scontrol", "ping")
            except subprocess.CalledProcessError:
                return False

        self._until(answers, "slurmctld")

    def reconfigure(self, line: str, other: str) -> None:
        """Put another line in the place of one of slurm.conf, and let every daemon read it again."""
        lines = self._conf.read_text().splitlines()
        lines[lines.index(line)] = other
        self._conf.write_text("\n".join(lines) + "\n")
        self.ask("scontrol", "reconfigure")
        self._until(lambda: "UP" in self.ask("scontrol", "ping"), "slurmctld")

    @property
    def processes(self) -> set[int]:
        """Those of all nodes, and the daemons beside them."""
        daemons = {daemon.pid for daemon in self._daemons}
        return daemons.union(*(self.pids(node) for node in self._holders))

    def pids(self, node: str) -> set[int]:
        """The processes of a node, by their numbers on this machine."""
        wanted = Path(f"/proc/{self._first_process(self._holders[node])}/ns/pid").readlink()
        found = set()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if (entry / "ns" / "pid").readlink() == wanted:
                    found.add(int(entry.name))
            except OSError:
                continue
        return found

    def inside(self, node: str, *argv: str) -> None:
        """Run a command in a node's namespaces, as its root."""
        subprocess.run([*self._into(node), *argv], check=True, capture_output=True, timeout=60)

    def _into(self, node: str) -> list[str]:
        words = ["nsenter", "--target", str(self._first_process(self._holders[node])), *KINDS]
        return words + ([] if os.geteuid() == 0 else ["--user", "--preserve-credentials"])

    def _address(self, node: str) -> str:
        return f"127.0.0.{FIRST_ADDRESS + self.nodes.index(node)}"

    def _daemon(self, name: str, *words: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("wb") as log:
            argv = [str(shutil.which(name, path=self.environment["PATH"])), *words]
            environment = os.environ | self.environment
            daemon = subprocess.Popen(argv, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            self._daemons.append(daemon)

    def _start_node(self, node: str, *words: str) -> None:
        mine = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
        hold = ["bash", "-c", HOLD, "bash", node, str(self.folder / "hosts")]
        unshare = ["unshare", *KINDS, *mine, "--fork", "--kill-child", "--mount-proc", *hold]
        with (self.folder / "log" / f"{node}.holder").open("a") as log:
            holder = subprocess.Popen(unshare, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True)
        assert holder.stdout is not None and holder.stdout.readline() == "up\n", f"{node}: no namespaces here"
        self._holders[node] = holder
        slurmd = ["slurmd", *words, "-N", node, "-f", str(self._conf)]
        subprocess.run([*self._into(node), *slurmd], env=os.environ | self.environment, check=True)

    @staticmethod
    def _first_process(holder: subprocess.Popen[str]) -> int:
        return int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()[0])

    def _all_idle(self) -> bool:
        try:
            return self.ask("sinfo", "-hN", "-p", "batch", "-o", "%T").split() == ["idle"] * len(self.nodes)
        except subprocess.CalledProcessError:
            return False

    def _until(self, condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                logs = {file.name: file.read_text(errors="replace")[-1500:] for file in (self.folder / "log").iterdir()}
                raise RuntimeError(f"{what} did not come up in {timeout_s:.0f} s: {logs}")
            time.sleep(0.1)

    def _start_accounting(self) -> None:
        """A database of its own, and slurmdbd before it; Slurm makes the tables."""
        at = {"folder": self.folder, "user": getpass.getuser(), "port1": self._port + 1, "port2": self._port + 2}
        (self.folder / "db.sql").write_text(DATABASE_USER)
        (self.folder / "slurmdbd.conf").write_text(DATABASE_CONFIGURATION.format(**at))
        (self.folder / "slurmdbd.conf").chmod(0o600)
        data = [word.format(**at) for word in DATABASE_WORDS]
        install = ["mariadb-install-db", *data[:3], "--auth-root-authentication-method=normal", "--skip-test-db"]
        with (self.folder / "log" / "mariadb-install-db.out").open("wb") as log:
            subprocess.run(install, stdout=log, stderr=log, check=True, timeout=60)
        self._daemon("mariadbd", *data)
        self._until((self.folder / "mariadb.socket").exists, "mariadbd")
        self._daemon("slurmdbd", "-D")
        self._until(lambda: self._answers("sacctmgr", "-n", "show", "cluster"), "slurmdbd")

    def _answers(self, *argv: str) -> bool:
        try:
            self.ask(*argv)
        except subprocess.CalledProcessError:
            return False
        return True

    def _configuration(self) -> str:
        host, port = socket.gethostname().split(".")[0], self._port
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr={self._address(node)} Port={port + 3 + place}"
            for place, node in enumerate(self.nodes)
        ]
        text = CONFIGURATION.format(
            folder=self.folder, host=host, port=port, user=getpass.getuser(), nodes="\n".join(nodes)
        )
        for line, other in ACCOUNTED.items() if self._accounting else ():
            assert f"\n{line}\n" in text, line
            text = text.replace(f"\n{line}\n", f"\n{other.format(folder=self.folder, port=port + 1)}\n")
        return text


def free_ports(count: int) -> int:
    """The first of ``count`` ports in a row that nothing holds now."""
    for first in range(20000 + os.getpid() % 10000, 60000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("0.0.0.0", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports")


MUNGE = (
    ("key-file", "munge.key"),
    ("socket", "munge.socket"),
    ("pid-file", "munged.pid"),
    ("log-file", "log/munged"),
    ("seed-file", "state/munged.seed"),
)
CONFIGURATION = """ClusterName=rig
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SlurmdParameters=config_overrides
GresTypes=gpu
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdTimeout=5
MessageTimeout=5
ReturnToService=1
KillWait=5
MinJobAge=86400
NodeName=DEFAULT CPUs=32 RealMemory=256000 Gres=gpu:8
{nodes}
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
# What of the configuration is different where jobs are accounted for; they leave squeue after 2 to 4 s.
ACCOUNTED = {
    "AccountingStorageType=accounting_storage/none": """AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge.socket""",
    "MinJobAge=86400": "MinJobAge=2",
}
DATABASE_CONFIGURATION = """AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port1}
SlurmUser={user}
PidFile={folder}/slurmdbd.pid
LogFile={folder}/log/slurmdbd
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={port2}
StorageUser=slurm
StoragePass=slurm
"""
DATABASE_USER = """CREATE USER IF NOT EXISTS slurm@'%' IDENTIFIED BY 'slurm';
GRANT ALL ON *.* TO slurm@'%';
"""
DATABASE_WORDS = (
    "--no-defaults",
    "--datadir={folder}/db",
    "--user={user}",
    "--bind-address=127.0.0.1",
    "--port={port2}",
    "--skip-name-resolve",
    "--socket={folder}/mariadb.socket",
    "--pid-file={folder}/mariadbd.pid",
    "--init-file={folder}/db.sql",
)


def main(nodes: int = 4) -> None:
    """Run a cluster until Ctrl-C."""
    cluster = Cluster(nodes)
    try:
        cluster.up()
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']} PATH=$PATH:{SBIN}", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        cluster.down()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
