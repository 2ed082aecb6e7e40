"""The command line as a user types it: words, hints, exit codes, JSON, and runs with a stand-in for the ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from launch.request import Rendered
from orchestrator import commands
from orchestrator.cli import COMMANDS, main
from orchestrator.config.building import read_job
from orchestrator.errors import ConfigError
from orchestrator.exporting import base_folder
from orchestrator.torchrun import prepare

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "model.weights=random",
    "model.config={model_type: llama, num_hidden_layers: 2, hidden_size: 8, num_attention_heads: 2, "
    "intermediate_size: 16, vocab_size: 32, max_position_embeddings: 64}",
    "data=lighthouse",
    "cluster=one",
    "batch.sequence_tokens=32",
]

# A rank that saves a checkpoint of the last step, as far as anyone but a reader of tensors can tell.
RANK = """
import os, sys
from pathlib import Path
from orchestrator.config.building import read_job
from orchestrator.supervise import guarded, leave_process
from orchestrator.errors import DataError
run_dir = Path(sys.argv[1])
def work():
    steps = read_job(run_dir).steps
    if steps == 11:
        return 85
    if steps == 15:
        os.kill(os.getpid(), 9)
    if steps == 13:
        raise DataError("the data end with a bang", "data.on_bad_row=skip")
    folder = run_dir / "checkpoints" / f"step-{steps:06d}"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (run_dir / "checkpoints" / "latest").write_text(folder.name)
    print("trained", file=sys.stderr)
    return 0
leave_process(guarded(run_dir, 0, work))
"""


@pytest.fixture
def fake_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank that is a real process and no training."""
    one = {"RANK": "0", "WORLD_SIZE": "1"}

    def rendered(planned: commands.Planned, run_dir: Path) -> Rendered:
        return Rendered((sys.executable, "-c", RANK, str(run_dir)), tuple(one.items()))

    monkeypatch.setattr(commands, "rendered_launch", rendered)
    monkeypatch.setattr("orchestrator.runs.is_whole", lambda run_dir, step: True)  # it leaves empty checkpoints
    monkeypatch.chdir(ROOT)


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, object], str]:
    capsys.readouterr()
    code = main([*words, "--json"])
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    return code, json.loads(captured.out), captured.err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from orchestrator.cli import main; main(['--help']); main([]);"
        "heavy = {'torch', 'hydra', 'transformers', 'peft', 'megatron', 'rich', 'yaml', 'numpy'};"
        "sys.exit(len(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert all(command.example in done.stdout for command in COMMANDS.values())


