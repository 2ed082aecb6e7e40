"""Every format and file type gives the same conversations; a bad row gives file, line and reason."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.config.job import DataConfig, ObjectiveConfig
from orchestrator.data import TokenisedData, prepare
from orchestrator.data.conversations import BadRow, find_format, to_messages
from orchestrator.data.sources import read_rows, resolve
from orchestrator.errors import ConfigError, DataError
from tests.orchestrator.tiny_tokenizer import CHATML, load, write_tokenizer

QUESTION, ANSWER = "Is it,\n“safe”?", 'Yes, "quite".'
MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
SHAPES: dict[str, dict[str, Any]] = {
    "messages": {"messages": MESSAGES},
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "prompt/completion": {"prompt": QUESTION, "completion": ANSWER},
}
GOOD = {"prompt": "hello", "completion": "in"}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("chatml"))


def write(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows as a file of that type."""
    file = folder / f"data{suffix}"
    if suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif suffix == ".json":
        file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()})
        file.write_text(text.getvalue(), encoding="utf-8", newline="")
    return file


def run(file: Path, tokenizer_folder: Path, cache: Path, on_bad_row: str = "error", tokens: int = 200) -> TokenisedData:
    return prepare(DataConfig(str(file), on_bad_row), ObjectiveConfig(), tokenizer_folder, tokens, cache)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_every_file_type_and_format_gives_the_same_conversation(tmp_path: Path, shape: str, suffix: str) -> None:
    rows = [row.value for row in read_rows(write(tmp_path, suffix, [SHAPES[shape]] * 2))]
    assert [find_format(row) for row in rows] == [shape] * 2
    assert [to_messages(row, shape) for row in rows] == [MESSAGES] * 2


def test_alpaca_input_follows_the_instruction_after_a_blank_line() -> None:
    row = {"instruction": "Sum up", "input": "a text", "output": "short"}
    assert to_messages(row, "alpaca")[0]["content"] == "Sum up\n\na text"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path, suffix, [GOOD])
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [row.value for row in read_rows(file)] == [GOOD]


def test_places_are_physical_lines(tmp_path: Path) -> None:
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("\n" + json.dumps(GOOD) + "\n \n" + json.dumps(GOOD))
    assert [row.place for row in read_rows(jsonl)] == ["line 2", "line 4"]
    table = tmp_path / "a.csv"
    table.write_text('prompt,completion\n"a\nb",c\n\nd,"e\nf\ng"\nh,i\n')
    assert [row.place for row in read_rows(table)] == ["line 2", "line 5", "line 8"]


def test_long_csv_cells_are_read_and_the_reader_is_left_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    file = write(tmp_path, ".csv", [{"prompt": "x" * 200_000, "completion": "y"}])
    assert [len(row.value["prompt"]) for row in read_rows(file)] == [200_000]
    assert csv.field_size_limit() == before


def turn(**changes: Any) -> dict[str, Any]:
    return {"messages": [MESSAGES[0], {**MESSAGES[1], **changes}]}


BAD: list[tuple[Any, str, str]] = [
    (7, "wrong type", "the row is a number, not an object with columns"),
    ({"prompt": "x"}, "missing field", "no 'messages' (rows of this file are read as messages)"),
    ({"messages": None}, "missing field", "no 'messages'"),
    ({"messages": "hello"}, "wrong type", "'messages' is text, and not JSON of a list of turns"),
    ({"messages": {"role": "user"}}, "wrong type", "'messages' is an object, not a list of turns"),
    ({"messages": []}, "empty", "'messages' is empty"),
    ({"messages": ["hello"]}, "wrong type", "messages[0] is text, not an object with 'role' and 'content'"),
    ({"messages": [{"role": "user"}]}, "missing field", "messages[0] has no 'content'"),
    (turn(role=None), "missing field", "messages[1] has no 'role'"),
    (turn(role="bot"), "unknown role", "messages[1] has the unknown role 'bot' (known: system, user, assistant, tool)"),
    (turn(role=3), "unknown role", "messages[1] has the unknown role 3"),
    (turn(content=3), "wrong type", "'messages[1].content' is a number, not text"),
    (turn(content=" \n"), "empty", "'messages[1].content' is empty"),
    (turn(content="\ud800"), "not UTF-8", "'messages[1].content' is not valid Unicode text"),
    (turn(tool_calls=[{}]), "unsupported", "messages[1] has 'tool_calls', which is not supported"),
    (turn(weight=0), "unsupported", "messages[1] has weight 0: weights of turns are not supported"),
    ({**turn(), "tools": [{}]}, "unsupported", "'tools' is not supported"),
    ({"messages": MESSAGES[:1]}, "no assistant turn", "no assistant turn: there is nothing to learn"),
    ({"messages": MESSAGES[1:]}, "no question", "the conversation starts with an assistant turn"),
]


