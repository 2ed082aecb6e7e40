"""Which nodes of a probe are good: what each can be held against, and what is nobody's fault."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.probing import looking
from orchestrator.probing.judging import Judgement, judge
from orchestrator.probing.linking import pairs
from orchestrator.probing.looking import gpu_faults, look
from orchestrator.probing.report import Asked, Found, Link, Report, read_found, reports_folder, write_asked, write_found

GPUS = Asked("t", device="cuda", gpus_per_node=8, memory_gib=76.0, assumed_rate=290e9)
CPUS = Asked("t")


def node(name: str, **changes: object) -> Report:
    """A good node of 8 GPUs."""
    usual: dict[str, object] = {"gpus": ("H100",) * 8, "gpu_gib": 79.6, "write_mb_s": 900.0, "free_gib": 500.0}
    return Report(name, "t", **(usual | {"links": (Link(("other",), 280e9),)} | changes))  # type: ignore[arg-type]


def judged(*reports: Report, asked: Asked = GPUS, **more: object) -> Judgement:
    return judge(Found("t", reports, **more), asked)  # type: ignore[arg-type]


def why(*odd: Report, asked: Asked = GPUS) -> tuple[str, ...]:
    """What speaks against the last of some nodes, the others of which are good."""
    judgement = judged(node("n1"), node("n2"), node("n3"), *odd, asked=asked)
    assert judgement.good == ("n1", "n2", "n3") and judgement.bad == (odd[-1].node,)
    return judgement.verdicts[-1].why


def test_good_nodes_are_good() -> None:
    judgement = judged(node("n1"), node("n2"))
    assert judgement.good == ("n1", "n2") and judgement.remarks == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpus": ("H100",) * 7}, "7 of 8 GPUs"),
        ({"gpus": (), "gpu_error": "no driver"}, "0 of 8 GPUs (no driver)"),
        ({"gpu_gib": 39.4}, "a GPU has 39 GiB, 76 are needed"),
        ({"faults": ("GPU 3: 2 uncorrected ECC errors",)}, "GPU 3: 2 uncorrected ECC errors"),
        ({"folder_error": "/r cannot be written: Read-only file system"}, "/r cannot be written: Read-only"),
        ({"write_mb_s": 3.0}, "writes 3.0 MB/s, others 900"),
        ({"free_gib": 0.2}, "0.2 GiB free in the run folder"),
        ({"clock_s": -90.0}, "its clock is 90.0 s behind"),
        ({"clock_s": 3.0}, "its clock is 3.0 s ahead"),
        ({"links": (Link(("n1",), 9e9), Link(("n2",), 8e9))}, "all-reduce at 9.00 GB/s, others 280.00 GB/s"),
        ({"links": (Link(("n1",), error="reset"),) * 2}, "no all-reduce with any of 2 partners: reset"),
    ],
)
def test_a_bad_node_is_named_with_its_figure(changes: dict[str, object], words: str) -> None:
    (said,) = why(node("n4", **changes))
    assert said.startswith(words)


def test_several_faults_are_all_said() -> None:
    assert len(why(node("n4", gpus=("H100",), clock_s=9.0, write_mb_s=0.5))) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"write_mb_s": 300.0},  # a third of the others, and fast enough
        {"clock_s": 3.0, "clock_within_s": 1.5},  # may be 1.5
        {"links": (Link(("n1",), error="reset"), Link(("n2",), 250e9))},  # n1 is to blame, or nobody
        {"links": ()},  # not measured
        {"unread": ("XID (no dmesg)",)},
    ],
)
def test_what_proves_nothing_makes_no_node_bad(changes: dict[str, object]) -> None:
    assert judged(node("n1"), node("n2"), node("n3"), node("n4", **changes)).bad == ()


def test_a_silent_node_is_bad_and_nodes_are_in_their_order() -> None:
    judgement = judged(node("n10"), node("n9"), silent={"n2": "no answer in 120 s"})
    assert judgement.verdicts[0].node == "n2" and judgement.verdicts[0].why == ("no answer in 120 s",)
    assert judgement.good == ("n9", "n10")


def test_where_all_disks_are_slow_it_is_not_a_nodes_fault() -> None:
    judgement = judged(*(node(f"n{number}", write_mb_s=6.0 + number) for number in range(4)))
    assert judgement.bad == ()
    assert judgement.remarks == ("the run folder takes 7.5 MB/s of a node: checkpoints take long",)


def linked(*rates: float) -> list[Report]:
    return [node(f"n{number}", links=(Link(("x",), rate),)) for number, rate in enumerate(rates, 1)]


def test_where_all_links_are_slow_the_plan_is_told_of_and_the_slowest_node_still_found() -> None:
    judgement = judged(*linked(40e9, 41e9, 39e9))
    assert judgement.bad == ()
    (remark,) = judgement.remarks
    assert remark == "all nodes are slower than the plan assumes: 40.00 GB/s, not 290.00 GB/s; steps take longer"
    assert judged(*linked(40e9, 41e9, 39e9, 15e9)).bad == ("n4",)


def test_links_are_held_against_the_plan_where_nodes_reach_it_and_on_a_cpu_against_each_other() -> None:
    assert judged(*linked(200e9, 200e9, 140e9)).bad == ("n3",)  # 140 is 70 % of the others, and 48 % of the plan
    cpus = [replace(one, gpus=()) for one in linked(2e9, 1.9e9, 1.2e9, 0.8e9)]
    assert judged(*cpus, asked=CPUS).bad == ()  # 0.8 is 52 % of 1.55
    slow = replace(cpus[3], links=(Link(("x",), 0.7e9),))
    assert judged(*cpus[:3], slow, asked=CPUS).bad == ("n4",)


def test_what_was_not_measured_is_said() -> None:
    judgement = judged(node("n1"), node("n2", links=()), node("n3", unread=("clock (timed out)",)))
    assert judgement.remarks == ("links were not measured of n2", "not readable: clock (timed out)")


def test_the_whole_group_is_told_of() -> None:
    whole = Link(("n1", "n2", "n3"), 100e9)
    assert judged(node("n1"), whole=whole).remarks == ("3 nodes together all-reduce at 100.00 GB/s",)
    broken = judged(node("n1"), whole=replace(whole, rate=0.0, error="timed out"))
    assert broken.remarks == ("the all-reduce over 3 nodes together failed: timed out",) and broken.bad == ()


@pytest.mark.parametrize("count", range(1, 12))
def test_every_node_meets_other_partners_and_one_at_a_time(count: int) -> None:
    names = [f"n{number}" for number in range(count)]
    rounds = pairs(names, 3)
    met = [frozenset(pair) for one in rounds for pair in one]
    assert len(met) == len(set(met)) and all(len(pair) == 2 for pair in met)
    for one in rounds:
        busy = [name for pair in one for name in pair]
        assert len(busy) == len(set(busy)) >= count - 1 - (count == 1)
    wanted = min(count - 1, 2 if count % 2 else 3)
    assert all(sum(name in pair for pair in met) >= wanted for name in names)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing but what a test puts there."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def tool(folder: Path, name: str, says: str, code: int = 0) -> None:
    (folder / name).write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
    (folder / name).chmod(0o755)


XID = "[ 12.5] NVRM: Xid (PCI:0000:3b:00): 79, pid=41, GPU has fallen off the bus."


def test_errors_are_read_from_the_driver_and_the_kernel(tools: Path) -> None:
    tool(tools, "nvidia-smi", "0, 0, No, No\n1, 2, No, Yes")
    tool(tools, "dmesg", f"{XID}\n[ 13.0] NVRM: Xid (PCI:0000:3b:00): 43, pid=7, name=python")
    faults, unread = gpu_faults()
    assert faults == (
        "GPU 1: 2 uncorrected ECC errors",
        "GPU 1: no spare rows are left",
        "XID 79 of 0000:3b:00: GPU has fallen off the bus",
    )
    assert unread == ()


def test_errors_that_cannot_be_read_are_said_to_be_so(tools: Path) -> None:
    assert gpu_faults() == ((), ("ECC (no nvidia-smi)", "XID (no dmesg)"))
    tool(tools, "nvidia-smi", "Field is not valid", code=2)
    tool(tools, "dmesg", "read kernel buffer failed: Operation not permitted", code=1)
    faults, unread = gpu_faults()
    assert faults == ()
    assert unread == ("ECC (Field is not valid)", "XID (read kernel buffer failed: Operation not permitted)")


def test_a_node_looks_at_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    asked = Asked("mine")
    assert "probe-asked.json cannot be read: No such file" in look(tmp_path, "n1", asked).folder_error
    (tmp_path / "slurm").mkdir()
    write_asked(tmp_path, replace(asked, token="another"))
    assert "is another one than on the first node" in look(tmp_path, "n1", asked).folder_error
    write_asked(tmp_path, asked)
    reports_folder(tmp_path).mkdir()
    report = look(tmp_path, "n1", asked)
    assert report.folder_error == "" and report.write_mb_s > 0 and report.free_gib > 0
    assert list(reports_folder(tmp_path).iterdir()) == []


def test_a_folder_that_takes_nothing_is_the_nodes_fault() -> None:
    from orchestrator.doctor.folder import FolderSeen

    refused = FolderSeen(Path("/r"), error="Read-only file system")
    assert looking.judged_folder(Report("n1"), [refused]).folder_error == "/r cannot be written: Read-only file system"


def test_what_was_found_comes_back_and_nothing_of_another_probe(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    found = Found("t", (node("n1"),), {"n2": "silent"}, Link(("n1",), 1.0))
    write_found(tmp_path, found)
    assert read_found(tmp_path, "t") == found and read_found(tmp_path, "u") is None
    (tmp_path / "slurm" / "probe-found.json").write_text("{")
    assert read_found(tmp_path, "t") is None
