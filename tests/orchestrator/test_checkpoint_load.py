"""A crash at any moment of a save leaves a whole checkpoint; damage is named, and the newest good one found."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from orchestrator.checkpoint.folder import list_steps, read_latest
from orchestrator.checkpoint.listing import list_checkpoints
from orchestrator.checkpoint.load import CheckpointReader, find_latest_good, open_checkpoint
from orchestrator.checkpoint.publish import Contents
from orchestrator.checkpoint.retention import Retention
from orchestrator.checkpoint.save import SavePolicy, save
from orchestrator.checkpoint.verify import compare, verify
from orchestrator.errors import ConfigError, DataError
from parallel.shards import Box, Shard

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint-v1"


def some_shards(value: float) -> list[Shard]:
    """Two LoRA matrices with their moments, filled with numbers that begin at ``value``."""
    shards = []
    for part, shape in (("lora_A", (2, 6)), ("lora_B", (4, 2))):
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            data = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape) + value
            shards.append(Shard(f"q_proj.{part}.weight", kind, shape, Box.whole(shape), data))
    return shards


def save_step(folder: Path, step: int, value: float | None = None, keep: int = 0) -> Path:
    contents = Contents("adapter", {"step": step}, {"adapter_config.json": b'{"r": 2}'})
    value = step if value is None else value
    return save(folder, step, some_shards(value), contents, policy=SavePolicy(Retention(keep), file_bytes=100))


def first_value(reader: CheckpointReader) -> float:
    return reader.read("q_proj.lora_A.weight", "weight", Box((0, 0), (1, 1))).item()


def die_at(moment: int) -> None:
    """Make the process end without any clean-up at its n-th fsync or rename (before it is done)."""
    left = moment

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1
            return real(*args, **options)

        return call

    os.fsync, os.rename, os.replace = counted(os.fsync), counted(os.rename), counted(os.replace)


def save_and_die(folder: Path, step: int, value: float, moment: int) -> bool:
    """Save in a child that dies at ``moment``; whether it died (False: the save was over before)."""
    child = os.fork()
    if child == 0:
        try:
            die_at(moment)
            save_step(folder, step, value, keep=2)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("step", [3, 2], ids=["next step", "same step again"])
def test_a_crash_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path, step: int) -> None:
    outcomes = []
    for moment in range(100):
        folder = tmp_path / str(moment)
        save_step(folder, 1)
        save_step(folder, 2)
        died = save_and_die(folder, step, 30.0, moment)
        reader, _ = find_latest_good(folder)
        assert reader is not None and reader.step in (2, step)
        value = first_value(reader)
        assert value in (2.0, 30.0) and (value == 30.0 or died)
        assert first_value(open_checkpoint(folder, verify=True)) == value
        outcomes.append(value)
        save_step(folder, step, 40.0)
        assert first_value(open_checkpoint(folder, verify=True)) == 40.0
        assert {path.name for path in folder.iterdir()} <= {"latest", *(f"step-00000{n}" for n in (1, 2, 3))}
        if not died:
            break
    assert not died and len(outcomes) > 12
    assert outcomes == sorted(outcomes) and outcomes[0] == 2.0


def test_old_ones_go_only_beyond_keep_and_before_this_step(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9):
        save_step(tmp_path, step)
    save_step(tmp_path, 4, keep=2)
    assert [step for step, _ in list_steps(tmp_path)] == [3, 4, 9]
    assert read_latest(tmp_path) == "step-000004"
    save_step(tmp_path, 5, keep=1)
    assert [step for step, _ in list_steps(tmp_path)] == [5, 9]


def flip(path: Path, at: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


FILES = [
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "optimizer/part-00001-of-00002.safetensors",
    "state.json",
]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damage_is_named_and_the_newest_good_one_is_found(tmp_path: Path, file: str, damage: str) -> None:
    save_step(tmp_path, 1)
    path = save_step(tmp_path, 2) / file
    size = path.stat().st_size
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: size // 2])
        messages = [f"{path} is damaged: {size // 2} bytes, {size} were written"]
    elif damage == "flipped":
        flip(path)
        messages = [f"{path} is damaged: sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}", digest]
    else:
        path.unlink()
        messages = [f"{path} is missing: {size} bytes were written"]
    with pytest.raises(DataError) as error:
        open_checkpoint(tmp_path, verify=True)
    assert all(message in str(error.value) for message in messages)
    assert any(messages[0] in problem for problem in verify(path.parents[file.count("/")]).problems)
    reader, said = find_latest_good(tmp_path)
    assert reader is not None and reader.step == 1
    assert messages[0] in said[0] and "going on from" in said[-1]


def test_a_flipped_manifest_is_found_wherever_the_flip_is(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1) / "manifest.json"
    whole = path.read_bytes()
    for at in range(0, len(whole), 37):
        flip(path, at)
        if json_or_none(path.read_bytes()) != json_or_none(whole):  # a flipped space between words means the same
            with pytest.raises(DataError, match=r"manifest\.json is damaged|has format_version"):
                open_checkpoint(tmp_path)
        path.write_bytes(whole)
    path.unlink()
    with pytest.raises(DataError, match=r"manifest\.json cannot be read: No such file.*no whole checkpoint"):
        open_checkpoint(tmp_path)
    assert not verify(path.parent).good


def json_or_none(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def rewrite_manifest(path: Path, **changes: Any) -> None:
    """Change a manifest as somebody would who means it: with a right digest."""
    table = {**json.loads(path.read_bytes()), **changes}
    del table["sha256"]
    text = json.dumps(table, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), **table}))


def test_where_data_lay_and_how_a_constant_rate_ends_is_no_training_state(tmp_path: Path) -> None:
    def saved(name: str, **changes: Any) -> Path:
        schedule = {"lr": 0.1, "schedule": "constant", "steps": 4} | changes.pop("schedule", {})
        data = {"path": "/a", "sha256": "5ha", "rows": 7} | changes.pop("data", {})
        state = {"step": 1, "schedule": schedule, "data": data}
        return save(tmp_path / name, 1, some_shards(1), Contents("adapter", state, {"adapter_config.json": b"{}"}))

    one = saved("one")
    assert compare(one, saved("two", data={"path": "/b"}, schedule={"steps": 6, "distributed": True})).equal
    assert compare(one, saved("three", data={"sha256": "other"})).state == ("data",)
    assert compare(one, saved("four", schedule={"lr": 0.2})).state == ("schedule",)
    cosine = [saved(f"cosine-{steps}", schedule={"schedule": "cosine", "steps": steps}) for steps in (4, 6)]
    assert compare(*cosine).state == ("schedule",)


@pytest.mark.parametrize("name", ["adapter_model.bin", "extra.pt", "more.safetensors", "x.safetensors.index.json"])
def test_foreign_weights_are_refused_and_other_files_warned_of(tmp_path: Path, name: str) -> None:
    folder = save_step(tmp_path, 1)
    (folder / "adapter" / "notes.txt").write_text("mine")
    assert "notes.txt was not written" in open_checkpoint(tmp_path).warnings[0]
    (folder / "adapter" / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"{name} was not written with this checkpoint") as error:
        open_checkpoint(tmp_path)
    assert error.value.hint.startswith("move it away: mv ")


@pytest.mark.parametrize(
    "name", ["optimizer/optimizer.pt", "training_args.pkl", "model/model.safetensors", "model/x.safetensors.index.json"]
)
def test_pickles_anywhere_and_weights_in_the_other_room_are_refused(tmp_path: Path, name: str) -> None:
    folder = save_step(tmp_path, 1)
    for other in ("notes.txt", "optimizer/more.safetensors"):
        (folder / other).write_text("mine")
    assert [line.rpartition("/")[2] for line in open_checkpoint(tmp_path).warnings] == [
        "notes.txt was not written with this checkpoint",
        "more.safetensors was not written with this checkpoint",
    ]
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"{name} was not written with this checkpoint"):
        open_checkpoint(tmp_path)


def test_a_folder_that_is_not_there_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none is no folder"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(ConfigError, match="none is no folder"):
        list_checkpoints(tmp_path / "none")


def test_without_latest_the_newest_whole_checkpoint_is_opened(tmp_path: Path) -> None:
    """As ``cp -r RUN/checkpoints/step-* THERE`` leaves it, the last copy cut short."""
    for step in (1, 2, 3):
        save_step(tmp_path / "checkpoints", step)
    (tmp_path / "checkpoints/latest").unlink()
    assert open_checkpoint(tmp_path).step == 3
    (tmp_path / "checkpoints/step-000003/manifest.json").unlink()
    reader = open_checkpoint(tmp_path, verify=True)
    assert reader.step == 2 and find_latest_good(tmp_path)[0].step == 2  # type: ignore[union-attr]
    assert reader.warnings[0] == f"{tmp_path / 'checkpoints'} has no latest"
    assert reader.warnings[1].startswith("step-000003 is not usable") and reader.warnings[2].startswith("opened ")
    for step in (1, 2):
        (tmp_path / f"checkpoints/step-00000{step}/state.json").write_text("")
    with pytest.raises(
        DataError, match=r"has no latest\n.*step-000003 is not usable(.|\n)*step-000001 .*\n  none is"
    ) as error:
        open_checkpoint(tmp_path)
    assert error.value.hint == "restore one from a copy"


def test_what_is_not_there_is_said_with_what_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no latest: nothing was saved there"):
        open_checkpoint(tmp_path)
    assert find_latest_good(tmp_path) == (None, ())
    save_step(tmp_path / "checkpoints", 1)
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "step-000001"):
        assert open_checkpoint(path).step == 1
    with pytest.raises(ConfigError, match="has no step-000007") as error:
        open_checkpoint(tmp_path, 7)
    assert error.value.hint == "there are steps 1"
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        open_checkpoint(tmp_path / "checkpoints" / "step-000009")
    shutil.rmtree(tmp_path / "checkpoints" / "step-000001")
    with pytest.raises(DataError, match="names step-000001, which is missing"):
        open_checkpoint(tmp_path)
    with pytest.raises(DataError, match="no good checkpoint in"):
        find_latest_good(tmp_path)
    (tmp_path / "checkpoints" / "latest").write_text("../../etc\n")
    with pytest.raises(DataError, match=r"names no checkpoint: '\.\./\.\./etc'"):
        open_checkpoint(tmp_path)


def test_without_latest_the_newest_good_one_is_found(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    reader, said = find_latest_good(tmp_path)
    assert reader is not None and reader.step == 2 and "names no checkpoint" in said[0]
    flip(tmp_path / "step-000002" / FILES[0])
    (tmp_path / "latest").unlink()
    reader, said = find_latest_good(tmp_path)
    assert reader is not None and reader.step == 1
    flip(tmp_path / "step-000001" / FILES[0])
    with pytest.raises(DataError, match=r"(?s)step-000002 is not usable.*step-000001 is not usable"):
        find_latest_good(tmp_path)


def test_a_reader_says_what_it_lacks(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    reader = open_checkpoint(tmp_path)
    assert reader.names() == ("q_proj.lora_A.weight", "q_proj.lora_B.weight") and reader.state == {"step": 1}
    assert reader.shape("q_proj.lora_A.weight", "exp_avg") == (2, 6)
    with pytest.raises(KeyError, match="nothing"):
        reader.read("nothing", "weight", Box((0,), (1,)))
    with pytest.raises(ValueError, match="does not lie in it"):
        reader.read("q_proj.lora_A.weight", "weight", Box((0, 0), (3, 1)))


def test_comparing_names_what_differs_and_by_how_much(tmp_path: Path) -> None:
    one, two = save_step(tmp_path / "a", 1), save_step(tmp_path / "b", 1)
    assert compare(one, two).equal
    shards = some_shards(1)
    shards[1].data[1, 2] += 0.25
    shards[2].data[0, 0] = float("nan")
    shards[5] = Shard("other.weight", "weight", (3,), Box.whole((3,)), torch.zeros(3))
    three = save(tmp_path / "c", 1, shards, Contents("adapter", {"step": 1, "seed": 3}))
    found = compare(one, three)
    assert not found.equal and found.state == ("seed",)
    assert found.only_in_first == ("q_proj.lora_B.weight.exp_avg_sq",) and found.only_in_second == ("other.weight",)
    assert [(each.kind, each.largest) for each in found.different[:1]] == [("exp_avg", 0.25)]
    assert len(found.different) == 2 and found.different[1].largest != found.different[1].largest
    shards[0] = Shard(shards[0].name, "weight", (2, 6), shards[0].box, shards[0].data.half())
    four = save(tmp_path / "d", 1, shards, Contents("adapter", {}))
    assert compare(three, four).different[0].reason == "(2, 6) F32 and (2, 6) F16"


def test_verify_hashes_every_tensor_again(tmp_path: Path) -> None:
    folder = save_step(tmp_path, 1)
    report = verify(folder)
    assert report.good and report.step == 1 and report.tensors == 6 and report.files == len(FILES) + 1
    weights = folder / FILES[0]
    tensors = {"q_proj.lora_A.weight": torch.zeros(2, 6), "q_proj.lora_B.weight": torch.zeros(4, 1)}
    save_file(tensors, weights)
    data = weights.read_bytes()
    files = json.loads((folder / "manifest.json").read_bytes())["files"]
    files[FILES[0]] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite_manifest(folder / "manifest.json", files=files)
    problems = verify(folder).problems
    assert "q_proj.lora_A.weight in adapter/adapter_model.safetensors: sha256" in problems[0]
    assert "q_proj.lora_B.weight is not in adapter/adapter_model.safetensors as the manifest says" in problems[1]


def test_the_first_format_still_opens() -> None:
    reader = open_checkpoint(GOLDEN, verify=True)
    assert verify(GOLDEN / "step-000003").good
    assert reader.step == 3 and reader.state["samples_consumed"] == 24
    digests = {key: record.sha256[:16] for key, record in reader.manifest.tensors.items()}
    assert digests["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "weight"] == GOLDEN_DIGESTS[0]
    assert digests["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", "exp_avg_sq"] == GOLDEN_DIGESTS[1]
    name = "base_model.model.model.layers.10.self_attn.q_proj.lora_B.weight"
    expected = torch.arange(12, dtype=torch.float32).reshape(4, 3) / 8 + 10
    assert torch.equal(reader.read(name, "weight", Box((1, 0), (2, 3))), expected[1:3])


GOLDEN_DIGESTS = ("3de7e7bb61d4102b", "9a75e97672d228ac")