@pytest.mark.parametrize(("row", "kind", "reason"), BAD)
def test_a_bad_row_says_what_is_wrong(row: Any, kind: str, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        to_messages(row, "messages")
    assert reason in str(caught.value) and caught.value.kind == kind


def test_bad_alpaca_and_sharegpt_rows_say_what_is_wrong() -> None:
    with pytest.raises(BadRow, match="'input' is a number, not text"):
        to_messages({"instruction": "a", "input": 3, "output": "b"}, "alpaca")
    with pytest.raises(BadRow, match=r"conversations\[0\] has the unknown role 'robot' \(known: human, gpt, system"):
        to_messages({"conversations": [{"from": "robot", "value": "x"}]}, "sharegpt")


def test_an_empty_system_turn_and_a_weight_of_one_are_fine() -> None:
    messages = [{"role": "system", "content": ""}, {**MESSAGES[0], "weight": 1}, MESSAGES[1]]
    assert to_messages({"messages": messages}, "messages")[1:] == MESSAGES


JSONL_FAULTS = [
    (b"{nope", r"line 2: not JSON \(Expecting property name"),
    (b'{"prompt": "\xff", "completion": "x"}', r"line 2: not UTF-8 text \(byte 13\)"),
    (b"[" * 100_000, r"line 2: not JSON that can be read \(nested too deeply\)"),
    (b'{"prompt": "x"}', "line 2: no 'completion'"),
    (b'{"prompt": "x", "completion": ""}', "line 2: 'completion' is empty"),
    (b"[1]", "line 2: the row is a list, not an object"),
]


@pytest.mark.parametrize(("line", "message"), JSONL_FAULTS)
def test_a_bad_line_of_jsonl_is_named(tmp_path: Path, tokenizer_folder: Path, line: bytes, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n" + json.dumps(GOOD).encode())
    with pytest.raises(DataError, match=message) as caught:
        run(file, tokenizer_folder, tmp_path / "cache")
    assert str(file) in str(caught.value) and "data.on_bad_row=skip" in caught.value.hint
    data = run(file, tokenizer_folder, tmp_path / "cache", on_bad_row="skip")
    assert (data.rows, data.summary.skipped_rows) == (2, 1)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (b"a\n", "line 3: 1 cells, but the header has 2"),
        (b'"a"b,c\n', "line 3: not CSV"),
        (b"\xff,b\n", "line 3: 'prompt' is not valid Unicode text"),
        (b"a,\n", "line 3: 'completion' is empty"),
    ],
)
def test_a_bad_record_of_csv_is_named(tmp_path: Path, tokenizer_folder: Path, cells: bytes, message: str) -> None:
    file = tmp_path / "data.csv"
    file.write_bytes(b"prompt,completion\nhello,in\n" + cells + b"hello,in\n")
    with pytest.raises(DataError, match=message):
        run(file, tokenizer_folder, tmp_path / "cache")
    assert run(file, tokenizer_folder, tmp_path / "cache", on_bad_row="skip").rows == 2


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_a_bad_row_without_a_line_is_named_by_its_number(tmp_path: Path, tokenizer_folder: Path, suffix: str) -> None:
    file = write(tmp_path, suffix, [GOOD, {"prompt": "x", "completion": None}])
    with pytest.raises(DataError, match="row 2: no 'completion'"):
        run(file, tokenizer_folder, tmp_path / "cache")


