"""``isotrain doctor`` ends with 0 only if a run would start, and its faults are those that training ends with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.doctor import machine
from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import Shell
from tests.helpers.fake_slurm import FakeSlurm

# A launch that holds a folder until its input ends.
HOLD = """
import sys
from pathlib import Path
from orchestrator.locking import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that met: the real thing is in tests/orchestrator/test_doctor.py, and on docs/everyday.md."""
    monkeypatch.setattr(machine, "met", lambda pool: "")


def states(findings: list[dict[str, str]]) -> dict[str, str]:
    """The worst state of each subject."""
    order = {"ok": 0, "warning": 1, "fault": 2}
    return {one["subject"]: one["state"] for one in sorted(findings, key=lambda one: order[one["state"]])}


def fault(findings: list[dict[str, str]]) -> dict[str, str]:
    """The only fault."""
    (found,) = [one for one in findings if one["state"] == "fault"]
    return found


@pytest.mark.usefixtures("met")
def test_everything_is_looked_at_and_nothing_is_left_behind(
    command: Callable[..., Any], shell: Shell, tiny_run_model: TinyRun
) -> None:
    words = tiny_run_model.words(run_dir=shell.folder / "healthy")
    seen = states(command("doctor", *words, "--json", code=0).json["findings"])
    software = {"python", "isotrain", "torch", "megatron-core", "libraries", "transformer-engine"}
    machine = {"CUDA", "devices", "cores", "memory", "ports", "processes"}
    kept = {"run folder", "lock", "clock", "write speed"}
    assert software | machine | kept | {"model", "data", "run", "plan"} <= seen.keys()
    assert "fault" not in seen.values()
    assert not (shell.folder / "healthy").exists()


@pytest.mark.usefixtures("met")
def test_without_a_job_the_machine_is_looked_at(command: Callable[..., Any]) -> None:
    done = command("doctor", code=0)
    assert "processes" in done.out and "plan" not in done.out
    assert done.hint == "isotrain doctor model=smollm2_135m data=lighthouse"
    assert done.err.endswith("a run would start\n")


@pytest.mark.usefixtures("met")
@pytest.mark.parametrize(
    ("changes", "subject", "words", "hint"),
    [
        ({"cluster": "h100x8"}, "CUDA", "cluster=h100x8", "cluster=laptop"),
        ({"topology__tp": 4}, "plan", "6 attention heads", "topology.tp="),
        ({"data__path": "/no/such.jsonl"}, "data", "/no/such.jsonl: there is no such file", "data=lighthouse"),
        ({"run_dir": "/proc/nope"}, "run folder", "/proc (proc) cannot be written", "run_dir=ANOTHER"),
    ],
)
def test_a_fault_is_one_that_training_ends_with(
    command: Callable[..., Any], tiny_run_model: TinyRun, changes: dict[str, Any], subject: str, words: str, hint: str
) -> None:
    typed = tiny_run_model.words(**changes)
    findings = command("doctor", *typed, "--json", code=1).json["findings"]
    found = next(one for one in findings if one["state"] == "fault" and one["subject"] == subject)
    assert words in found["found"] and found["hint"].startswith(hint)
    command("train", *typed, code=64)


@pytest.mark.usefixtures("met")
def test_a_folder_in_which_somebody_trains_is_a_fault(
    command: Callable[..., Any], tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    run_dir = tmp_path / "held"
    run_dir.mkdir()
    typed = tiny_run_model.words(run_dir=run_dir)
    argv = [sys.executable, "-c", HOLD, str(run_dir)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdin is not None and holder.stdout.readline() == b"held\n"
        found = fault(command("doctor", *typed, "--json", code=1).json["findings"])
        assert found["subject"] == "run" and f"another isotrain is training in {run_dir} (process " in found["found"]
        assert found["found"] in command("train", *typed, code=64).err
        holder.stdin.close()
    command("doctor", *typed, code=0)


@pytest.mark.usefixtures("met")
def test_words_that_are_no_job_are_a_configuration_error(command: Callable[..., Any]) -> None:
    assert command("doctor", "stepz=3", code=64).hint == "steps=3"


@pytest.mark.usefixtures("met")
def test_a_bad_row_is_found_before_the_run_is(
    command: Callable[..., Any], tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    data = tmp_path / "chat.jsonl"
    data.write_text(tiny_run_model.data.read_text() + '{"messages": []}\n')
    found = fault(command("doctor", *tiny_run_model.words(data__path=data), "--json", code=1).json["findings"])
    assert found["subject"] == "data" and "line 21" in found["found"]
    assert "data.on_bad_row=skip" in found["hint"]
    command("doctor", *tiny_run_model.words(data__path=data), "data.on_bad_row=skip", code=0)


@pytest.mark.usefixtures("met")
def test_slurm_is_asked_whether_it_would_take_the_job(
    command: Callable[..., Any], tiny_run_model: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    words = tiny_run_model.words(cluster="slurm_cpu", cluster__slurm__partition="hihg", run_dir=tmp_path / "run")
    seen = states(command("doctor", *words, "--json", code=0).json["findings"])
    assert (seen["Slurm"], seen["submission"], seen["run folder"]) == ("ok", "ok", "warning")
    assert not fake.jobs and not (tmp_path / "run").exists()
    fake.replies("refuse Batch job submission failed: Invalid partition name specified")
    found = fault(command("doctor", *words, "--json", code=1).json["findings"])
    assert found["subject"] == "submission" and "Invalid partition name" in found["found"]
    assert found["hint"].startswith("cluster.slurm.partition=high")
    fake.silent()
    assert fault(command("doctor", *words, "--json", code=1).json["findings"])["subject"] == "Slurm"


@pytest.mark.usefixtures("met")
def test_a_run_that_has_a_job_already_is_a_fault(
    command: Callable[..., Any], tiny_run_model: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    words = tiny_run_model.words(cluster="slurm_cpu", run_dir=tmp_path / "run")
    command("submit", *words, code=0)
    found = fault(command("doctor", *words, "--json", code=1).json["findings"])
    assert found["subject"] == "submission" and "is job 1 already" in found["found"]
    assert found["found"] in command("submit", *words, code=64).err
