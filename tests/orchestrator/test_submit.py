"""What is handed to Slurm, how its refusals read, and that nothing is submitted twice; sbatch is a stand-in here."""

from __future__ import annotations

import json
import shlex
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.environment import LaunchError
from launch.slurm import commands
from launch.slurm.script import Header, render_script
from orchestrator.config.secrets import read_secrets, refuse_secrets
from orchestrator.errors import ConfigError, PeerLost
from orchestrator.jobs.follow import cancel_run, statuses
from orchestrator.jobs.record import Submission, is_cancelled, read_submission, submitted_runs, write_submission
from orchestrator.jobs.submit import prepare, static_script, submit
from tests.helpers.fake_slurm import TIMED_OUT, FakeSlurm

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "sbatch"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:/usr/bin:/bin")
    monkeypatch.setenv("ISOTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(commands.time, "sleep", lambda seconds: None)
    return fake


@pytest.fixture
def words(tmp_path: Path, tiny_model: Callable[..., Path]) -> list[str]:
    data = tmp_path / "chat.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    run = tmp_path / "a run"
    job = [f"model.path={tiny_model('llama')}", f"data.path={data}", "batch.sequence_tokens=64", "cluster=slurm_cpu"]
    return [*job, f"run_dir='{run}'"]


def run_of(words: list[str]) -> Path:
    return Path(words[-1].partition("=")[2].strip("'"))


def test_a_submitted_run_is_written_whole_and_private(slurm: FakeSlurm, words: list[str]) -> None:
    done = submit(words)
    (job,) = slurm.jobs
    script = Path(job["script"])
    assert done.job_id == "1" and script == run_of(words) / "slurm" / "train.sbatch"
    assert stat.S_IMODE(script.stat().st_mode) == 0o600
    assert job["cwd"] == str(run_of(words))  # where the log goes
    assert {"job.yaml", "plan.json"} <= {file.name for file in run_of(words).iterdir()}
    assert job["comment"].startswith("isotrain:")


def test_a_rendered_script_is_the_static_one_but_for_options_and_the_run_folder(words: list[str]) -> None:
    def body(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith(("#SBATCH ", "run_dir="))]

    prepared = prepare(words)
    assert body(prepared.script) == body(static_script())
    assert f"run_dir={shlex.quote(str(run_of(words)))}" in prepared.script.splitlines()
    assert not run_of(words).exists()  # nothing was done


CASES: dict[str, list[str]] = {
    "plain": ["cluster=slurm_cpu"],
    "range": ["cluster=slurm_cpu", "cluster.nodes=2-4"],
    "gpus": ["cluster=slurm_4x8", "batch.global_sequences=32"],
    "everything": [
        "cluster=slurm_4x8",
        "batch.global_sequences=32",
        "cluster.slurm.account=physics",
        "cluster.slurm.partition=gpu",
        "cluster.slurm.qos=normal",
        "cluster.slurm.gres='gpu:h100:8'",
        "cluster.slurm.constraint='h100&ib'",
        "cluster.slurm.exclude='node[3,7-9]'",
        "cluster.slurm.reservation=week47",
        "cluster.slurm.mail_user=me@example.org",
        "cluster.slurm.time='2-12:00:00'",
        "cluster.slurm.array='0-3%1'",
        "cluster.slurm.dependency='afterok:12:13'",
        "cluster.slurm.requeue=false",
        "cluster.slurm.extra=['--nice=100','--switches=1']",
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_scripts_are_as_they_were_reviewed(name: str) -> None:
    model = ["model=smollm2_135m", "data.path=/data/chat.jsonl", "run_dir=/runs/first"]
    text = prepare([*model, *CASES[name]]).script
    assert text == (GOLDEN / f"{name}.sbatch").read_text()
    assert "$" not in "".join(line for line in text.splitlines() if line.startswith("#SBATCH"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("cluster.slurm.account='a b'", "--account='a b' cannot stand in an #SBATCH line"),
        ("cluster.slurm.partition='$(id)'", "cannot stand in an #SBATCH line"),
        ("cluster.slurm.extra=['--nice=1; id']", "is no option of sbatch"),
        ("cluster.slurm.extra=['--export=NONE']", "--export=NONE is set by isotrain"),
    ],
)
def test_what_cannot_stand_in_a_line_is_refused(words: list[str], option: str, message: str) -> None:
    with pytest.raises(LaunchError, match=r"cluster\.slurm") as raised:
        prepare([*words, option])
    assert message in str(raised.value) and raised.value.hint


def test_a_range_is_asked_for_whole_also_where_the_plan_leaves_a_node_idle(words: list[str]) -> None:
    layout = [f"{key}=1" for key in ("cluster.gpus_per_node", "topology.tp", "topology.pp", "topology.cp")]
    prepared = prepare([*words, "cluster.nodes=2-3", "batch.global_sequences=2", *layout])
    assert prepared.planned.plan.cluster.nodes == 2 and "#SBATCH --nodes=2-3\n" in prepared.script


def test_no_path_is_too_strange_for_the_run_folder() -> None:
    folder = Path("/a b/'q\"$(id)`x`\n%j,é")
    line = render_script(static_script(), Header(()), folder).partition("\nrun_dir=")[2].partition("\n\nprologue")[0]
    assert shlex.split(line) == [str(folder)]


@pytest.mark.parametrize("said", [TIMED_OUT, "Unable to contact slurm controller (connect failure)"])
@pytest.mark.parametrize("kind", ["lose", "drop"])
def test_a_passing_fault_is_tried_again_and_never_submits_twice(
    slurm: FakeSlurm, words: list[str], kind: str, said: str
) -> None:
    slurm.replies(f"{kind} {said}", f"drop {said}")
    heard: list[str] = []
    done = submit(words, heard.append)
    assert [job["id"] for job in slurm.jobs] == ["1"] and done.job_id == "1"
    assert any(said.split(":")[-1].strip() in line for line in heard)


def test_a_job_that_was_taken_late_is_kept_and_the_second_one_cancelled(slurm: FakeSlurm, words: list[str]) -> None:
    slurm.replies(f"late {TIMED_OUT}", "ok")
    heard: list[str] = []
    assert submit(words, heard.append).job_id == "1"
    assert [job["id"] for job in slurm.jobs] == ["1", "2"] and ["scancel", "2"] in slurm.calls
    assert "Slurm had taken job 1 after all: job 2 is cancelled" in heard
    assert any("asking again in 10 s" in line for line in heard)


def test_silence_is_not_a_second_job(slurm: FakeSlurm, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100_000, 20))
    pauses: list[float] = []
    monkeypatch.setattr(commands.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(commands.time, "sleep", pauses.append)
    slurm.replies(f"lose {TIMED_OUT}")
    slurm.silent()
    with pytest.raises(PeerLost, match="whether it has taken the job is not known"):
        submit(words)
    assert len(slurm.jobs) == 1
    assert [pause for pause in pauses if pause >= 1][:4] == [10, 20, 30, 30]  # shorter ones wait for a process
    with pytest.raises(PeerLost, match="Slurm does not answer"):
        submit(words)
    slurm.silent(False)
    again = submit(words)
    assert again.job_id == "1" and len(slurm.jobs) == 1 and "nothing was submitted again" in again.message


def test_a_run_that_waits_or_runs_is_not_submitted_again(slurm: FakeSlurm, words: list[str]) -> None:
    submit(words)
    slurm.set_state("RUNNING")
    with pytest.raises(ConfigError, match=r"is job 1 already \(RUNNING\)") as raised:
        submit(words)
    assert raised.value.hint.startswith("isotrain status")
    slurm.silent()
    with pytest.raises(PeerLost, match="does not say whether job 1 runs"):
        submit(words)
    slurm.silent(False)
    slurm.set_state("TIMEOUT")
    assert submit(words).job_id == "2"


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("invalid partition specified: hgih", "cluster.slurm.partition=high"),
        ("Batch job submission failed: Invalid account or account/partition combination specified", "cluster.slurm."),
        ("Batch job submission failed: Invalid qos specification", "cluster.slurm.qos=NAME"),
        ("Batch job submission failed: QOSMaxSubmitJobPerUserLimit: job submit limit", "wait until some of your jobs"),
        ("Batch job submission failed: Requested time limit is invalid", "cluster.slurm.time="),
        ("Batch job submission failed: Requested node configuration is not available", "cluster.nodes=N"),
        ("Batch job submission failed: Access denied", "see sinfo"),
    ],
)
def test_a_refusal_is_said_in_slurms_words_with_a_hint(
    slurm: FakeSlurm, words: list[str], said: str, hint: str
) -> None:
    slurm.replies(f"refuse {said}")
    with pytest.raises(ConfigError, match="Slurm refuses the job") as raised:
        submit([*words, "cluster.slurm.partition=hgih"])
    assert said.removeprefix("Batch job submission failed: ") in str(raised.value)
    assert raised.value.hint.startswith(hint)
    assert len([call for call in slurm.calls if call[0] == "sbatch"]) == 1
    assert read_submission(run_of(words)) is None


def test_a_machine_without_slurm_says_so(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not on the PATH: this is no Slurm machine"):
        submit(words)


@pytest.mark.parametrize(
    ("folder", "said"),
    [(r"/runs/a\b", "in a folder with a backslash"), ("/runs/%j", "in the place of %j"), ("/a%%b", "place of %%")],
)
def test_a_folder_whose_log_slurm_would_lose_is_refused(words: list[str], folder: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        prepare([*words[:-1], f"run_dir='{folder}'"])
    assert raised.value.hint == "run_dir=ANOTHER"
    prepare([*words[:-1], "run_dir='/runs/100%'"])


@pytest.mark.parametrize(
    ("prologue", "folder"), [("[apptainer,i.sif]", "/runs/a,b"), ("[pyxis,i.sqsh,'/data:x']", "/runs/a")]
)
def test_a_folder_that_a_container_cannot_have_is_refused(words: list[str], prologue: str, folder: str) -> None:
    with pytest.raises(ConfigError, match="cannot bind a folder with a comma or a colon") as raised:
        prepare([*words[:-1], f"cluster.slurm.prologue={prologue}", f"run_dir='{folder}'"])
    assert raised.value.hint == "run_dir=ANOTHER"


def test_status_without_accounting_goes_by_what_the_run_says(slurm: FakeSlurm, words: list[str]) -> None:
    submit(words)
    (status,) = statuses(run_of(words))
    assert (status.state, status.step, status.code) == ("PENDING", 0, None) and not status.is_over
    slurm.silent()
    (status,) = statuses(run_of(words))
    assert status.state == "UNKNOWN" and not status.is_over and "Unable to contact" in status.reason
    slurm.silent(False)
    slurm.set_state("")
    (status,) = statuses(run_of(words))
    assert status.state == "UNKNOWN" and status.is_over  # forgotten, and the run has left no word
    value = {"job_id": "1", "code": 93, "cause": "GaveUp", "message": "step 3: loss nan"}
    (run_of(words) / "slurm" / "ended.json").write_text(json.dumps(value))
    (status,) = statuses(run_of(words))
    assert (status.state, status.code, status.reason) == ("FAILED", 93, "step 3: loss nan") and status.is_over


@pytest.mark.parametrize(
    ("state", "now", "call"),
    [
        ("PENDING", False, ["scancel", "1"]),
        ("RUNNING", False, ["scancel", "--batch", "--signal=USR1", "1"]),
        ("RUNNING", True, ["scancel", "1"]),
    ],
)
def test_cancel_is_recorded_before_slurm_is_told(
    slurm: FakeSlurm, words: list[str], state: str, now: bool, call: list[str]
) -> None:
    submit(words)
    slurm.set_state(state)
    cancel_run(run_of(words), now)
    assert is_cancelled(run_of(words), "1") and slurm.calls[-1] == call


def test_cancel_says_when_slurm_is_silent_and_when_there_is_nothing_to_end(slurm: FakeSlurm, words: list[str]) -> None:
    submit(words)
    slurm.silent()
    with pytest.raises(PeerLost, match="Slurm does not answer"):
        cancel_run(run_of(words), now=False)
    slurm.silent(False)
    slurm.set_state("COMPLETED")
    assert cancel_run(run_of(words), now=False) == "job 1 is over already (COMPLETED)"


def test_cancel_goes_on_after_a_run_that_it_cannot_end(
    slurm: FakeSlurm, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from orchestrator.cli import main

    submit(words)
    lost = f"{run_of(words)} lost"
    slurm.replies("refuse Access denied")
    with pytest.raises(ConfigError, match="Access denied"):
        submit([*words[:-1], f"run_dir='{lost}'"])
    assert submitted_runs() == [run_of(words)]  # what was refused is not there for `all`
    write_submission(Path(lost), Submission("isotrain:nobody"))
    assert main(("cancel", lost, str(run_of(words)), "--json")) == 64
    said = capsys.readouterr()
    assert json.loads(said.out)["cancelled"].keys() == {str(run_of(words))} and ["scancel", "1"] in slurm.calls
    assert f"{lost} has no job of Slurm's" in said.err


@pytest.mark.parametrize(
    "word", ["wandb_api_key=abc", "+env.HF_TOKEN=abc", "cluster.slurm.extra=['--x=MY_SECRET=abc']"]
)
def test_secrets_are_not_taken_from_the_command_line(word: str) -> None:
    with pytest.raises(ConfigError, match="a secret does not belong on a command line") as raised:
        prepare(["model=smollm2_135m", word])
    assert "abc" not in f"{raised.value}{raised.value.hint}"


def test_names_that_only_look_like_secrets_are_taken() -> None:
    refuse_secrets(["batch.sequence_tokens=1", "model.config.pad_token_id=0", "tuner.targets='.*(key|value)'"])


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [("A=1\n", 0o644, "has mode 0644: others can read it"), ("A=1\nhunter2\n", 0o600, "secrets:2 is no NAME=VALUE")],
)
def test_a_file_of_secrets_must_be_private_and_whole(tmp_path: Path, text: str, mode: int, message: str) -> None:
    file = tmp_path / "secrets"
    file.write_text(text)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=message) as raised:
        read_secrets(file)
    assert "hunter2" not in str(raised.value)


def test_secrets_are_read_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    file.write_text("# keys\nWANDB_API_KEY=a=b c\n\n")
    file.chmod(0o600)
    assert read_secrets(file) == {"WANDB_API_KEY": "a=b c"}
    with pytest.raises(ConfigError, match="No such file"):
        read_secrets(tmp_path / "none")


def test_the_table_and_the_json_of_status_agree(
    slurm: FakeSlurm, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from orchestrator.cli import main

    def said(*arguments: str) -> Any:
        assert main(arguments) == 0
        return capsys.readouterr().out

    submitted = json.loads(said("submit", *words, "--json"))
    assert submitted["job_id"] == "1"
    (job,) = json.loads(said("status", "all", "--json"))["jobs"]
    assert job["run_dir"] == submitted["run_dir"] == str(run_of(words))
    assert "PENDING" in said("status", str(run_of(words)))
    assert main(("status", str(run_of(words).parent))) == 64
    assert "has no job of Slurm's" in capsys.readouterr().err
