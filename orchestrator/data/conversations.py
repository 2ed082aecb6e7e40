"""From one row of a data file to chat messages, or to the reason why not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "thinking")
"""Keys of a message that change what is said: dropping them would train on something else than the file holds."""

Messages = list[dict[str, str]]


class BadRow(ValueError):
    """A row that cannot be trained on. ``kind`` is what such rows are counted under; the text is the whole reason."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def find_format(row: Any) -> str | None:
    """Name the format that a row's columns show, or None.

    Example:
        >>> find_format({"instruction": "Add salt", "output": "Done", "input": ""})
        'alpaca'
        >>> find_format({"text": "no"}) is None
        True
    """
    if not isinstance(row, Mapping):
        return None
    for name, (columns, _) in FORMATS.items():
        if all(row.get(column) is not None for column in columns):
            return name
    return None


def to_messages(row: Any, format_name: str) -> Messages:
    """Read a row of a known format as chat messages that end up with something to learn.

    Raises:
        BadRow: a column is missing or of a wrong type, a role is unknown, a turn is empty, there is no assistant turn,
            or it comes first.
    Example:
        >>> to_messages({"prompt": "Who?", "completion": "Me."}, "prompt/completion")
        [{'role': 'user', 'content': 'Who?'}, {'role': 'assistant', 'content': 'Me.'}]
    """
    if not isinstance(row, Mapping):
        raise BadRow("wrong type", f"the row is {_kind(row)}, not an object with columns")
    columns, read = FORMATS[format_name]
    for column in columns:
        if row.get(column) is None:
            raise BadRow("missing field", f"no {column!r} (rows of this file are read as {format_name})")
    if row.get("tools"):
        raise BadRow("unsupported", "'tools' is not supported")
    messages = _with_system(row, read(row))
    if all(message["role"] != "assistant" for message in messages):
        raise BadRow("no assistant turn", "no assistant turn: there is nothing to learn")
    if messages[0]["role"] == "assistant":
        raise BadRow("no question", "the conversation starts with an assistant turn: it answers nothing")
    return messages


def _with_system(row: Mapping[str, Any], messages: Messages) -> Messages:
    """A ``system`` column beside the turns speaks first, as elsewhere."""
    system = row.get("system")
    if system is None or system == "":
        return messages
    if messages[0]["role"] == "system":
        raise BadRow("two systems", "there is a 'system' column, and the first turn is a system turn too")
    return [{"role": "system", "content": _text(system, "system", may_be_empty=True)}, *messages]


def _from_messages(row: Mapping[str, Any]) -> Messages:
    turns = _listed(row["messages"], "messages")
    return [_message(turn, f"messages[{index}]", "role", "content") for index, turn in enumerate(turns)]


def _from_sharegpt(row: Mapping[str, Any]) -> Messages:
    turns = _listed(row["conversations"], "conversations")
    return [_message(turn, f"conversations[{index}]", "from", "value") for index, turn in enumerate(turns)]


def _from_alpaca(row: Mapping[str, Any]) -> Messages:
    question = _text(row["instruction"], "instruction")
    details = row.get("input")
    if details is not None and not isinstance(details, str):
        raise BadRow("wrong type", f"'input' is {_kind(details)}, not text")
    if details and details.strip():
        question = f"{question}\n\n{_text(details, 'input')}"
    return [*_history(row.get("history")), *_exchange(question, _text(row["output"], "output"))]


def _history(value: Any) -> Messages:
    """Earlier exchanges of an alpaca row: a list of ``[question, answer]``."""
    if value is None or value in ("", []):
        return []
    messages: Messages = []
    for index, pair in enumerate(_listed(value, "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow("wrong type", f"history[{index}] is no pair of a question and an answer")
        messages += _exchange(*(_text(text, f"history[{index}][{side}]") for side, text in enumerate(pair)))
    return messages


def _from_completion(row: Mapping[str, Any]) -> Messages:
    return _exchange(_text(row["prompt"], "prompt"), _text(row["completion"], "completion"))


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Messages]]] = {
    "messages": (("messages",), _from_messages),
    "sharegpt": (("conversations",), _from_sharegpt),
    "alpaca": (("instruction", "output"), _from_alpaca),
    "prompt/completion": (("prompt", "completion"), _from_completion),
}
"""The first whose columns a row has wins."""


def _exchange(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _listed(value: Any, where: str) -> list[Any]:
    """A list of turns, also where a CSV cell holds it as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow("wrong type", f"{where!r} is text, and not JSON of a list of turns") from None
    if not isinstance(value, list):
        raise BadRow("wrong type", f"{where!r} is {_kind(value)}, not a list of turns")
    if not value:
        raise BadRow("empty", f"{where!r} is empty")
    return value


def _message(turn: Any, where: str, role_key: str, content_key: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise BadRow("wrong type", f"{where} is {_kind(turn)}, not an object with {role_key!r} and {content_key!r}")
    for key in UNSUPPORTED:
        if turn.get(key):
            raise BadRow("unsupported", f"{where} has {key!r}, which is not supported")
    if turn.get("weight") not in (None, 1):
        raise BadRow("unsupported", f"{where} has weight {turn['weight']!r}: weights of turns are not supported")
    for key in (role_key, content_key):
        if turn.get(key) is None:
            raise BadRow("missing field", f"{where} has no {key!r}")
    role = turn[role_key]
    if isinstance(role, str):
        role = SHAREGPT_ROLES.get(role, role) if role_key == "from" else role
    if role not in ROLES:
        known = ROLES if role_key == "role" else (*SHAREGPT_ROLES, *ROLES)
        raise BadRow("unknown role", f"{where} has the unknown role {role!r} (known: {', '.join(known)})")
    content = _text(turn[content_key], f"{where}.{content_key}", may_be_empty=role == "system")
    return {"role": role, "content": content}


def _text(value: Any, where: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{where!r} is {_kind(value)}, not text")
    if not may_be_empty and not value.strip():
        raise BadRow("empty", f"{where!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("not UTF-8", f"{where!r} is not valid Unicode text") from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
