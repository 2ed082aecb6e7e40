"""What the doctor says of values: each fault has words with numbers, and a hint that is typed."""

from __future__ import annotations

import fcntl
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch.environment import LaunchError
from launch.pool import Pool
from orchestrator.config.job import ClusterConfig, SlurmConfig
from orchestrator.config.loading import compose_job
from orchestrator.detection.host import Accelerators, available_memory_bytes, seen_accelerators
from orchestrator.doctor import folder, machine, software
from orchestrator.doctor.finding import judged
from orchestrator.doctor.folder import FolderSeen, check_clock, check_folder, check_lock, check_speed, seen_folder
from orchestrator.doctor.machine import Port, check_memory, check_ports, met, seen_ports
from orchestrator.doctor.shared import check_tasks, seen_tasks
from orchestrator.doctor.slurm import SlurmSeen, check_slurm, goes_through_slurm, seen_slurm
from orchestrator.doctor.software import (
    Versions,
    check_cuda,
    check_devices,
    check_fast_paths,
    check_versions,
    seen_versions,
)
from orchestrator.errors import DataError
from tests.helpers.fake_slurm import FakeSlurm

H100X8 = compose_job(["cluster=h100x8"]).cluster
SLURM_4X8 = compose_job(["cluster=slurm_4x8"]).cluster
H100S = Accelerators("12.8", "2.27.3", "570.86", ("NVIDIA H100 80GB HBM3",) * 8, (79.1,) * 8)


def test_this_environment_has_what_isotrain_asks_for() -> None:
    import torch

    versions = seen_versions()
    assert versions.found["torch"] == torch.__version__.partition("+")[0]
    assert {"torch", "megatron-core"} <= versions.pinned.keys()
    assert "fault" not in [one.state for one in check_versions(versions)]


@pytest.mark.parametrize(
    ("found", "state", "words"),
    [
        (None, "fault", "not installed"),
        ("0.15.0", "fault", "0.15.0, but isotrain asks for ==0.16.1"),
        ("0.16.1", "ok", "0.16.1"),
    ],
)
def test_a_library_is_held_against_what_is_asked_for(found: str | None, state: str, words: str) -> None:
    versions = Versions({"isotrain": "0.1.0", "megatron-core": found}, {"megatron-core": "==0.16.1"}, {})
    mine, core = check_versions(versions)
    assert (mine.state, core.subject, core.state, core.found) == ("ok", "megatron-core", state, words)
    assert core.hint == ("" if state == "ok" else "pip install 'megatron-core==0.16.1'")


def test_other_versions_than_the_tested_ones_are_a_warning_each_and_the_rest_share_a_row() -> None:
    found = {"isotrain": None, "torch": "2.13.0", "peft": "0.20", "rich": "15.0.0", "numpy": "2.4.6"}
    pins = {"torch": "2.13.0", "peft": "0.21.2", "rich": "15.0.0", "numpy": "2.4.6"}
    rows = check_versions(Versions(found, dict.fromkeys(pins, ">=0.1"), pins))
    assert [(row.subject, row.state) for row in rows] == [
        ("isotrain", "warning"),
        ("torch", "ok"),
        ("peft", "warning"),
        ("libraries", "ok"),
    ]
    assert rows[2].found == "0.20; isotrain is tested with 0.21.2" and rows[2].hint == "make setup"
    assert rows[3].found == "rich 15.0.0, numpy 2.4.6"


def test_what_torch_sees_here_is_what_torch_says() -> None:
    import torch

    seen = seen_accelerators()
    assert seen.build == torch.version.cuda and len(seen.names) == torch.cuda.device_count()


@pytest.mark.parametrize(
    ("seen", "cluster", "is_elsewhere", "state", "words", "hint"),
    [
        (Accelerators(), ClusterConfig(), False, "ok", "torch is built for CPUs only", ""),
        (Accelerators(), H100X8, False, "fault", "built for CPUs only, but cluster=h100x8", "cluster=laptop"),
        (Accelerators(), SLURM_4X8, True, "fault", "built for CPUs only, but cluster=slurm_4x8", "cluster=laptop"),
        (Accelerators("12.8"), SLURM_4X8, True, "warning", "drivers of nodes", "srun --nodes=4"),
        (Accelerators("12.8", reason="too old"), H100X8, False, "fault", "12.8, no driver: too old", "nvidia-smi"),
        (Accelerators("12.8", "", "570", ("H100",)), H100X8, False, "fault", "without NCCL", "make setup"),
        (H100S, H100X8, False, "ok", "CUDA 12.8, NCCL 2.27.3, driver 570.86", ""),
    ],
)
def test_build_driver_and_nccl_fit_the_cluster(
    seen: Accelerators, cluster: ClusterConfig, is_elsewhere: bool, state: str, words: str, hint: str
) -> None:
    finding = check_cuda(seen, cluster, is_elsewhere)
    assert finding.state == state and words in finding.found and finding.hint.startswith(hint)


