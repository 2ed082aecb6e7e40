"""A row of data that makes the loss no number: the run is rewound and goes on without it, or stops, as the job says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import _save_tiny
from tests.end_to_end.conftest import TinyRun, write_chat
from tests.end_to_end.shell import Folder, Shell
from tests.helpers import runs
from tests.orchestrator.tiny_tokenizer import write_tokenizer

BAD_ROW = 11
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def poisoned(tiny_run_model: TinyRun, tmp_path: Path) -> TinyRun:
    """A model whose embedding of ``~`` is no number, and data with a ``~`` in one row."""
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    folder = tmp_path / "model"
    folder.mkdir()
    write_tokenizer(_save_tiny(runs.config("qwen2", vocab_size=270), folder))
    weights = load_file(folder / "model.safetensors")
    tilde = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("~")
    weights["model.embed_tokens.weight"][tilde] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    data = write_chat(tmp_path / "chat.jsonl")
    lines = data.read_text().splitlines()
    lines[BAD_ROW] = lines[BAD_ROW].replace("what is", "what is ~")
    data.write_text("\n".join(lines) + "\n")
    return replace(tiny_run_model, model=folder, data=data)


def test_a_run_is_rewound_past_a_bad_row_by_itself_and_stops_where_told(
    shell: Shell, poisoned: TinyRun, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    words = poisoned.words(run_dir=run.path, steps=4, checkpoint__every_steps=1)
    stopped = shell.isotrain("train", *words, code=93)
    assert "loss nan, grad_norm nan; nothing of this step was saved" in stopped.err
    (good,) = {len(run.steps)}
    done = shell.isotrain("train", *words, "anomalies.not_finite=rewind", code=64)
    assert "anomalies.not_finite" in done.err  # another run, as it says
    done = shell.isotrain("resume", str(run.path), "anomalies.not_finite=rewind")
    past = 4 * (good + 1)
    said = f"step {good + 1}: loss nan, grad_norm nan; back to step {good}, and on with sample {past + 1}"
    assert f"{said}; starting again from step {good}" in done.err
    assert len(run.losses) == 4 and all(run.losses.values())
    state = json.loads((run.checkpoint(4) / "state.json").read_text())
    assert (state["optimizer_steps"], state["samples_consumed"]) == (4, 20)
    assert json.loads((run.path / "rewinds.json").read_text()) == {str(good): past}


def test_a_run_skips_a_step_without_learning_from_it_and_goes_on(
    shell: Shell, poisoned: TinyRun, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    words = poisoned.words(run_dir=run.path, steps=5, checkpoint__every_steps=1, checkpoint__keep_last=5)
    done = shell.isotrain("train", *words, "anomalies.not_finite=skip")
    (bad,) = [step for step, line in run.metrics.items() if line.get("skipped")]
    assert f"step {bad}: loss nan, grad_norm nan; skipped: nothing is learned from it" in done.err
    before, after, later = (run.checkpoint(step) / ADAPTER for step in (bad - 1, bad, bad + 1))
    assert before.read_bytes() == after.read_bytes() != later.read_bytes()
    assert run.steps[-1] == 5
