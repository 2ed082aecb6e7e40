from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import _save_tiny
from tests.end_to_end.shell import Folder, Shell
from tests.helpers import runs
from tests.orchestrator.tiny_tokenizer import write_tokenizer


@dataclass(frozen=True)
class TinyRun:
    """A tiny model with a tokenizer, a short data file, and the words that train one on the other."""

    model: Path
    data: Path

    def words(self, **changes: object) -> list[str]:
        """Overrides of a run of 6 steps on one process; ``changes`` with ``__`` for dots."""
        keys: dict[str, object] = {
            "model.path": self.model,
            "data.path": self.data,
            "cluster": "one",
            "steps": 6,
            "batch.global_sequences": 4,
            "batch.sequence_tokens": 64,
            "optimizer.lr": 0.01,
            "optimizer.warmup_steps": 1,
            "checkpoint.every_steps": 3,
            "tuner.r": 4,
            "tuner.alpha": 8,
        }
        keys |= {name.replace("__", "."): value for name, value in changes.items()}
        return [f"{name}={value}" for name, value in keys.items() if value is not None]


def write_chat(file: Path, rows: int = 20) -> Path:
    """A data file of short questions and answers of several lengths."""
    with file.open("w") as stream:
        for row in range(rows):
            answer = "it is " + "hello " * (row % 3 + 1) + str(row)
            turns = [("user", f"what is {row}?"), ("assistant", answer)]
            stream.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return file


@pytest.fixture(scope="session")
def tiny_run_model(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """:func:`make_tiny_run`, once."""
    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


def make_tiny_run(folder: Path) -> TinyRun:
    """A model of 4 layers and 6 heads with a tokenizer, and 20 rows of chat."""
    model = folder / "model"
    model.mkdir()
    write_tokenizer(_save_tiny(runs.config("llama", vocab_size=270), model))
    return TinyRun(model, write_chat(folder / "chat.jsonl"))


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A shell in an empty folder."""
    folder = tmp_path_factory.mktemp("shell")
    return Shell(folder, folder / "cache")


@pytest.fixture(scope="session")
def uninterrupted(shell: Shell, tiny_run_model: TinyRun) -> Folder:
    """6 steps of LoRA without a pause on PP=2 x DP=2, saved after 3 and 6: what every other run must agree with."""
    folder = Folder(shell.folder / "uninterrupted")
    words = tiny_run_model.words(cluster="laptop", topology__pp=2, run_dir=folder.path)
    done = shell.isotrain("train", *words, "--json")
    assert done.json["step"] == 6
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], shell: Shell) -> Callable[..., Any]:
    """``isotrain WORDS`` in this process: for what ends before any rank is started."""
    from orchestrator.cli import main
    from tests.end_to_end.shell import Done

    monkeypatch.setenv("ISOTRAIN_CACHE", str(shell.cache))
    monkeypatch.setenv("HF_HUB_CACHE", str(shell.cache / "hub"))
    monkeypatch.chdir(shell.folder)

    def run(*words: str, code: int) -> Done:
        capfd.readouterr()
        ended = main(words)
        out, err = capfd.readouterr()
        assert ended == code, f"code {ended}, not {code}:\n{out}\n{err}"
        return Done(ended, out, err)

    return run