def test_a_plan_needs_no_torch_and_no_transformers() -> None:
    code = (
        "import sys; from orchestrator.cli import main; main(['plan', 'model=smollm2_135m']);"
        "sys.exit(len({'torch', 'transformers', 'peft', 'megatron', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_helps_with_an_example_and_the_exit_codes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert COMMANDS[name].example in text and "--json" in text and "64 your configuration" in text


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["trian"], "there is no command 'trian'", "isotrain train"),
        (["plan", "--nope"], "unrecognized arguments: --nope (a job's values are KEY=VALUE", "isotrain plan model="),
        (["export", "x"], "required: --to", "isotrain export runs/first --to"),
        (["export", "x", "y", "--to", "gguf"], "invalid choice: 'gguf'", "isotrain export runs/first --to"),
        (["plan", "stepz=3"], "the nearest is 'steps'", "steps=3"),
        (["plan", "model=smollm2_135m", "topology.tp=2"], "9 attention heads", "topology.tp=3"),
        (["plan", "model.config={model_type: gpt9}"], "gpt9", "supported families"),
        (["train", "model=smollm2_135m", "data.path=/no/such.jsonl", "run_dir=r"], "/no/such.jsonl", ""),
        (
            ["train", "model.path=/no/model", "data=lighthouse", "run_dir=r"],
            "model.path=/no/model",
            "model.path=FOLDER",
        ),
        (["train", *TINY, "run_dir=/proc/nope"], "run_dir=/proc/nope cannot be made", "run_dir=ANOTHER"),
        (["resume", "/no/run"], "is no run folder", "isotrain train"),
        (["generate", "x", "--prompt", "y", "--max-new-tokens", "0"], "0 should be at least 1", "isotrain generate"),
        (["resume"], "isotrain resume: the following arguments are required: DIR\n", "isotrain resume runs/first"),
        (["plan"], "model.path is not set", "model=smollm2_135m"),
        (["generate", "/no/run", "--prompt", "x"], "there is no folder /no/run", "isotrain generate"),
    ],
)
def test_bad_input_is_64_with_a_hint_on_one_screen(
    words: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(words) == 64
    captured = capsys.readouterr()
    assert message in captured.err and f"hint: {hint}" in captured.err and captured.out == ""
    assert len(captured.err.splitlines()) < 24 and "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_no_command_at_all_shows_the_help_and_is_64(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 64
    assert "usage: isotrain COMMAND" in capsys.readouterr().out


def test_json_of_an_error_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    code, value, err = run_json(capsys, "plan", "stepz=3")
    assert code == value["code"] == 64
    assert value["hint"] == "steps=3" and "stepz" in str(value["error"]) and "stepz" in err


def test_plan_prints_topology_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=smollm2_135m", "cluster=laptop"]) == 0
    text = capsys.readouterr().out
    assert "topology" in text and "why" in text and "rejected" in text
    _, value, _ = run_json(capsys, "plan", "model=smollm2_135m", "topology.tp=3")
    assert value["topology"]["tp"] == 3  # type: ignore[index]


def test_options_may_stand_between_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=smollm2_135m", "--json", "topology.tp=3"]) == 0
    assert json.loads(capsys.readouterr().out)["topology"]["tp"] == 3


def test_dry_run_prints_the_command_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    _, value, _ = run_json(capsys, "train", "--dry-run", "experiment=demo", f"run_dir={run_dir}")
    assert "torch.distributed.run" in str(value["command"]) and str(value["command"]).endswith(f"worker {run_dir}")
    assert not run_dir.exists()


@pytest.mark.usefixtures("fake_ranks")
def test_the_life_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    words = ["train", *TINY, f"run_dir={run_dir}"]
    code, value, err = run_json(capsys, *words, "steps=5")
    assert (code, value["step"], value["run_dir"]) == (0, 5, str(run_dir)) and "new run in" in err
    assert {"job.yaml", "plan.json", "logs", "exits", "checkpoints"} <= {file.name for file in run_dir.iterdir()}

    code, value, _ = run_json(capsys, *words, "steps=5")
    assert code == 0 and "is finished: 5 of 5 steps" in str(value["message"])

    code, value, err = run_json(capsys, *words, "steps=8", "topology.dp=1")
    assert (code, value["step"]) == (0, 8) and "resuming" in err and "after step 5 of 8" in err

    code, value, _ = run_json(capsys, *words, "steps=9", "seed=4")
    assert code == 64 and "seed: 0 -> 4" in str(value["error"])
    assert str(value["hint"]).startswith(f"isotrain resume {run_dir} seed=4")

    code, value, err = run_json(capsys, "resume", str(run_dir), "seed=4", "steps=9")
    assert (code, value["step"]) == (0, 9)
    assert (read_job(run_dir).seed, read_job(run_dir).steps) == (4, 9)
    assert "changed: seed from 0 to 4" in err

    code, value, err = run_json(capsys, "resume", str(run_dir), "steps=11")
    assert (code, value["message"]) == (85, "interrupted; 9 of 11 steps are saved")
    assert value["hint"] == f"isotrain resume {run_dir}"

    code, value, err = run_json(capsys, "resume", str(run_dir), "steps=13")
    assert (code, value["cause"], value["step"]) == (65, "DataError", 9)
    assert "the data end with a bang\nhint: data.on_bad_row=skip" in err

    code, value, err = run_json(capsys, "resume", str(run_dir), "steps=15", "recovery.restarts=1")
    assert (code, value["cause"], value["step"]) == (93, "Killed", 9)
    assert "rank 0 was killed by SIGKILL and left no word; starting again from step 9" in err
    assert value["message"].endswith("; 2 times without a new checkpoint after step 9: given up")
    assert value["hint"] == f"isotrain logs {run_dir}"
    (run_dir / "logs" / "rank-0.log").write_text("a line of rank 0\n")
    code, value, _ = run_json(capsys, "logs", str(run_dir))
    assert (code, value["lines"]) == (0, ["[0] a line of rank 0"])
    code, value, err = run_json(capsys, "resume", str(run_dir), "steps=15", "recovery.restarts=0")
    assert code == 86 and "starting again" not in err


@pytest.mark.usefixtures("fake_ranks")
def test_a_run_without_a_folder_gets_one_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    code, value, err = run_json(capsys, "train", *TINY, "steps=1")
    assert code == 0 and f"new run in {tmp_path}/runs/model-" in err
    assert read_job(Path(str(value["run_dir"]))).run_dir == value["run_dir"]


def test_by_hand_the_plan_is_for_the_ranks_there_are(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [*TINY, "cluster=laptop", f"run_dir={run_dir}"]
    with pytest.raises(ConfigError, match="torchrun by hand needs run_dir"):
        prepare(overrides[:-1], 1, 2, ExitStack())
    with pytest.raises(ConfigError, match="the job needs 4 ranks, but torchrun has started 2") as caught:
        prepare([*overrides, "topology.dp=4"], 1, 2, ExitStack())
    assert caught.value.hint == "torchrun --nproc-per-node 4 -m orchestrator train ..."
    assert not run_dir.exists()
    assert prepare(overrides, 1, 2, ExitStack()) == (run_dir, "start")
    assert json.loads((run_dir / "plan.json").read_text())["ranks_used"] == 2
    assert read_job(run_dir).cluster.gpus_per_node == 4


def test_resume_by_hand_names_the_command_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="resume starts its own ranks") as raised:
        COMMANDS["resume"].run(COMMANDS["resume"].parser("resume").parse_intermixed_args(["r"]))
    assert raised.value.hint.startswith("torchrun ... -m orchestrator train")


def test_a_configuration_error_by_hand_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    for rank, said in (("0", True), ("1", False)):
        environment = os.environ | {"RANK": rank, "WORLD_SIZE": "2"}
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", "plan", "stepz=1"], cwd=ROOT, env=environment, capture_output=True
        )
        assert done.returncode == 64 and bool(done.stderr) is said


def test_an_adapter_names_its_base_and_a_stray_folder_does_not(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/no/base"}')
    with pytest.raises(ConfigError, match="/no/base: no such folder"):
        base_folder(tmp_path)
    with pytest.raises(ConfigError, match="does not say which model it belongs to"):
        base_folder(tmp_path / "checkpoints" / "step-000001")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_run_that_is_stopped_before_its_ranks_are_there_may_be_run_again(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "train", lambda overrides, say: os.kill(os.getpid(), number) or time.sleep(60))
    before = signal.getsignal(number)
    assert main(["train", "run_dir=r", "--json"]) == 85
    out, err = capsys.readouterr()
    assert json.loads(out)["code"] == 85 and signal.getsignal(number) is before
    assert f"interrupted by {number.name} while no rank ran: there was nothing to save" in err
    assert "hint: run the same command again" in err
