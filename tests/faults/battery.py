"""The battery of faults: what can go wrong, and the tests that hold it. battery.yaml is the list."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("battery.yaml")
CASES = 55


@dataclass(frozen=True)
class Case:
    """One fault. ``tests``: node ids from the root of the checkout, without parameters.

    ``limit``: what is not done on purpose, and why; ``open``: what no test holds yet. Both may be empty.
    """

    number: int
    title: str
    tests: tuple[str, ...] = ()
    limit: str = ""
    open: str = ""

    def __post_init__(self) -> None:
        if not (self.tests or self.limit or self.open):
            raise ValueError(f"case {self.number} has no test, and neither 'limit' nor 'open' says why")


def read_battery(file: Path = LIST) -> tuple[Case, ...]:
    """All cases, in the order of the file.

    Raises:
        ValueError: a case says nothing, or has a key that is not known.
    """
    return tuple(_case(value) for value in yaml.safe_load(file.read_text(encoding="utf-8")))


def _case(value: dict[str, object]) -> Case:
    if unknown := value.keys() - {"case", "title", "tests", "limit", "open"}:
        raise ValueError(f"case {value.get('case')} has keys that are not known: {sorted(unknown)}")
    tests = value.get("tests", [])
    assert isinstance(tests, list)
    limit, still_open = (str(value.get(name, "")).strip() for name in ("limit", "open"))
    return Case(int(str(value["case"])), str(value["title"]), tuple(f"tests/{one}" for one in tests), limit, still_open)
