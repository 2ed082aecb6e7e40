"""A manifest, a header, a name or a folder that is not as it was written is damage; what a run takes away is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.listing import list_checkpoints
from orchestrator.checkpoint.load import CheckpointReader, find_latest_good, open_checkpoint
from orchestrator.checkpoint.tensor_file import read_header
from orchestrator.checkpoint.verify import verify, verify_newest
from orchestrator.cli import main
from orchestrator.errors import DataError
from tests.orchestrator.test_checkpoint_load import flip, rewrite_manifest, save_step


def test_a_later_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1) / "manifest.json"
    rewrite_manifest(path, format_version=2)
    with pytest.raises(DataError, match="has format_version 2, this isotrain reads up to 1") as error:
        open_checkpoint(tmp_path)
    assert "upgrade" in error.value.hint


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1) / "manifest.json"
    for name in ("../x", "/etc/passwd", "a/../../x", "a\0b"):
        rewrite_manifest(path, files={name: {"bytes": 1, "sha256": ""}})
        with pytest.raises(DataError, match="lies outside of the checkpoint"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"room": None},
        {"files": []},
        {"tensors": {"a": 1}},
        {"tensors": [{"name": "a"}]},
        {"step": "two"},
        {"about": 3},
        {"files": {"state.json": {"bytes": 1}}},
    ],
    ids=str,
)
def test_a_manifest_of_another_shape_is_damage_and_the_one_before_is_taken(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    save_step(tmp_path, 1)
    rewrite_manifest(save_step(tmp_path, 2) / "manifest.json", **changes)
    reader, said = find_latest_good(tmp_path)
    assert reader is not None and reader.step == 1
    assert "step-000002 is not usable" in said[0] and "manifest.json is damaged: it is no manifest" in said[0]
    assert [row.good for row in list_checkpoints(tmp_path)] == [True, False]


def test_a_deep_manifest_and_a_deep_header_are_damage(tmp_path: Path) -> None:
    folder = save_step(tmp_path, 1)
    (folder / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match=r"manifest\.json is damaged: maximum recursion depth"):
        open_checkpoint(tmp_path)
    for text in ("[" * 200_000, '{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}'):
        (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(4))
        with pytest.raises(DataError, match=r"broken safetensors header: (Recursion|Overflow)Error"):
            read_header(tmp_path / "x.safetensors")
    text = '{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}'
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(4))
    with pytest.raises(DataError, match=r"broken safetensors header: a at bytes 0\.\.4"):
        read_header(tmp_path / "x.safetensors")


def test_a_checkpoint_under_another_steps_name_is_not_gone_on_from(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    renamed = save_step(tmp_path, 2).rename(tmp_path / "step-000008")
    (tmp_path / "latest").write_text("step-000008\n")
    with pytest.raises(DataError, match="step-000008 holds step 2") as error:
        open_checkpoint(tmp_path)
    assert error.value.hint == f"mv {renamed} {tmp_path / 'step-000002'}"
    reader, _ = find_latest_good(tmp_path)
    assert reader is not None and reader.step == 1
    assert "holds step 2" in verify(renamed).problems[0]


def test_who_looks_while_a_run_saves_and_prunes_is_told_of_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next save is published, and the last one taken away, at each moment of a look at them in turn."""
    looks: list[Callable[[], Any]] = [
        lambda: open_checkpoint(run, verify=True).step,
        lambda: [find_latest_good(run)[0].step, *find_latest_good(run)[1]],  # type: ignore[union-attr]
        lambda: [verify_newest(run).problems],
        lambda: [row.state for row in list_checkpoints(run) if not row.good],
    ]
    for number, look in enumerate(looks):
        for moment in range(number, 500, 4):
            run = tmp_path / f"{number}-{moment}"
            save_step(run, 1, keep=1)
            left = moment

            def later(real: Callable[..., Any], run: Path = run) -> Callable[..., Any]:
                def call(*args: Any, **options: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left == -1:
                        save_step(run, 2, keep=1)
                    return real(*args, **options)

                return call

            with monkeypatch.context() as patched:
                for name in ("stat", "open", "read_bytes", "read_text", "iterdir"):
                    patched.setattr(Path, name, later(getattr(Path, name)))
                seen = look()
            assert seen in (1, 2, [1], [2], [()], []), (number, moment, seen)
            if left >= 0:
                break
        else:
            raise AssertionError("more moments than were tried")
        assert moment > 5


def test_tensors_that_the_manifest_has_lost_are_found(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1) / "manifest.json"
    rewrite_manifest(path, tensors=json.loads(path.read_text())["tensors"][1:])
    (problem,) = verify(path.parent).problems
    assert "which the manifest does not name" in problem


def test_a_linked_room_is_refused(tmp_path: Path) -> None:
    folder = save_step(tmp_path, 1)
    (folder / "adapter").rename(tmp_path / "elsewhere")
    (folder / "adapter").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="adapter is a link to a folder, which no checkpoint has"):
        open_checkpoint(tmp_path)
    assert not verify(folder).good


def test_verify_lists_every_fault_with_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_step(tmp_path, 1)
    flip(folder / "adapter" / "adapter_model.safetensors", 12)  # in the header
    with pytest.raises(DataError, match=r"adapter_model\.safetensors is damaged: sha256 \w{64}, \w{64} was written"):
        CheckpointReader(folder)
    (folder / "state.json").write_text("{")
    (folder / "adapter" / "more.safetensors").write_bytes(b"")
    assert main(["verify", str(tmp_path), "--json"]) == 65
    (report,) = json.loads(capsys.readouterr().out)["checkpoints"]
    said = "\n".join(report["problems"])
    assert len(report["problems"]) == 3, said
    assert "adapter_model.safetensors is damaged: sha256" in said and "state.json is damaged: 1 bytes" in said
    assert "more.safetensors was not written" in said