def test_a_prologue_brings_another_torch_than_the_one_here() -> None:
    cluster = ClusterConfig("far", 2, 8, "cuda", slurm=SlurmConfig(prologue=["venv", "/opt/venv"]))
    finding = check_cuda(Accelerators(), cluster, True)
    assert finding.state == "warning" and "cluster.slurm.prologue" in finding.found


@pytest.mark.parametrize(
    ("seen", "changes", "state", "words", "hint"),
    [
        (H100S, {}, "ok", "8 x NVIDIA H100 80GB HBM3, 79.1 GiB", ""),
        (
            Accelerators("12.8", names=("T4",), memory_gib=(15.0,)),
            {},
            "fault",
            "torch sees 1",
            "cluster.gpus_per_node=1",
        ),
        (Accelerators(), {}, "fault", "torch sees 0", "cluster=laptop"),
        (H100S, {"memory_gib": 90.0}, "warning", "cluster.memory_gib=90, but NVIDIA H100", "cluster.memory_gib=78"),
        (H100S, {"gpu": "A100-80GB"}, "warning", "cluster.gpu=A100-80GB, but torch sees", "cluster.gpu=H100-80GB"),
    ],
)
def test_devices_are_those_of_the_cluster(
    seen: Accelerators, changes: dict[str, object], state: str, words: str, hint: str
) -> None:
    import dataclasses

    finding = check_devices(seen, dataclasses.replace(H100X8, **changes), False)  # type: ignore[arg-type]
    assert finding.state == state and words in finding.found and finding.hint == hint
    if hint:
        compose_job(["cluster=h100x8", hint] if not hint.startswith("cluster=") else [hint])


def test_fast_paths_are_named_with_the_line_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    (engine,) = check_fast_paths({"apex": True}, "cuda", None)
    assert engine.state == "warning" and "apex's optimizer" in engine.found
    assert engine.hint == "pip install --no-build-isolation 'transformer_engine[pytorch]>=2.9,<2.12'"
    (broken,) = check_fast_paths({"transformer_engine": True}, "cuda", None)  # named, and not there
    assert broken.state == "fault" and "cannot be imported: No module named 'transformer_engine'" in broken.found
    monkeypatch.setitem(sys.modules, "transformer_engine", sys)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", sys)
    (on,) = check_fast_paths({"transformer_engine": True}, "cuda", None)
    assert (on.state, on.hint) == ("ok", "")
    assert check_fast_paths({"bitsandbytes": True}, "cpu", "nf4")[1].state == "ok"


def test_the_transformer_engine_that_is_named_is_the_one_that_megatron_core_wants() -> None:
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    asked = [Requirement(text) for text in requires("megatron-core") or []]
    (wanted,) = {one.specifier for one in asked if one.name == "transformer-engine"}
    ours = Requirement(software.TRANSFORMER_ENGINE.rpartition(" ")[2].strip("'"))
    assert wanted.contains("2.9.0") and not wanted.contains("2.12.0")
    assert ours.specifier.contains("2.9.0") and not ours.specifier.contains("2.12.0")


