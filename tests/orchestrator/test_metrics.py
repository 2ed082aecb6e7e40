"""What a run writes about its steps: each once, whatever was killed, in every sink that was asked for."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from launch.environment import wandb_is_offline
from orchestrator.config.job import MetricsConfig
from orchestrator.errors import ConfigError
from orchestrator.metrics import Metrics
from orchestrator.progress import Remaining
from orchestrator.supervise import last_logged_step

QUIET = MetricsConfig(progress=False)
VALUES = {"loss": 2.5, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens": 100, "step_s": 0.5}


def steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def log(run_dir: Path, first: int, last: int, config: MetricsConfig = QUIET) -> None:
    metrics = Metrics(config, run_dir, total_steps=10, first_step=first)
    for step in range(first, last + 1):
        metrics.log(step, VALUES)
    metrics.close()


def test_a_line_per_step_holds_the_promised_keys(tmp_path: Path) -> None:
    log(tmp_path, 1, 2)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert list(line) == ["step", "time", "loss", "grad_norm", "learning_rate", "tokens", "step_s", "tokens_per_s"]
    assert line["tokens_per_s"] == 200.0


def test_mfu_is_a_share_of_the_devices_peak_where_that_is_known(tmp_path: Path) -> None:
    metrics = Metrics(QUIET, tmp_path, 10, peak_tokens_per_s=800.0)
    metrics.log(1, VALUES)
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["mfu"] == 0.25


@pytest.mark.parametrize("resumed_after", [0, 1, 3, 5])
def test_after_a_resume_every_step_is_there_once(tmp_path: Path, resumed_after: int) -> None:
    log(tmp_path, 1, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed here
    log(tmp_path, resumed_after + 1, 7)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]


def test_a_step_is_on_disk_before_the_next_begins(tmp_path: Path) -> None:
    metrics = Metrics(QUIET, tmp_path, 10)
    metrics.log(1, VALUES)
    assert steps(tmp_path) == [1] and last_logged_step(tmp_path / "metrics.jsonl") == 1
    metrics.close()


def test_a_loss_that_is_no_number_still_makes_valid_json(tmp_path: Path) -> None:
    metrics = Metrics(QUIET, tmp_path, 10)
    metrics.log(1, VALUES | {"loss": float("nan"), "grad_norm": float("inf")})
    metrics.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["loss"] is None and line["grad_norm"] is None


def test_plain_lines_where_nobody_looks(tmp_path: Path) -> None:
    stream = io.StringIO()
    metrics = Metrics(MetricsConfig(), tmp_path, 10, stream=stream)
    metrics.log(1, VALUES)
    metrics.close()
    assert stream.getvalue() == "step 1/10  loss 2.5000  grad norm 0.500  lr 1.00e-03  200 tokens/s  ETA ?\n"


def test_the_time_left_does_not_count_the_first_step() -> None:
    times = iter([100.0, 102.0, 104.0])
    remaining = Remaining(10, clock=lambda: next(times))
    assert [remaining.after(step) for step in (1, 2, 3)] == [None, 16.0, 14.0]


def test_tensorboard_gets_every_step_once(tmp_path: Path) -> None:
    config = MetricsConfig(sinks=["jsonl", "tensorboard"], progress=False)
    log(tmp_path, 1, 4, config)
    log(tmp_path, 3, 5, config)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_wandb_stays_offline_without_a_key_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    stream = io.StringIO()
    metrics = Metrics(MetricsConfig(sinks=["wandb"], progress=False), tmp_path, 10, stream=stream)
    metrics.log(1, VALUES)
    metrics.close()
    assert "wandb has no API key" in stream.getvalue()
    assert list((tmp_path / "wandb").glob("offline-run-*")) and steps(tmp_path) == [1]


@pytest.mark.parametrize(("sink", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sink: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"metrics.sinks has {sink}, but it cannot be imported") as raised:
        Metrics(MetricsConfig(sinks=[sink], progress=False), tmp_path, 10)
    assert raised.value.hint == f"pip install 'isotrain[{sink}]'"


def test_wandb_finds_a_key_in_netrc(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n")
    assert not wandb_is_offline({"NETRC": str(tmp_path / "netrc")})
    assert wandb_is_offline({"NETRC": str(tmp_path / "none")})
    assert wandb_is_offline({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"})
