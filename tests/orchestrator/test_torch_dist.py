"""A torch_dist folder is opened without trust in it; what is wrong with one is named. torch writes the good ones."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from orchestrator.checkpoint.megatron_weights import checkpoint_folder, export_torch_dist, import_torch_dist
from orchestrator.checkpoint.torch_dist import Item, Stored, TorchDistReader
from orchestrator.checkpoint.torch_dist_writer import TorchDistWriter
from orchestrator.cli import main
from orchestrator.convert import convert
from orchestrator.errors import ConfigError, DataError
from parallel.shards import Box
from parallel.specs import SpecError
from tests.helpers.exported import hf_weights

TENSORS = {"a": torch.arange(24.0).reshape(4, 6), "b": torch.arange(6).to(torch.bfloat16), "c": torch.tensor(3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that torch wrote."""
    path = tmp_path / "dcp"
    dcp.save(dict(TENSORS), checkpoint_id=path, no_dist=True)
    return path


def test_a_full_disk_is_said_to_be_full(tmp_path: Path) -> None:
    """torch's archive says "unexpected pos" of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError) as raised, TorchDistWriter(tmp_path, {}) as writer:
            writer.add("w", (), (), torch.ones(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG


def metadata(folder: Path) -> Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())


def put(folder: Path, value: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(value))


def test_what_torch_writes_is_read_whole_and_in_boxes(folder: Path) -> None:
    reader = TorchDistReader(folder)
    assert set(reader.keys) == set(TENSORS)
    for key, value in TENSORS.items():
        assert torch.equal(reader.read(key, Box.whole(tuple(value.shape))), value)
        assert reader.read(key, Box.whole(tuple(value.shape))).dtype == value.dtype
    assert torch.equal(reader.read("a", Box((1, 2), (2, 3))), TENSORS["a"][1:3, 2:5])
    with pytest.raises(ValueError, match=r"a has shape \(4, 6\)"):
        reader.read("a", Box((3, 0), (2, 6)))


@given(st.data())
def test_no_piece_is_overlooked(data: st.DataObject) -> None:
    """However a tensor is cut, and whichever box is asked for."""
    rows = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    columns = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    items = [
        Item(Box((sum(rows[:i]), sum(columns[:j])), (rows[i], columns[j])), "", 0, 0)
        for i in range(len(rows))
        for j in range(len(columns))
    ]
    start = data.draw(st.integers(0, sum(rows) - 1))
    box = Box((start, 0), (data.draw(st.integers(1, sum(rows) - start)), 1))
    found = Stored("F32", (sum(rows), sum(columns)), tuple(items)).around(box)
    assert {item for item in items if item.box.intersect(box)} <= set(found)


def test_torch_reads_what_we_write(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with TorchDistWriter(tmp_path / "out", {"iteration": 3}, file_bytes=100) as writer:
        for layer in range(2):
            writer.add("w", (layer,), (2,), TENSORS["a"] + layer)
        with pytest.raises(ValueError, match=r"w is torch\.float32 \(2, 4, 6\): torch\.int64 \(2, 4, 6\) does not"):
            writer.add("w", (0,), (2,), TENSORS["a"].long())
        writer.add_nothing("w._extra_state/shard_0_1")
    assert len(list((tmp_path / "out").glob("*.distcp"))) == 3
    target = {"w": torch.zeros(2, 4, 6)}
    dcp.load(target, checkpoint_id=tmp_path / "out", no_dist=True)
    assert torch.equal(target["w"], torch.stack([TENSORS["a"], TENSORS["a"] + 1]))
    assert set(TorchDistReader(tmp_path / "out").keys) == {"w"}


class Payload:
    """An object whose unpickling makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def in_metadata(folder: Path, proof: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(replace(metadata(folder), planner_data=Payload(proof))))


def in_place_of_it(folder: Path, proof: Path) -> None:
    (folder / ".metadata").write_bytes(b"cposix\nsystem\n(S'mkdir " + str(proof).encode() + b"'\ntR.")


def through_torch(folder: Path, proof: Path) -> None:
    """Names below those that are listed, and functions of torch that open pickles."""
    inner = pickle.dumps(Payload(proof))
    (folder / ".metadata").write_bytes(b"ctorch.storage\n_load_from_bytes\n(" + pickle.dumps(inner)[2:-1] + b"tR.")


def by_attribute(folder: Path, proof: Path) -> None:
    module, name = b"torch.distributed.checkpoint.metadata", b"os.mkdir"
    text = b"".join(b"\x8c" + bytes([len(word)]) + word for word in (module, name))
    (folder / ".metadata").write_bytes(b"\x80\x04" + text + b"\x93\x8c" + bytes([len(str(proof))]) + str(proof).encode() + b"\x85R.")  # fmt: skip # noqa: E501


