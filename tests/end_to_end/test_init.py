"""``isotrain init``: answers from a pipe become a job file that trains as it is."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config.loading import compose_job
from orchestrator.errors import ConfigError
from orchestrator.interview.detecting import found_clusters, found_data, found_models
from orchestrator.interview.questions import as_words
from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import ISOTRAIN, Shell
from tests.helpers.fake_slurm import FakeSlurm

SMALL = "batch.sequence_tokens=64"


@pytest.fixture
def desk(tmp_path: Path, tiny_run_model: TinyRun, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, data, and files that are neither; no GPU and no Slurm."""
    shutil.copytree(tiny_run_model.model, tmp_path / "tiny")
    shutil.copy(tiny_run_model.data, tmp_path / "chat.jsonl")
    (tmp_path / "results.csv").write_text("step,loss\n1,2.5\n")
    (tmp_path / "notes.json").write_text("{")
    monkeypatch.setenv("PATH", "/nowhere")
    return tmp_path


@pytest.fixture
def init(command: Callable[..., Any], desk: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``isotrain init WORDS`` on the desk, with answers typed into it."""
    monkeypatch.chdir(desk)

    def run(*words: str, answers: str, code: int = 0) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO(answers))
        return command("init", *words, code=code)

    return run


def test_what_is_found_is_proposed_and_the_file_is_a_job(init: Callable[..., Any], desk: Path) -> None:
    done = init(SMALL, answers="\n" * 5)
    assert "model [./tiny]" in done.err and "data [./chat.jsonl]" in done.err and "20 rows" in done.err
    assert done.out.endswith("next: isotrain train job.yaml\n") and "batch     8 sequences" in done.out
    words = [f"model.path={desk}/tiny", f"data.path={desk}/chat.jsonl", SMALL, "tuner=lora", f"run_dir={desk}/runs/job"]
    cluster = next(line for line in (desk / "job.yaml").read_text().splitlines() if line.startswith("cluster"))
    assert compose_job(["job.yaml"]) == compose_job([*words, cluster.replace(": ", "=")])
    assert yaml.safe_load((desk / "job.yaml").read_text())["tuner"] == "lora"


def test_the_next_command_is_the_one_that_works(
    init: Callable[..., Any], desk: Path, command: Callable[..., Any]
) -> None:
    done = init("sub dir.yaml", SMALL, "--json", answers="\n\n\none\n\n")
    shown = json.loads(done.out)
    assert (shown["file"], shown["ranks_used"]) == ("sub dir.yaml", 1)
    isotrain, *words = shlex.split(shown["next"])
    assert isotrain == "isotrain" and "nproc" not in command(*words, "--dry-run", code=0).out
    assert "one: 1 x 1 cpu ranks" in command("plan", *words[1:], "steps=3", code=0).out


def test_a_bad_answer_is_asked_again_with_its_error(init: Callable[..., Any], desk: Path) -> None:
    answers = ["nowhere", "./tiny", "chaat.jsonl", "'open", "data=lighthous", "chat.jsonl", "qlroa", "qlora"]
    answers += ["laptop topology.tp=4", "one stepz=3", "one", "one tuner=dora", "chat.jsonl", "runs/mine"]
    done = init("x.yaml", SMALL, answers="\n".join([*answers, ""]))
    for words in (
        "model.path=nowhere is no folder here",
        "chaat.jsonl: there is no such file",
        "No closing quotation",
        "hint: data=lighthouse",
        "hint: tuner=qlora",
        "6 attention heads",
        "hint: steps=3",
        "hint: tuner.quantise=null",
        f"run_dir={desk}/chat.jsonl is a file",
        f"new run in {desk}/runs/mine",
    ):
        assert words in done.err
    job = compose_job(["x.yaml"])
    assert (job.tuner.dora, job.cluster.name, job.run_dir) == (True, "one", f"{desk}/runs/mine")
    assert job.data.path == f"{desk}/chat.jsonl" and job.topology.tp is None and job.tuner.quantise is None


def test_what_is_typed_is_not_asked(init: Callable[..., Any], desk: Path) -> None:
    words = ["model.path=tiny", "data=lighthouse", "tuner=dora", "tuner.r=4", "cluster=one", "run_dir=r", SMALL]
    words.append("data.on_bad_row=skip")
    done = init("y.yaml", *words, answers="")
    assert "[" not in done.err
    assert compose_job(["y.yaml"]) == compose_job(words)
    assert yaml.safe_load((desk / "y.yaml").read_text())["data"] == "lighthouse"
    assert "there is no such file" in init("z.yaml", *words[:1], "data.path=q.jsonl", answers="", code=64).err
    assert not (desk / "z.yaml").exists()


def test_nothing_is_overwritten_and_nothing_half_written(init: Callable[..., Any], desk: Path) -> None:
    (desk / "job.yaml").write_text("mine")
    assert init(answers="", code=64).hint == "isotrain init another.yaml"
    assert (desk / "job.yaml").read_text() == "mine"
    done = init("new.yaml", answers="\n", code=64)
    assert "the answers ended before the question about data" in done.err
    assert done.hint.startswith("isotrain init FILE")
    assert init("job.json", answers="", code=64).hint == "isotrain init job.yaml"
    assert init("no/folder.yaml", answers="", code=64).hint == "mkdir -p no"
    assert not list(desk.glob("*new*")) and not list(desk.glob(".*"))


def test_ctrl_c_leaves_nothing(shell: Shell, desk: Path) -> None:
    environment = shell.environment | {"PATH": "/nowhere"}
    started = subprocess.Popen(
        [*ISOTRAIN, "init", "new.yaml"], cwd=desk, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert started.stdin is not None and started.stderr is not None
    seen = iter(lambda: os.read(started.stderr.fileno(), 4096), b"")
    next(chunk for chunk in joined(seen) if b"model [./tiny]: " in chunk)
    started.send_signal(signal.SIGINT)
    assert started.wait(timeout=60) == 130
    assert not (desk / "new.yaml").exists() and not list(desk.glob(".new*"))


def joined(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """All that was read so far, after each piece."""
    so_far = b""
    for chunk in chunks:
        so_far += chunk
        yield so_far


def test_a_quote_that_is_left_open_is_an_error() -> None:
    with pytest.raises(ConfigError, match="No closing quotation") as raised:
        as_words("data", "'my rows.jsonl")
    assert shlex.split(raised.value.hint) == ["'my rows.jsonl"]


def test_models_in_caches_are_found_by_the_name_of_their_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISOTRAIN_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "theirs"))
    for folder in (
        "ours/models/HuggingFaceTB--SmolLM2-135M-Instruct",
        "theirs/models--org--tiny/snapshots/0123",
        "theirs/models--org--no-weights/snapshots/0123",
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
        if "no-weights" not in folder:
            (tmp_path / folder / "model.safetensors").touch()
    assert found_models(tmp_path / "nothing here") == ["smollm2_135m", "org/tiny"]
    assert found_data(tmp_path) == []


def test_the_cluster_that_is_proposed_is_the_one_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:/usr/bin:/bin")
    (fake.folder / "sinfo").write_text("#!/bin/sh\necho 'high 2 gpu:h100:8'\necho 'batch* 4 gpu:h100:8(S:0-1)'\n")
    first = "slurm_4x8 cluster.gpus_per_node=8 cluster.nodes=4 cluster.slurm.partition=batch"
    assert found_clusters()[0] == first
    cluster = compose_job(as_words("cluster", first)).cluster
    assert (cluster.nodes, cluster.gpus_per_node, cluster.slurm.partition) == (4, 8, "batch")
    (fake.folder / "sinfo").write_text("#!/bin/sh\necho 'all* 3 (null)'\n")
    assert found_clusters()[0] == "slurm_cpu cluster.nodes=3 cluster.slurm.partition=all"
    (fake.folder / "sinfo").write_text("#!/bin/sh\nexit 1\n")
    smi = fake.folder / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA L4 (UUID: GPU-1)'\n")
    smi.chmod(0o755)
    assert found_clusters()[0] == "gpu1 cluster.gpus_per_node=1"
    smi.write_text('#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo "GPU $i: NVIDIA H100 80GB HBM3"; done\n')
    assert found_clusters()[0] == "h100x8"
    smi.unlink()
    assert found_clusters()[0] in ("laptop", "one")