def test_memory_is_the_machines_or_the_containers(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 16000 kB\nMemAvailable: 8000 kB\n")
    assert available_memory_bytes(tmp_path, tmp_path) == 8000 * 1024
    for limit, expected in (("max", 8_192_000), ("3000000", 2_000_000)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("1000000\n")
        assert available_memory_bytes(tmp_path, tmp_path) == expected
    assert check_memory(9, 8, is_planned=True).hint.startswith("batch.micro_sequences=1")


def test_ports_of_this_machine_are_really_bound() -> None:
    loopback, _ = seen_ports()
    assert (loopback.address, loopback.error) == ("127.0.0.1", "")
    assert "requested address" in machine._listening_error("192.0.2.1")  # a network for documentation only


@pytest.mark.parametrize(("nodes", "state"), [(1, "warning"), (2, "fault")])
def test_a_host_without_an_address_matters_between_nodes(nodes: int, state: str) -> None:
    cluster = ClusterConfig(nodes=nodes)
    (finding,) = check_ports([Port("tide", "", "the name has no address")], cluster)
    assert finding.state == state and finding.hint == 'echo "127.0.1.1 tide" | sudo tee -a /etc/hosts'
    (loopback,) = check_ports([Port("loopback", "127.0.0.1", "Permission denied")], cluster)
    assert loopback.state == "fault" and "loopback (127.0.0.1)" in loopback.found


def test_two_processes_really_meet(pool: Pool) -> None:
    assert met(pool) == ""


def unreachable() -> int:
    """What a rank does behind a firewall."""
    raise OSError("no route to host")


def test_processes_that_do_not_meet_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "summed_ranks", unreachable)
    finding = machine.check_group(met(Pool(2)))
    assert finding.state == "fault" and finding.found == "two processes did not meet: OSError: no route to host"
    assert finding.hint.startswith("GLOO_SOCKET_IFNAME=lo isotrain doctor")


def test_a_folder_is_probed_and_left_as_it_was(tmp_path: Path) -> None:
    seen = seen_folder(tmp_path / "runs" / "new", probe_bytes=1)
    assert (seen.folder, seen.error, seen.locks) == (tmp_path, "", True)
    assert abs(seen.clock_s) < 60 and seen.rate_mb_s > 0 and seen.free_gib > 0
    assert not list(tmp_path.iterdir())
    assert check_folder(seen, ClusterConfig()).state == "ok"


def test_a_folder_that_takes_no_files_is_a_fault() -> None:
    finding = check_folder(seen_folder(Path("/proc/self/run")), ClusterConfig())
    assert finding.state == "fault" and "/proc/self (proc) cannot be written" in finding.found
    assert finding.hint == "run_dir=ANOTHER"


def test_nodes_are_asked_about_a_folder_of_theirs() -> None:
    for kind, words in (("ext4", "own disk, which 4 nodes may not share"), ("nfs4", "only they can tell")):
        finding = check_folder(FolderSeen(Path("/a run"), kind), SLURM_4X8)
        assert finding.state == "warning" and words in finding.found
        asked = "srun --nodes=4 --ntasks-per-node=1 --label isotrain doctor cluster=slurm_4x8 'run_dir=/a run'"
        assert finding.hint.startswith(asked)


def test_tasks_that_share_a_folder_see_each_other_and_leave_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as tasks:
        seen = list(tasks.map(lambda task: seen_tasks(tmp_path, ("42.0", task, 3)), range(3)))
    assert seen == [{0, 1, 2}] * 3 and not list(tmp_path.iterdir())
    assert check_tasks(tmp_path, seen[0], 3).state == "ok"


def test_a_task_whose_folder_no_other_sees_is_a_fault(tmp_path: Path) -> None:
    seen = seen_tasks(tmp_path, ("42.0", 1, 2), patience_s=0)
    finding = check_tasks(tmp_path, seen, 2)
    assert finding.state == "fault" and "of 2 tasks only those of [1] are seen" in finding.found
    assert finding.hint == "run_dir=SHARED_FOLDER/NAME" and not list(tmp_path.iterdir())


def test_a_folder_without_locks_is_told_from_one_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_lock(seen_folder(tmp_path, 1)).state == "ok"
    monkeypatch.setattr(folder.fcntl, "flock", lambda stream, how: None)  # takes every lock, and keeps nobody out
    assert check_lock(seen_folder(tmp_path, 1)).state == "warning"

    def none(stream: object, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    assert "no flock there" in check_lock(seen_folder(tmp_path, 1)).found


def test_clocks_that_differ_and_slow_or_full_disks_are_warnings(tmp_path: Path) -> None:
    assert check_clock(FolderSeen(tmp_path, clock_s=1.5)).state == "ok"
    behind = check_clock(FolderSeen(tmp_path, clock_s=30.0))
    assert (behind.state, behind.found) == ("warning", "this machine's clock is 30.0 s behind the folder's")
    assert check_speed(FolderSeen(tmp_path, rate_mb_s=500, free_gib=90)).found == "500 MB/s with fsync, 90.0 GiB free"
    assert "take long" in check_speed(FolderSeen(tmp_path, rate_mb_s=3, free_gib=90)).found
    assert "may not fit" in check_speed(FolderSeen(tmp_path, rate_mb_s=500, free_gib=0.2)).found


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    return fake


def test_a_slurm_that_answers_and_one_that_does_not(slurm: FakeSlurm) -> None:
    assert seen_slurm() == SlurmSeen(True, "", ("batch", "high"))
    (finding,) = check_slurm(seen_slurm(), SLURM_4X8)
    assert (finding.state, finding.found) == ("ok", "its controller answers; partitions: batch, high")
    slurm.silent()
    for cluster, state in ((SLURM_4X8, "fault"), (ClusterConfig(), "warning")):
        (finding,) = check_slurm(seen_slurm(), cluster)
        assert finding.state == state and "Unable to contact slurm controller" in finding.found
        assert finding.hint == "scontrol ping"


def test_a_slurm_whose_controller_is_down_says_so(slurm: FakeSlurm) -> None:
    (slurm.folder / "scontrol").write_text("#!/bin/sh\necho 'Slurmctld(primary) at head is DOWN'\n")
    assert seen_slurm().error == "Slurmctld(primary) at head is DOWN"


def test_a_machine_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert seen_slurm() == SlurmSeen(is_there=False)
    (finding,) = check_slurm(seen_slurm(), SLURM_4X8)
    assert finding.state == "fault" and "sbatch is not on the PATH" in finding.found
    assert check_slurm(seen_slurm(), ClusterConfig()) == []
    assert goes_through_slurm(compose_job(["cluster=slurm_cpu", "cluster.nodes=1"]).cluster)


def test_the_errors_of_a_run_are_findings() -> None:
    def broken() -> str:
        raise DataError("row 7 is empty", "data.on_bad_row=skip")

    def unstartable() -> str:
        raise LaunchError("four nodes", "cluster.nodes=1")

    assert (judged("data", broken).state, judged("data", broken).hint) == ("fault", "data.on_bad_row=skip")
    assert judged("plan", unstartable).hint == "cluster.nodes=1"
