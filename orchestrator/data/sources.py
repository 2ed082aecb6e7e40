"""Data files: where they are, and their rows with the place of each."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config.paths import BUILTIN
from orchestrator.data.conversations import BadRow
from orchestrator.errors import ConfigError, DataError

BUILTIN_FOLDER = Path(__file__).resolve().parent.parent / "datasets"
PARQUET_ROWS = 1024


@dataclass(frozen=True)
class SourceRow:
    """``place``: as ``line 7`` or ``row 7`` (from 1). ``value``: what the row holds, or why it could not be read."""

    place: str
    value: Any


def resolve(path: str | None) -> Path:
    """Find the file that ``data.path`` names: a path, or ``builtin:NAME`` for data that isotrain ships.

    Raises:
        ConfigError: not set, no such file, a folder, an unknown built-in or an unknown file type.
    Example:
        >>> resolve("builtin:lighthouse").name
        'lighthouse.jsonl'
    """
    if not path:
        raise ConfigError("data.path is not set", "data.path=FILE.jsonl, or data=lighthouse for the built-in example")
    if path.startswith(BUILTIN):
        return _resolve_builtin(path.removeprefix(BUILTIN))
    file = Path(path).expanduser()
    if file.is_dir():
        raise ConfigError(f"data.path={path} is a folder, not a file", "name one file: " + ", ".join(READERS))
    if not file.exists():
        near = difflib.get_close_matches(file.name, _siblings(file), n=1)
        hint = f"data.path={file.parent / near[0]}" if near else "data=lighthouse  (the example that is always there)"
        raise ConfigError(f"data.path={path}: there is no such file", hint)
    if file.suffix.lower() not in READERS:
        known = ", ".join(READERS)
        raise ConfigError(f"data.path={path} has the unknown file type {file.suffix!r}", f"known file types: {known}")
    return file


def _resolve_builtin(name: str) -> Path:
    file = BUILTIN_FOLDER / f"{name}.jsonl"
    names = sorted(known.stem for known in BUILTIN_FOLDER.glob("*.jsonl"))
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1) or names[:1]
        known = ", ".join(BUILTIN + known for known in names)
        raise ConfigError(
            f"data.path={BUILTIN}{name} is not a built-in data set (there are: {known})",
            f"data.path={BUILTIN}{near[0]}" if near else "",
        )
    return file


def _siblings(file: Path) -> list[str]:
    return [sibling.name for sibling in file.parent.iterdir()] if file.parent.is_dir() else []


def read_rows(file: Path) -> Iterator[SourceRow]:
    """Read a file's rows in order. A row that cannot be parsed comes with a BadRow as its value.

    Lines that hold nothing but white space are no rows.

    Raises:
        DataError: the file as a whole is not what its suffix says.
    """
    return READERS[file.suffix.lower()](file)


def _read_jsonl(file: Path) -> Iterator[SourceRow]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if content.strip():
                yield SourceRow(f"line {number}", _parse_line(content))


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"not UTF-8 text (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        return BadRow("not JSON", f"not JSON ({error.msg}, column {error.colno})")
    except RecursionError:
        return BadRow("not JSON", "not JSON that can be read (nested too deeply)")


def _read_json(file: Path) -> Iterator[SourceRow]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start + 1})", "save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        hint = f"one object a line? then name it {file.stem}.jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{file}, line {error.lineno}: not JSON ({error.msg}, column {error.colno})", hint) from None
    except RecursionError:
        raise DataError(f"{file}: not JSON that can be read (nested too deeply)") from None
    if not isinstance(rows, list):
        raise DataError(f"{file}: a .json file must hold a list of rows", f"one object a line is {file.stem}.jsonl")
    for number, row in enumerate(rows, start=1):
        yield SourceRow(f"row {number}", row)


def _read_csv(file: Path) -> Iterator[SourceRow]:
    usual_limit = csv.field_size_limit(2**31 - 1)
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            yield from _csv_rows(file, csv.reader(lines, strict=True))
    finally:
        csv.field_size_limit(usual_limit)


def _csv_rows(file: Path, reader: Any) -> Iterator[SourceRow]:
    """Rows as objects by the header's names; a row's line is where it starts (a quoted cell may hold line ends)."""
    header: list[str] | None = None
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise DataError(f"{file}, {place}: not CSV ({error})", "quote cells as in RFC 4180") from None
            yield SourceRow(place, BadRow("not CSV", f"not CSV ({error})"))
            continue
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
        elif len(cells) != len(header):
            yield SourceRow(place, BadRow("not CSV", f"{len(cells)} cells, but the header has {len(header)}"))
        else:
            yield SourceRow(place, dict(zip(header, cells, strict=True)))


def _read_parquet(file: Path) -> Iterator[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield SourceRow(f"row {number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file}: not Parquet, or damaged, after row {number} ({reason})", "write it again") from None


READERS: dict[str, Callable[[Path], Iterator[SourceRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