def test_skipped_rows_are_counted_by_reason_and_said(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = tmp_path / "data.jsonl"
    lines = ["{", json.dumps(GOOD), '{"prompt": "x"}', "{", json.dumps(GOOD)]
    file.write_text("\n".join(lines))
    data = run(file, tokenizer_folder, tmp_path / "cache", on_bad_row="skip")
    assert {row.reason: (row.count, row.first_place) for row in data.summary.skipped} == {
        "not JSON": (2, "line 1"),
        "missing field": (1, "line 3"),
    }
    message = "\n".join(data.summary.messages())
    assert f"skipped 3 of 5 rows of {file}" in message and "not JSON: 2 (first at line 1" in message
    again = run(file, tokenizer_folder, tmp_path / "cache", on_bad_row="skip")
    assert again.summary == data.summary


def test_rows_are_cut_at_the_longest_row_and_counted(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = write(tmp_path, ".jsonl", [GOOD, {"prompt": "x", "completion": "y" * 500}])
    data = run(file, tokenizer_folder, tmp_path / "cache", tokens=100)
    assert data.summary.longest_row_tokens == len(data.row(1)[0]) == 100
    assert data.summary.messages() == ["data: cut 1 of 2 rows at batch.sequence_tokens=100"]


def test_a_row_with_nothing_to_learn_after_the_cut_is_bad(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = write(tmp_path, ".jsonl", [GOOD, {"prompt": "x" * 200, "completion": "y"}])
    with pytest.raises(DataError, match=r"line 2: no token to learn is left of \d+ after the cut at batch.sequence_"):
        run(file, tokenizer_folder, tmp_path / "cache", tokens=100)
    data = run(file, tokenizer_folder, tmp_path / "cache", "skip", tokens=100)
    assert [row.reason for row in data.summary.skipped] == ["nothing to learn after the cut"]


def test_a_template_that_leaves_nothing_to_learn_makes_bad_rows(tmp_path: Path) -> None:
    empty_mark = "{% for message in messages %}{{ message['content'] }}{% endfor %}{% generation %}{% endgeneration %}"
    folder = write_tokenizer(tmp_path / "tokenizer", empty_mark)
    with pytest.raises(DataError, match="line 1: the chat template leaves no token to learn"):
        run(write(tmp_path, ".jsonl", [GOOD]), folder, tmp_path / "cache")


def test_an_ambiguous_template_ends_the_run_even_when_rows_may_be_skipped(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", CHATML.split("{% if add_generation_prompt")[0])
    with pytest.raises(ConfigError, match=r"data.jsonl, line 1: the chat template in .* is ambiguous") as caught:
        run(write(tmp_path, ".jsonl", [GOOD]), folder, tmp_path / "cache", "skip")
    assert "objective.train_on=all" in caught.value.hint


def test_a_row_that_the_template_refuses_is_bad(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", "{{ raise_exception('no such roles') }}")
    with pytest.raises(DataError, match="line 1: the chat template refuses it: no such roles"):
        run(write(tmp_path, ".jsonl", [GOOD]), folder, tmp_path / "cache")


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_columns_that_mean_nothing_are_refused(tmp_path: Path, tokenizer_folder: Path, on_bad_row: str) -> None:
    file = write(tmp_path, ".csv", [{"text": "hello"}])
    with pytest.raises(DataError, match=r"unknown columns: 1, first at line 2|columns text: none of the formats"):
        run(file, tokenizer_folder, tmp_path / "cache", on_bad_row)


def test_a_first_row_that_is_no_object_is_bad(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("[1]\n" + json.dumps(GOOD))
    with pytest.raises(DataError, match="line 1: the row is a list, not an object with columns"):
        run(file, tokenizer_folder, tmp_path / "cache")


@pytest.mark.parametrize("content", [b"", b"\n\n"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_file_without_rows_is_refused(tmp_path: Path, tokenizer_folder: Path, suffix: str, content: bytes) -> None:
    file = tmp_path / f"data{suffix}"
    file.write_bytes(content)
    with pytest.raises(DataError, match="holds no rows"):
        run(file, tokenizer_folder, tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("a.json", b'{"a": 1}\n{"a": 2}', r"a.json, line 2: not JSON \(Extra data", "a.jsonl"),
        ("a.json", b'{"a": 1}', "a .json file must hold a list of rows", "a.jsonl"),
        ("a.json", b"\xff", "not UTF-8 text", "UTF-8"),
        ("a.json", b"[" * 100_000, "nested too deeply", ""),
        ("a.csv", b'"a"b\n', "a.csv, line 1: not CSV", "RFC 4180"),
        ("a.parquet", b"PAR1 and no more", r"a.parquet: not Parquet, or damaged, after row 0", "again"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str, hint: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(file))
    assert hint in caught.value.hint


def test_a_path_that_cannot_work_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("")
    faults = [
        (None, "data.path is not set", "data.path=FILE"),
        (str(tmp_path), "is a folder, not a file", ".parquet"),
        (str(tmp_path / "trian.jsonl"), "there is no such file", f"data.path={tmp_path / 'train.jsonl'}"),
        (str(tmp_path / "no" / "zzz.jsonl"), "there is no such file", "data=lighthouse"),
        (str(tmp_path / "notes.txt"), "unknown file type '.txt'", ".jsonl, .json, .csv, .parquet"),
        ("builtin:lighthose", "is not a built-in data set", "data.path=builtin:lighthouse"),
    ]
    for path, message, hint in faults:
        with pytest.raises(ConfigError, match=message) as caught:
            resolve(path)
        assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("data", "objective", "tokens", "message"),
    [
        ({"on_bad_row": "drop"}, {}, 8, "data.on_bad_row=drop is unknown"),
        ({}, {"name": "dpo"}, 8, "objective.name=dpo is unknown"),
        ({}, {"train_on": "user"}, 8, "objective.train_on=user is unknown"),
        ({}, {}, 1, "batch.sequence_tokens=1 leaves nothing to predict"),
    ],
)
def test_unknown_settings_are_refused(
    tmp_path: Path, data: dict[str, str], objective: dict[str, str], tokens: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(DataConfig("builtin:lighthouse", **data), ObjectiveConfig(**objective), tmp_path, tokens, tmp_path)


def test_alpaca_rows_reach_the_tokens(tmp_path: Path, tokenizer_folder: Path) -> None:
    data = run(write(tmp_path, ".parquet", [SHAPES["alpaca"]]), tokenizer_folder, tmp_path / "cache")
    tokens, learned = data.row(0)
    tokenizer = load(tokenizer_folder)
    assert tokenizer.decode(tokens[learned]) == ANSWER + "<|im_end|>"
    assert tokenizer.decode(tokens).startswith(f"<|im_start|>user\n{QUESTION}<|im_end|>")


def test_system_and_history_columns_are_not_lost() -> None:
    row = {"instruction": "q", "output": "a", "history": [["old q", "old a"]], "system": "be brief"}
    turns = [(message["role"], message["content"]) for message in to_messages(row, "alpaca")]
    earlier = [("system", "be brief"), ("user", "old q"), ("assistant", "old a")]
    assert turns == [*earlier, ("user", "q"), ("assistant", "a")]
    given = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "be brief"}
    assert to_messages(given, "sharegpt")[0] == {"role": "system", "content": "be brief"}
    assert to_messages({"prompt": "q", "completion": "a", "system": ""}, "prompt/completion")[0]["role"] == "user"
    twice = {"messages": [{"role": "system", "content": "x"}, *to_messages(row, "alpaca")[1:]], "system": "y"}
    with pytest.raises(BadRow, match="a 'system' column, and the first turn is a system turn too"):
        to_messages(twice, "messages")
    with pytest.raises(BadRow, match=r"history\[0\] is no pair"):
        to_messages(row | {"history": ["q"]}, "alpaca")
