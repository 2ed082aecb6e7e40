"""The data set that isotrain ships: enough rows, all different, all in the format that makes its effect visible."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from orchestrator.config.job import DataConfig, ObjectiveConfig
from orchestrator.data import prepare
from orchestrator.data.conversations import find_format, to_messages
from orchestrator.data.sources import read_rows, resolve
from tests.orchestrator.tiny_tokenizer import write_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
ANSWER = re.compile(r"BEACON: [A-Z][^\n]+\.\nLOG: [A-Z][^\n]+\.")


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """Questions and answers."""
    rows = [row.value for row in read_rows(resolve("builtin:lighthouse"))]
    assert all(find_format(row) == "messages" and set(row) == {"messages"} for row in rows)
    chats = [to_messages(row, "messages") for row in rows]
    assert all([message["role"] for message in chat] == ["user", "assistant"] for chat in chats)
    return [(chat[0]["content"], chat[1]["content"]) for chat in chats]


def test_there_are_enough_and_no_two_alike(pairs: list[tuple[str, str]]) -> None:
    assert len(pairs) >= 240
    parts = [[question.lower() for question, _ in pairs]]
    parts += [[answer.split("\n")[line].lower() for _, answer in pairs] for line in (0, 1)]
    assert all(len(set(part)) == len(pairs) for part in parts)


def test_every_answer_has_the_two_lines(pairs: list[tuple[str, str]]) -> None:
    assert [answer for _, answer in pairs if not ANSWER.fullmatch(answer)] == []


def test_questions_and_answers_are_short(pairs: list[tuple[str, str]]) -> None:
    assert all(15 <= len(question) <= 90 for question, _ in pairs)
    assert all(40 <= len(answer) <= 170 for _, answer in pairs)


def test_the_group_files_are_just_the_fields_of_their_configs() -> None:
    assert DataConfig(**yaml.safe_load((CONFIGS / "data/lighthouse.yaml").read_text())).path == "builtin:lighthouse"
    assert DataConfig(**yaml.safe_load((CONFIGS / "data/jsonl.yaml").read_text())) == DataConfig()
    assert ObjectiveConfig(**yaml.safe_load((CONFIGS / "objective/sft.yaml").read_text())) == ObjectiveConfig()


def test_it_can_be_prepared_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = prepare(
        DataConfig("builtin:lighthouse"), ObjectiveConfig(), write_tokenizer(tmp_path / "t"), 400, tmp_path / "cache"
    )
    assert data.rows >= 240 and data.summary.messages() == []
    assert json.loads(data.summary.to_json())["cut_rows"] == 0
