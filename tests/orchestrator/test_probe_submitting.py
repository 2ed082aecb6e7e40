"""`isotrain submit --probe`: what is asked of Slurm, what follows from a probe's end; sbatch is a stand-in here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.jobs.submit import leaving_out, prepare, static_script
from orchestrator.probing import submitting
from orchestrator.probing.command import show
from orchestrator.probing.judging import judge
from orchestrator.probing.report import Asked, Found, Link, Report
from orchestrator.probing.submitting import Options, probe_script
from tests.end_to_end.shell import wait_for
from tests.helpers.fake_slurm import FakeSlurm

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "sbatch"
MODEL = ["model=smollm2_135m", "data.path=/data/chat.jsonl", "run_dir=/runs/first"]
FOUND, LOG = "slurm/probe-found.json", "slurm/probe-%j.log"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:/usr/bin:/bin")
    monkeypatch.setenv("ISOTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(submitting, "SEEN_AFTER_S", 0.0)
    return fake


@pytest.fixture
def words(tmp_path: Path, tiny_model: Callable[..., Path]) -> list[str]:
    data = tmp_path / "chat.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    job = [f"model.path={tiny_model('llama')}", f"data.path={data}", "batch.sequence_tokens=64", "cluster=slurm_cpu"]
    return [*job, "cluster.nodes=2", "batch.global_sequences=4", f"run_dir={tmp_path / 'run'}"]


def run_of(words: list[str]) -> Path:
    return Path(words[-1].partition("=")[2])


def report(name: str, **changes: Any) -> Report:
    return Report(name, **({"write_mb_s": 900.0, "free_gib": 50.0, "links": (Link(("x",), 1e9),)} | changes))


def found(*reports: Report, **more: Any) -> dict[str, Any]:
    """The file that a probe leaves behind."""
    return {FOUND: asdict(Found("", reports, **more))}


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    """What a command says on both streams."""
    assert main(arguments) == code
    said = capsys.readouterr()
    return said.out, said.err


def options_of(text: str) -> set[str]:
    return {line for line in text.splitlines() if line.startswith("#SBATCH ")}


def test_a_probe_is_the_static_script_but_for_options_and_the_run_folder(words: list[str]) -> None:
    def body(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith(("#SBATCH ", "run_dir="))]

    prepared = prepare(words)
    text = probe_script(prepared, Options())
    assert body(text) == body(static_script("probe.sbatch"))
    assert body(text)[3:-1] == body(prepared.script)[3:-1]  # one body, but for its comment and its last line
    assert not run_of(words).exists()


CASES: dict[str, tuple[list[str], Options]] = {
    "probe-plain": (["cluster=slurm_cpu"], Options()),
    "probe-more": (
        [
            *("cluster=slurm_4x8", "batch.global_sequences=32", "cluster.slurm.partition=gpu"),
            *("cluster.slurm.account=physics", "cluster.slurm.exclude=node7", "cluster.slurm.array='0-3%1'"),
            *("cluster.slurm.dependency=afterok:12", "cluster.slurm.mail_user=me@example.org"),
        ],
        Options(nodes=6, patience_s=60.0),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_scripts_are_as_they_were_reviewed(name: str) -> None:
    typed, options = CASES[name]
    text = probe_script(prepare([*MODEL, *typed]), options)
    assert text == (GOLDEN / f"{name}.sbatch").read_text()


def test_a_probe_asks_for_the_jobs_own_range_of_nodes() -> None:
    typed = [*MODEL, "cluster=slurm_cpu", "cluster.nodes=2-4"]
    assert "#SBATCH --nodes=2-4" in options_of(probe_script(prepare(typed), Options()))


def test_the_plans_links_are_what_a_probe_is_told(slurm: FakeSlurm) -> None:
    typed = [*MODEL, "cluster=slurm_4x8", "batch.global_sequences=32"]
    gpus = submitting.asked_of(prepare(typed).planned.job, "t", 9.0)
    assert round(gpus.assumed_rate / 1e9) == 294 and (gpus.gpus_per_node, gpus.memory_gib) == (8, 76.0)
    assert submitting.asked_of(prepare([*MODEL, "cluster=slurm_cpu"]).planned.job, "t", 9.0).assumed_rate == 0


def test_a_dry_run_shows_both_scripts_and_does_nothing(
    slurm: FakeSlurm, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run(capsys, "submit", *words, "--probe", "--dry-run")
    prepared = prepare(words)
    both = (probe_script(prepared, Options()), prepared.script)
    assert out == f"# slurm/probe.sbatch\n{both[0]}\n# slurm/train.sbatch\n{both[1]}"
    value = json.loads(run(capsys, "submit", *words, "--probe", "--dry-run", "--json")[0])
    assert (value["probe_script"], value["script"]) == both
    assert not run_of(words).exists() and slurm.calls == []


def test_bad_nodes_are_left_out_beside_those_of_the_user(
    slurm: FakeSlurm, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = report("n2", clock_s=90.0)
    slurm.probe_finds(found(report("n1"), bad, report("n3"), silent={"n4": "no answer in 120 s"}))
    typed = ["submit", "cluster.slurm.exclude='n[7-9]'", *words, "--probe-nodes", "4"]
    value = json.loads(run(capsys, *typed, "--json")[0])
    probe_job, job = slurm.jobs
    assert Path(probe_job["script"]).name == "probe.sbatch" and value["job_id"] == job["id"] == "2"
    lines = options_of(Path(job["script"]).read_text())
    assert "#SBATCH --exclude=n[7-9],n2,n4" in lines and "#SBATCH --nodes=2" in lines
    assert "#SBATCH --nodes=4" in options_of(Path(probe_job["script"]).read_text())
    assert "#SBATCH --exclude=n[7-9]" in options_of(Path(probe_job["script"]).read_text())
    assert value["probe"]["bad"] == ["n2", "n4"]
    assert [one["why"] for one in value["probe"]["nodes"]] == [
        [], ["its clock is 90.0 s ahead"], [], ["no answer in 120 s"],
    ]  # fmt: skip
    assert "exclude: n[7-9],n2,n4" in (run_of(words) / "job.yaml").read_text()
    assert Path(probe_job["script"]).stat().st_mode & 0o777 == 0o600


def test_the_table_says_why(slurm: FakeSlurm, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    reports = (report("n1"), report("n2"), report("n3", folder_error="/r cannot be written: Read-only file system"))
    slurm.probe_finds(found(*reports, whole=Link(("n1", "n2", "n3"), 5e8)))
    out, err = run(capsys, "submit", *words, "--probe")
    rows = [line.split() for line in out.splitlines() if line[:2] in ("n1", "n2", "n3") and "is bad" not in line]
    assert [(row[0], row[-1]) for row in rows] == [("n1", "good"), ("n2", "good"), ("n3", "bad")]
    assert "n3 is bad: /r cannot be written: Read-only file system" in out
    assert "3 nodes together all-reduce at 0.50 GB/s" in out and "job      2" in out
    assert "probe: job 1 COMPLETED" in err


def test_the_table_of_gpus_says_what_was_read(capsys: pytest.CaptureFixture[str]) -> None:
    blind = report("n1", gpus=("H100",) * 8, gpu_gib=80.0, unread=("ECC (no nvidia-smi)", "XID (no dmesg)"))
    seen = report("n2", gpus=("H100",) * 8, gpu_gib=80.0, unread=("XID (no dmesg)",), links=())
    faulty = report("n3", gpus=("H100",) * 8, gpu_gib=80.0, faults=("GPU 0: 1 uncorrected ECC errors",))
    broken = report("n4", gpu_error="no driver", links=(Link(("n1",), error="reset"),))
    asked = Asked("", device="cuda", gpus_per_node=8)
    show(judge(Found("", (blind, seen, faulty, broken)), asked), sys.stdout)
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "MB/s" in line}
    assert [rows[name].split()[1] for name in rows] == ["8", "8", "8", "0"]
    assert "not readable" in rows["n1"] and "not readable" not in rows["n2"] and "failed" in rows["n4"]
    assert [rows[name].split()[-1] for name in rows] == ["good", "good", "bad", "bad"]


def test_too_few_good_nodes_submit_nothing(
    slurm: FakeSlurm, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.probe_finds(found(report("n1"), report("n2", free_gib=0.1)))
    out, _ = run(capsys, "submit", *words, "--probe", "--json", code=71)
    value = json.loads(out)
    assert value["error"] == "1 of 2 probed nodes are good, and the job needs 2: nothing is submitted"
    assert value["hint"] == "--probe-nodes 3   or   cluster.nodes=1-2"
    assert value["probe"]["bad"] == ["n2"] and value["code"] == 71
    assert [Path(job["script"]).name for job in slurm.jobs] == ["probe.sbatch"]
    assert not (run_of(words) / "job.yaml").exists()
    slurm.probe_finds(found(report("n1"), report("n2", free_gib=0.1)))
    hinted = [*words[:-1], "cluster.nodes=1-2", words[-1]]  # the hint works, in the same folder
    assert json.loads(run(capsys, "submit", *hinted, "--probe", "--json")[0])["job_id"] == "3"


def test_a_range_goes_on_with_those_that_are_good(
    slurm: FakeSlurm, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.probe_finds(found(report("n1"), silent={"n2": "no answer in 120 s"}))
    typed = [*words, "cluster.nodes=1-2"]
    assert json.loads(run(capsys, "submit", *typed, "--probe", "--json")[0])["probe"]["good"] == ["n1"]


def test_a_probe_that_ends_early_is_judged_by_what_nodes_wrote(
    slurm: FakeSlurm, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.probe_finds({"probe/n2.json": asdict(report("n2", links=()))}, state="NODE_FAIL", code=1)
    out, _ = run(capsys, "submit", *words, "cluster.nodes=1-2", "--probe", "--json")
    nodes = json.loads(out)["probe"]["nodes"]
    assert [(one["node"], one["why"]) for one in nodes] == [
        ("n1", ["no answer before the probe ended (NODE_FAIL)"]), ("n2", []),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "state", "code", "error", "hint", "ends"),
    [
        ({}, "CANCELLED", 0, "the probe, job 1, was cancelled: nothing is submitted", "the same command again", 93),
        (
            *({}, "FAILED", 1, "job 1, ended FAILED before any node answered, and its first node, n1, has left no log"),
            *("cluster.slurm.exclude=n1", 71),
        ),
        ({LOG: "srun: broken\n"}, "FAILED", 1, "before any node answered: srun: broken", "see ", 71),
        (
            {LOG: "isotrain is not on the PATH of n1\nhint: activate its environment\n"},
            *("FAILED", 64, "before any node answered: isotrain is not on the PATH of n1"),
            *("activate its environment", 64),
        ),
    ],
)
def test_a_probe_without_answers_submits_nothing(
    slurm: FakeSlurm,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    files: dict[str, Any],
    state: str,
    code: int,
    error: str,
    hint: str,
    ends: int,
) -> None:
    slurm.probe_finds(files, state=state, code=code)
    _, err = run(capsys, "submit", *words, "--probe", code=ends)
    assert error in err and f"hint: {hint}" in err and len(slurm.jobs) == 1


def test_slurms_refusal_of_a_probe_is_said_and_leaves_an_earlier_job_known(
    slurm: FakeSlurm, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "submit", *words)
    slurm.set_state("TIMEOUT")
    earlier = (run_of(words) / "slurm" / "job.json").read_text()
    slurm.replies("refuse Batch job submission failed: Requested node configuration is not available")
    _, err = run(capsys, "submit", *words, "--probe-nodes", "99", code=64)
    assert "Slurm refuses the job: Batch job submission failed: Requested node configuration" in err
    assert (run_of(words) / "slurm" / "job.json").read_text() == earlier


def test_fewer_nodes_than_the_job_needs_are_not_probed(
    slurm: FakeSlurm, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = run(capsys, "submit", *words, "--probe-nodes", "1", code=64)
    assert "--probe-nodes 1: the job needs 2 good nodes\nhint: --probe-nodes 3" in err and slurm.jobs == []
    for option, value in (("--probe-nodes", "0"), ("--probe-patience", "0")):
        assert "should be at least 1" in run(capsys, "submit", *words, option, value, code=64)[1]


def test_ctrl_c_cancels_the_probe(slurm: FakeSlurm, words: list[str], tmp_path: Path) -> None:
    slurm.set_state("RUNNING")
    command = [sys.executable, "-m", "orchestrator", "submit", *words, "--probe"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (tmp_path / "said").open("w") as said:
        started = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
    wait_for(lambda: ["scontrol", "--oneliner", "show", "job", "1"] in slurm.calls)
    wait_for(lambda: "probe: job 1 RUNNING" in (tmp_path / "said").read_text())
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(timeout=60) == 130
    assert ["scancel", "1"] in slurm.calls and len(slurm.jobs) == 1
    assert "the probe, job 1, is cancelled; nothing is submitted" in (tmp_path / "said").read_text()


def test_a_probe_that_outlived_its_command_is_cancelled_by_the_next(
    slurm: FakeSlurm, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (run_of(words) / "slurm").mkdir(parents=True)
    (run_of(words) / "slurm" / "probe-job.json").write_text('{"mark": "isotrain:lost", "job_id": "77"}')
    slurm.set_state("RUNNING")
    slurm.probe_finds(found(report("n1"), report("n2")))
    _, err = run(capsys, "submit", *words, "--probe")
    assert "an earlier probe, job 77, is cancelled" in err and ["scancel", "77"] in slurm.calls


def test_a_node_whose_name_cannot_stand_in_a_line_is_refused(words: list[str]) -> None:
    from launch.environment import LaunchError

    with pytest.raises(LaunchError, match="cannot stand in an #SBATCH line"):
        leaving_out(prepare(words), ["n1 --wrap"])