@pytest.mark.parametrize("poison", [in_metadata, in_place_of_it, through_torch, by_attribute])
def test_a_payload_in_the_metadata_never_runs(
    folder: Path, tmp_path: Path, poison: Callable[[Path, Path], None]
) -> None:
    proof = tmp_path / "ran"
    poison(folder, proof)
    with pytest.raises(DataError, match=r"no list of tensors, and nothing in it is run: it asks for \S+, which"):
        TorchDistReader(folder)
    assert not proof.exists()


GREEDY = [b"\x80\x04Nr" + b"\xff" * 4 + b".", b"\x80\x05\x96" + (2**34).to_bytes(8, "little") + b"."]


@pytest.mark.parametrize("text", GREEDY, ids=["remember", "array"])
def test_a_few_bytes_take_no_memory(folder: Path, text: bytes) -> None:
    """A pickle that says that it will remember 4 billion objects, and one with an array of 16 GiB."""
    (folder / ".metadata").write_bytes(text)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="is no list of tensors"):
        TorchDistReader(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 64 * 1024  # KiB


def test_the_payloads_would_have_shown(folder: Path, tmp_path: Path) -> None:
    for poison in (in_metadata, in_place_of_it, by_attribute):
        proof = tmp_path / poison.__name__
        poison(folder, proof)
        pickle.loads((folder / ".metadata").read_bytes())
        assert proof.exists(), poison.__name__


def test_a_payload_in_a_piece_never_runs(folder: Path, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    torch.save(Payload(proof), folder / "__0_0.distcp")
    value = metadata(folder)
    size = (folder / "__0_0.distcp").stat().st_size
    put(folder, replace(value, storage_data={k: replace(v, offset=0, length=size) for k, v in value.storage_data.items()}))  # fmt: skip # noqa: E501
    with pytest.raises(DataError, match=r"__0_0\.distcp is damaged, or asks for code to run, at a:"):
        TorchDistReader(folder).read("a", Box.whole((4, 6)))
    assert not proof.exists()


@pytest.mark.parametrize("file", ["../evil.distcp", "/etc/passwd", "sub/x.distcp", "x.bin", "..\\x.distcp"])
def test_the_metadata_cannot_lead_out_of_its_folder(folder: Path, file: str) -> None:
    value = metadata(folder)
    put(folder, replace(value, storage_data={k: replace(v, relative_path=file) for k, v in value.storage_data.items()}))
    with pytest.raises(DataError, match=r"only \.distcp files beside it are read"):
        TorchDistReader(folder).stored("a")


def test_damage_is_named(folder: Path) -> None:
    whole, data = (folder / ".metadata").read_bytes(), (folder / "__0_0.distcp").read_bytes()
    for broken in (whole[:100], b"", b"\x80\x04N.", pickle.dumps(3)):
        (folder / ".metadata").write_bytes(broken)
        with pytest.raises(DataError, match="is no list of tensors"):
            TorchDistReader(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(DataError, match="is missing: this is no torch_dist checkpoint"):
        TorchDistReader(folder)
    (folder / ".metadata").write_bytes(whole)
    box = Box.whole((4, 6))
    for content, message in ((data[:500], "is damaged"), (None, r"is missing: a piece of a is in it")):
        (folder / "__0_0.distcp").unlink()
        if content is not None:
            (folder / "__0_0.distcp").write_bytes(content)
        with pytest.raises(DataError, match=message):
            TorchDistReader(folder).read("a", box)
    (folder / "__0_0.distcp").write_bytes(data)
    value = metadata(folder)
    places = dict(value.storage_data)
    a, b = (next(index for index in places if index.fqn == name) for name in "ab")
    places[a], places[b] = places[b], places[a]
    put(folder, replace(value, storage_data=places))
    with pytest.raises(DataError, match=r"at a it does not hold the F32 \(4, 6\)"):
        TorchDistReader(folder).read("a", box)


def test_whatever_the_bytes_are_the_error_is_one_of_ours(folder: Path) -> None:
    """Bytes changed, lost and put in between at random, in the list and in a piece: read, or refused; nothing else."""
    draw = random.Random(5)
    whole = {name: (folder / name).read_bytes() for name in (".metadata", "__0_0.distcp")}
    refused = 0
    for turn in range(600):
        name = ".metadata" if turn % 2 else "__0_0.distcp"
        data = bytearray(whole[name])
        for _ in range(draw.randint(1, 4)):
            at, less = draw.randrange(len(data)), draw.choice((0, 1, 1, 1, 5))
            data[at : at + less] = draw.randbytes(draw.choice((0, 1, 1, 1, 3)))
        (folder / name).write_bytes(data)
        try:
            reader = TorchDistReader(folder)
            for key in reader.keys:
                reader.read(key, Box.whole(reader.stored(key).shape))
        except DataError:
            refused += 1
        (folder / name).write_bytes(whole[name])
    assert refused > 400


def test_pieces_that_make_no_whole_are_named(folder: Path) -> None:
    value = metadata(folder)
    tensor = value.state_dict_metadata["a"]
    tensor.size = torch.Size((5, 6))
    put(folder, value)
    with pytest.raises(DataError, match="a has 30 elements, its pieces have 24"):
        TorchDistReader(folder).stored("a")
    tensor.size = torch.Size((4, 5))
    put(folder, value)
    with pytest.raises(DataError, match=r"a has shape \(4, 5\), a piece of it is"):
        TorchDistReader(folder).stored("a")
    assert torch.equal(TorchDistReader(folder).read("c", Box((), ())), TENSORS["c"])  # others are as good as before


def test_what_cannot_be_read_is_refused(folder: Path, tiny_model: Any, tmp_path: Path) -> None:
    value = metadata(folder)
    value.state_dict_metadata["a"].properties.dtype = torch.complex32
    put(folder, value)
    with pytest.raises(DataError, match="a has type complex32, which is not supported"):
        TorchDistReader(folder).read("a", Box.whole((4, 6)))
    put(folder, replace(value, storage_data={k: replace(v, transform_descriptors=["zip"]) for k, v in value.storage_data.items()}))  # fmt: skip # noqa: E501
    with pytest.raises(DataError, match=r"a is listed wrongly: a is stored \['zip'\]"):
        TorchDistReader(folder).stored("a")
    export_torch_dist(tiny_model("llama"), tmp_path / "out")
    release = tmp_path / "out/release"
    value = metadata(release)
    value.state_dict_metadata["decoder.final_layernorm.weight"].properties.dtype = torch.complex32
    put(release, value)
    with pytest.raises(ConfigError, match=r"has decoder\.final_layernorm\.weight of type complex32"):
        import_torch_dist(tmp_path / "out", tiny_model("llama"), tmp_path / "back")


def test_the_moments_of_an_optimizer_are_passed_over(tiny_model: Any, tmp_path: Path) -> None:
    hf = tiny_model("llama")
    export_torch_dist(hf, tmp_path / "out")
    value = metadata(tmp_path / "out/release")
    norm, index = "decoder.final_layernorm.weight", next(iter(value.storage_data))
    for key in ("optimizer.state.exp_avg.decoder.final_layernorm.weight", "chained_1.optimizer.state.exp_avg.x"):
        value.state_dict_metadata[key] = value.state_dict_metadata[norm]
        place = next(info for other, info in value.storage_data.items() if other.fqn == norm)
        value.storage_data[type(index)(key, torch.Size((0,)))] = place
    put(tmp_path / "out/release", value)
    import_torch_dist(tmp_path / "out", hf, tmp_path / "back")
    assert hf_weights(tmp_path / "back").keys() == hf_weights(hf).keys()


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_there_and_back_is_the_same_model(tiny_model: Any, tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    hf = tiny_model(family)
    export_torch_dist(hf, tmp_path / "out")
    import_torch_dist(tmp_path / "out", hf, tmp_path / "back")
    theirs, ours = hf_weights(hf), hf_weights(tmp_path / "back")
    if family == "mixtral":  # transformers 5 writes joined experts; what comes back has the hub's names, which it reads
        models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (hf, tmp_path / "back")]
        with torch.no_grad():
            first, second = (model(torch.arange(12)[None]).logits for model in models)
        assert torch.equal(first, second) and any("block_sparse_moe.experts.3.w2" in name for name in ours)
        return
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_another_model_is_refused(tiny_model: Any, tmp_path: Path, capsys: Any) -> None:
    hf = tiny_model("llama")
    export_torch_dist(hf, tmp_path / "out")
    for family, changes, message in (
        ("llama", {"num_hidden_layers": 5}, r"of shape \(4, 48\), not \(5, 48\)"),
        ("qwen2", {}, r"has no decoder\.layers\.self_attention\.linear_qkv\.bias"),
        ("qwen2", {"num_key_value_heads": 2}, r"linear_qkv\.weight of shape|has no decoder"),
        ("llama", {"vocab_size": 102}, r"embedding\.word_embeddings\.weight of shape \(101, 48\), not \(102, 48\)"),
        ("llama", {"tie_word_embeddings": False}, r"has no output_layer\.weight"),
    ):
        other = tiny_model(family, **changes)
        with pytest.raises(ConfigError, match=message):
            convert(tmp_path / "out", tmp_path / "back", model=str(other))
    biased = tiny_model("qwen2")
    export_torch_dist(biased, tmp_path / "biased")
    with pytest.raises(ConfigError, match=r"holds 2 tensors more, first decoder\.layers\.self_attention\.linear_qkv"):
        convert(tmp_path / "biased", tmp_path / "back", model=str(tiny_model("llama")))
    with pytest.raises(ConfigError, match="does not say what model it is") as error:
        convert(tmp_path / "out", tmp_path / "back")
    assert error.value.hint.startswith(f"isotrain convert {tmp_path / 'out'} {tmp_path / 'back'} --model FOLDER")
    assert not (tmp_path / "back").exists()


def test_what_cannot_be_exported_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(SpecError, match=r"torch_dist is known for llama, .*, not for gemma2"):
        export_torch_dist(tiny_model("gemma2"), tmp_path / "out")
    mixed = tmp_path / "mixed"
    shutil.copytree(tiny_model("llama"), mixed)
    tensors = load_file(mixed / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({**tensors, name: tensors[name].bfloat16()}, mixed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"k_proj\.weight \(BF16\) and .* are one tensor in megatron-core"):
        export_torch_dist(mixed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_newest_of_several_is_found_and_no_other_path_is(tmp_path: Path) -> None:
    assert checkpoint_folder(tmp_path) == tmp_path
    newest = tmp_path / "latest_checkpointed_iteration.txt"
    (tmp_path / "iter_0000012").mkdir()
    (tmp_path / "iter_0000012/.metadata").write_bytes(b"")
    newest.write_text("12\n")
    assert checkpoint_folder(tmp_path) == tmp_path / "iter_0000012"
    for word in ("13", "../iter_0000012", "release", "iter_0000012", "", "-12"):
        newest.write_text(word)
        with pytest.raises(DataError, match="which is no torch_dist checkpoint in"):
            checkpoint_folder(tmp_path)


def test_a_checkpoint_of_full_tuning_is_exported(tiny_model: Any, tmp_path: Path) -> None:
    from orchestrator.checkpoint.publish import Contents
    from orchestrator.checkpoint.save import save
    from parallel.shards import Shard

    hf = tiny_model("llama")
    shards = [Shard(n, "weight", tuple(t.shape), Box.whole(tuple(t.shape)), t) for n, t in hf_weights(hf).items()]
    files = {"config.json": hf / "config.json"}
    save(tmp_path / "run/checkpoints", 6, shards, Contents("model", {"step": 6}, files))
    for _ in range(2):  # an earlier export of its kind is replaced
        assert main(["export", str(tmp_path / "run"), "--to", "torch_dist", str(tmp_path / "out")]) == 0
    assert torch.load(tmp_path / "out/release/common.pt", weights_only=True)["iteration"] == 6
    assert convert(tmp_path / "out", tmp_path / "back", model=str(hf)) == "torch_dist"
    theirs, ours = hf_weights(hf), hf_weights(tmp_path / "back")
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_adapter_is_merged_first(tiny_model: Any, tmp_path: Path, capsys: Any) -> None:
    from orchestrator.checkpoint.adapter import adapter_config
    from orchestrator.checkpoint.publish import Contents
    from orchestrator.checkpoint.save import save
    from orchestrator.config.job import TunerConfig
    from parallel.shards import Shard

    hf = tiny_model("llama")
    stem = "base_model.model.model.layers.2.self_attn.v_proj.lora_"
    halves = {f"{stem}A.weight": torch.ones(4, 48), f"{stem}B.weight": torch.ones(48, 4)}
    shards = [Shard(name, "weight", tuple(t.shape), Box.whole(tuple(t.shape)), t) for name, t in halves.items()]
    config = json.dumps(adapter_config(TunerConfig(r=4, alpha=8.0), ["v_proj"], str(hf))).encode()
    saved = save(tmp_path / "checkpoints", 1, shards, Contents("adapter", {}, {"adapter_config.json": config}))
    assert main(["export", str(saved), "--to", "torch_dist", str(tmp_path / "out")]) == 64
    words = capsys.readouterr().err
    assert "holds an adapter, and megatron-core's checkpoints hold whole models" in words
    hint = words.partition("hint: ")[2].strip().replace("MERGED", str(tmp_path / "merged"))
    for command in hint.split(" && "):  # as one types it
        assert main(command.split()[1:]) == 0, command
    reader = TorchDistReader(tmp_path / "out/release")
    fused = reader.read("decoder.layers.self_attention.linear_qkv.weight", Box((2, 0, 0), (1, 144, 48)))[0]
    value = fused.unflatten(0, (6, 3, 8))[:, 2].flatten(0, 1)
    assert torch.allclose(value, hf_weights(hf)["model.layers.2.self_attn.v_proj.weight"] + 2 * 4.0)
