"""A copy is proven at the far end, published last, goes on where it stopped, and lives with places that fail."""

from __future__ import annotations

import errno
import itertools
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from orchestrator.checkpoint.load import CheckpointReader
from orchestrator.checkpoint.publish import Contents
from orchestrator.checkpoint.save import save
from orchestrator.checkpoint.verify import compare
from orchestrator.cli import main
from orchestrator.errors import ConfigError, DataError, ResourceError
from orchestrator.storage import Place, Retry, Sent, copy_checkpoint
from parallel.shards import Box, Shard

SLEPT: list[float] = []
RETRY = Retry(attempts=4, first_wait_s=1.0, sleep=SLEPT.append)


class Flaky(MemoryFileSystem):
    """Memory behind a bad line: which operations fail, and how, is set by each test."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012  as its parent has it
    pseudo_dirs = [""]  # noqa: RUF012
    failures: Iterator[Exception | None] = itertools.repeat(None)
    spoil = 0
    written: list[str] = []  # noqa: RUF012

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if (error := next(Flaky.failures)) is not None:
            raise error
        if mode == "wb":
            Flaky.written.append(path.rpartition("/")[2])
            if Flaky.spoil:
                Flaky.spoil -= 1
                return _Spoiled(super()._open(path, mode, **kwargs))
        return super()._open(path, mode, **kwargs)


class _Spoiled:
    """Flips a bit of what is written."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> int:
        return self._file.write(bytes([data[0] ^ 1]) + data[1:])


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    SLEPT.clear()
    Flaky.failures, Flaky.spoil = itertools.repeat(None), 0
    for system in (Flaky, MemoryFileSystem):
        system.store.clear()
        system.pseudo_dirs[:] = [""]
    Flaky.written.clear()
    yield


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of a few files."""
    shards = [Shard(f"w{n}", kind, (3,), Box((0,), (3,)), torch.full((3,), float(n))) for n in range(2) for kind in ("weight", "exp_avg")]  # fmt: skip # noqa: E501
    return save(tmp_path / "run/checkpoints", 5, shards, Contents("adapter", {"step": 5}, {"adapter_config.json": b"{}"}))  # fmt: skip # noqa: E501


@pytest.mark.parametrize("far", ["memory://bucket/a/step-000005", "file://{tmp}/far/step-000005", "{tmp}/far/x"])
def test_a_checkpoint_goes_out_and_comes_back(checkpoint: Path, tmp_path: Path, far: str, capsys: Any) -> None:
    url, back = far.format(tmp=tmp_path), tmp_path / "back/checkpoints/step-000005"
    assert main(["copy", str(checkpoint), url, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["files"] == len(list(checkpoint.rglob("*.*"))) and said["kept"] == 0 and said["bytes"] > 500
    assert main(["copy", url, str(back)]) == 0
    assert "read back and proven" in capsys.readouterr().err
    assert compare(checkpoint, back).equal and not CheckpointReader(back, verify=True).warnings
    assert copy_checkpoint(str(checkpoint), url) == Sent(0, 0, said["files"])


def test_the_manifest_goes_last_and_a_copy_goes_on(checkpoint: Path) -> None:
    errors = [None] * 4 + [FileNotFoundError("gone")]  # in the middle of the copy
    Flaky.failures = itertools.chain(errors, itertools.repeat(None))
    with pytest.raises(DataError, match=r"flaky://b/x cannot \w+ \S+: gone"):
        copy_checkpoint(str(checkpoint), "flaky://b/x", RETRY)
    before = list(Flaky.written)
    assert before and "manifest.json" not in before
    with pytest.raises(ConfigError, match=r"flaky://b/x has no manifest\.json: it is no checkpoint, or"):
        copy_checkpoint("flaky://b/x", str(checkpoint.parent / "back"))
    sent = copy_checkpoint(str(checkpoint), "flaky://b/x", RETRY)
    assert sent.kept == len(before) - 1 or sent.kept == len(before)
    assert Flaky.written[-1] == "manifest.json" and not SLEPT


def test_what_fails_in_passing_is_tried_again_after_a_while(checkpoint: Path) -> None:
    Flaky.failures = itertools.cycle([TimeoutError("slow"), ConnectionResetError("cut"), None])
    copy_checkpoint(str(checkpoint), "flaky://b/x", RETRY)
    assert SLEPT[:4] == [1.0, 2.0, 1.0, 2.0]
    Flaky.failures = itertools.repeat(None)
    Place("flaky://b/x").remove("state.json")
    Flaky.failures = itertools.repeat(OSError("down"))
    SLEPT.clear()
    with pytest.raises(ResourceError, match=r"flaky://b/x cannot .* after 4 attempts: down") as error:
        copy_checkpoint(str(checkpoint), "flaky://b/x", RETRY)
    assert SLEPT == [1.0, 2.0, 4.0] and error.value.hint == "run it again: it goes on where it stopped"


def test_errors_of_clients_are_tried_again_too(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class HttpError(Exception):
        """As gcsfs has it: no OSError."""

    client = types.ModuleType("gcsfs.retry")
    client.HttpError = HttpError  # type: ignore[attr-defined]
    Flaky.failures = itertools.cycle([HttpError("503"), None])
    with pytest.raises(HttpError):
        copy_checkpoint(str(checkpoint), "flaky://b/x", RETRY)  # of nobody that is known
    monkeypatch.setitem(sys.modules, "gcsfs.retry", client)
    copy_checkpoint(str(checkpoint), "flaky://b/x", RETRY)
    assert set(SLEPT) == {1.0}


def test_what_cannot_pass_is_not_tried_again(checkpoint: Path) -> None:
    Flaky.failures = itertools.repeat(PermissionError("denied"))
    with pytest.raises(ConfigError, match=r"flaky://b/x cannot take \S+: denied"):
        copy_checkpoint(str(checkpoint), "flaky://b/x", RETRY)
    Flaky.failures = itertools.repeat(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ResourceError, match=r"flaky://b/x cannot take \S+: No space left on device") as error:
        copy_checkpoint(str(checkpoint), "flaky://b/x", RETRY)
    assert error.value.hint.startswith("free some space there or name another place")
    assert not SLEPT


def test_a_bit_that_flips_on_the_way_is_found_and_sent_again(checkpoint: Path) -> None:
    Flaky.spoil = 2
    copy_checkpoint(str(checkpoint), "flaky://b/x", RETRY)
    assert Flaky.written[0] == Flaky.written[1] == Flaky.written[2] != Flaky.written[3]
    Flaky.spoil = 100
    with pytest.raises(DataError, match=r"has sha256 \w+, \w+ was written, 4 times over"):
        copy_checkpoint(str(checkpoint), "flaky://b/y", RETRY)
    assert "manifest.json" not in Place("flaky://b/y").files()


def test_damage_at_either_end_is_found(checkpoint: Path, tmp_path: Path) -> None:
    copy_checkpoint(str(checkpoint), "memory://b/x")
    system = fsspec.filesystem("memory")
    name = "/b/x/state.json"
    system.pipe_file(name, b"?" + system.cat_file(name)[1:])
    with pytest.raises(DataError, match=r"memory://b/x/state\.json is damaged: \d+ bytes with sha256"):
        copy_checkpoint("memory://b/x", str(tmp_path / "back"))
    assert not (tmp_path / "back/manifest.json").exists()
    assert copy_checkpoint(str(checkpoint), "memory://b/x").files == 1  # mended
    assert copy_checkpoint("memory://b/x", str(tmp_path / "back")).kept >= 1
    assert compare(checkpoint, tmp_path / "back").equal


def test_a_run_is_refused_with_its_newest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").write_text("step-000007\n")
    with pytest.raises(ConfigError, match="is a run; one checkpoint is copied") as refused:
        copy_checkpoint(str(tmp_path), "memory://b/run")
    assert refused.value.hint == f"isotrain copy {tmp_path}/checkpoints/step-000007 memory://b/run"


def test_what_is_not_ours_is_never_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    system.pipe_file("/b/x/thesis.tex", b"mine")
    with pytest.raises(ConfigError, match=r"memory://b/x is not empty: thesis\.tex did not come from here"):
        copy_checkpoint(str(checkpoint), "memory://b/x")
    system.pipe_file("/b/y/manifest.json", b"{}")
    with pytest.raises(ConfigError, match="memory://b/y holds another checkpoint"):
        copy_checkpoint(str(checkpoint), "memory://b/y")
    with pytest.raises(ConfigError, match="it is no checkpoint, or a copy that did not end"):
        copy_checkpoint(str(tmp_path / "nothing"), "memory://b/z")


def test_urls_that_cannot_be_opened_are_said(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"s3://b/x needs a package: .*s3fs") as error:
        copy_checkpoint(str(checkpoint), "s3://b/x")
    assert error.value.hint == "pip install s3fs"
    with pytest.raises(ConfigError, match=r"ipfs9://b cannot be opened: Protocol not known"):
        copy_checkpoint(str(checkpoint), "ipfs9://b")


def test_an_export_goes_to_a_url(checkpoint: Path, tiny_model: Any, capsys: Any) -> None:
    for _ in range(2):  # an export of the same kind replaces it
        assert main(["export", str(checkpoint), "--to", "peft", "memory://b/adapter", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["out"] == "memory://b/adapter"
    found = Place("memory://b/adapter").files()
    assert set(found) == {"adapter_config.json", "adapter_model.safetensors", "isotrain.json"}
    written = checkpoint / "adapter/adapter_model.safetensors"
    assert Place("memory://b/adapter").read("adapter_model.safetensors") == written.read_bytes()
    model = str(tiny_model("llama"))
    assert main(["export", model, "--to", "torch_dist", "memory://b/megatron"]) == 0
    far = Place("memory://b/megatron").files()
    assert {"isotrain.json", "release/.metadata", "release/common.pt", "release/__0_0.distcp"} < set(far)
    fsspec.filesystem("memory").pipe_file("/b/adapter/other.safetensors", b"mine")
    assert main(["export", str(checkpoint), "--to", "peft", "memory://b/adapter"]) == 64
    assert "memory://b/adapter is not empty: other.safetensors" in capsys.readouterr().err
