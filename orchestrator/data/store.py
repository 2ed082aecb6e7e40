"""Tokenised data on disk: flat arrays that are mapped, not read, and what was counted on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

FORMAT_VERSION = 1
TOKENS, LEARNED, OFFSETS, META = "tokens.npy", "learned.npy", "offsets.npy", "meta.json"
TYPES = {TOKENS: np.dtype(np.int32), LEARNED: np.dtype(np.bool_), OFFSETS: np.dtype(np.int64)}


class BrokenStore(ValueError):
    """A cache entry that is not whole: it is built again."""


@dataclass(frozen=True)
class SkippedRows:
    """How many rows were skipped for one reason, and the first of them."""

    reason: str
    count: int
    first_place: str
    first_message: str


@dataclass(frozen=True)
class DataSummary:
    """What a data set holds. ``cut_rows`` lost tokens beyond ``sequence_tokens``; ``rows`` are those that are left."""

    key: str
    source: str
    source_sha256: str
    rows: int
    tokens: int
    label_tokens: int
    longest_row_tokens: int
    cut_rows: int
    sequence_tokens: int
    pad_token: int
    skipped: tuple[SkippedRows, ...] = ()

    @property
    def skipped_rows(self) -> int:
        """How many rows were skipped, for any reason."""
        return sum(skipped.count for skipped in self.skipped)

    def epochs(self, steps: int, global_sequences: int) -> str:
        """How much there is, and how often a run goes through it.

        Example:
            >>> DataSummary("", "", "", 6, 600, 120, 200, 0, 512, 0).epochs(steps=3, global_sequences=4)
            'data: 6 rows, 600 tokens, of which 120 are learned; 3 steps of 4 rows are 2 epochs'
        """
        epochs = steps * global_sequences / self.rows
        return (
            f"data: {self.rows} rows, {self.tokens} tokens, of which {self.label_tokens} are learned; "
            f"{steps} steps of {global_sequences} rows are {epochs:.3g} epochs"
        )

    def messages(self) -> list[str]:
        """What the user should know, a line each; empty when every row was taken whole."""
        lines = []
        if self.skipped:
            total = self.rows + self.skipped_rows
            lines.append(f"data: skipped {self.skipped_rows} of {total} rows of {self.source}")
            lines += [
                f"  {skipped.reason}: {skipped.count} (first at {skipped.first_place}: {skipped.first_message})"
                for skipped in self.skipped
            ]
        if self.cut_rows:
            lines.append(
                f"data: cut {self.cut_rows} of {self.rows} rows at batch.sequence_tokens={self.sequence_tokens}"
            )
        return lines

    def to_json(self) -> str:
        """As stored in the cache."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> DataSummary:
        """Read :meth:`to_json`'s text. Raises BrokenStore when it is none of this version."""
        try:
            fields = json.loads(text)
            if fields.pop("format_version") != FORMAT_VERSION:
                raise BrokenStore("another format version")
            skipped = tuple(SkippedRows(**entry) for entry in fields.pop("skipped"))
            return cls(**fields, skipped=skipped)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise BrokenStore(f"{META} is not whole ({error})") from None


@dataclass(frozen=True, eq=False)
class TokenisedData:
    """Rows of tokens, one after the other.

    Args:
        tokens: int32 ``[tokens]``.
        learned: bool ``[tokens]``: the tokens that the model must predict.
        offsets: int64 ``[rows + 1]``: row ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``.
    """

    tokens: np.ndarray
    learned: np.ndarray
    offsets: np.ndarray
    summary: DataSummary

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.offsets) - 1

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens in each of the given rows."""
        return np.asarray(self.offsets[rows + 1] - self.offsets[rows])

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and learned mask of one row, each ``[length]``."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[part], self.learned[part]

    @classmethod
    def open(cls, folder: Path, source: str | None = None) -> TokenisedData:
        """Map a folder that :class:`StoreWriter` has written. ``source`` names the file in messages anew.

        Raises:
            BrokenStore: a file is missing or its size is not what the summary says.
        """
        try:
            summary = DataSummary.from_json((folder / META).read_text(encoding="utf-8"))
            arrays = {name: np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in TYPES}
        except (OSError, ValueError) as error:
            raise BrokenStore(f"{folder}: {error}") from None
        _check(folder, arrays, summary)
        summary = replace(summary, source=source) if source else summary
        return cls(arrays[TOKENS], arrays[LEARNED], arrays[OFFSETS], summary)


def _check(folder: Path, arrays: Mapping[str, np.ndarray], summary: DataSummary) -> None:
    shapes = {TOKENS: (summary.tokens,), LEARNED: (summary.tokens,), OFFSETS: (summary.rows + 1,)}
    for name, array in arrays.items():
        if array.shape != shapes[name] or array.dtype != TYPES[name]:
            found = f"{array.dtype}{list(array.shape)}"
            raise BrokenStore(f"{folder / name} is {found}, not {TYPES[name]}{list(shapes[name])}")
    offsets = arrays[OFFSETS]
    if offsets[0] != 0 or offsets[-1] != summary.tokens or bool((np.diff(offsets) <= 0).any()):
        raise BrokenStore(f"{folder / OFFSETS} does not cut {summary.tokens} tokens into rows")


class StoreWriter:
    """Writes rows to flat arrays as they come; nothing is kept in memory but their offsets."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokens = _ArrayWriter(folder / TOKENS, TYPES[TOKENS])
        self._learned = _ArrayWriter(folder / LEARNED, TYPES[LEARNED])
        self._offsets = [0]
        self.longest_row_tokens = 0
        self.label_tokens = 0

    @property
    def rows(self) -> int:
        """Rows so far."""
        return len(self._offsets) - 1

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self._offsets[-1]

    def add(self, tokens: np.ndarray, learned: np.ndarray) -> None:
        """Append one row: int32 and bool, ``[length]``."""
        self._tokens.append(tokens)
        self._learned.append(learned)
        self._offsets.append(self.tokens + len(tokens))
        self.longest_row_tokens = max(self.longest_row_tokens, len(tokens))
        self.label_tokens += int(learned[1:].sum())

    def finish(self, summary: DataSummary) -> None:
        """Write what remains; all files are on the disk when this returns."""
        offsets = _ArrayWriter(self._folder / OFFSETS, TYPES[OFFSETS])
        offsets.append(np.asarray(self._offsets, np.int64))
        for writer in (self._tokens, self._learned, offsets):
            writer.finish()
        with (self._folder / META).open("w", encoding="utf-8") as file:
            file.write(summary.to_json())
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._tokens.close()
        self._learned.close()


class _ArrayWriter:
    """A one-dimensional .npy file that grows. numpy pads its header so that the count can be written in afterwards."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._file = path.open("wb")
        self._dtype, self._count = dtype, 0
        self._write_header()
        self._header_bytes = self._file.tell()

    def _write_header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self._count,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._count += len(values)

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._header_bytes, "the header of a .npy file grew"
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        self._file.close()
