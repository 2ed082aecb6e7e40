"""Readers of Hugging Face and PEFT folders: right boxes, and broken folders named in the message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from orchestrator.checkpoint.hf_reader import INDEX, AdapterReader, HfReader, read_json
from orchestrator.checkpoint.tensor_file import (
    TORCH_DTYPES,
    FileWriter,
    TensorEntry,
    header_bytes,
    lay_out,
    read_header,
)
from orchestrator.errors import ConfigError, DataError
from parallel.shards import Box


def write_sharded(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 2) -> None:
    """Write a Hugging Face folder of several shards with an index."""
    folder.mkdir(exist_ok=True)
    places = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: value for at, (name, value) in enumerate(tensors.items()) if at % shards == shard}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(6, 4, generator=generator),
        "b": torch.randn(5, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "cube": torch.randn(2, 3, 4, generator=generator),
    }


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_any_box_of_any_tensor_is_read_as_a_new_tensor(tmp_path: Path, shards: int) -> None:
    tensors = some_tensors()
    if shards:
        write_sharded(tmp_path, tensors, shards)
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    reader = HfReader(tmp_path)
    assert sorted(reader.names) == sorted(tensors)
    for name, value in tensors.items():
        shape = tuple(value.shape)
        assert reader.shape(name, "weight") == shape
        part = Box(tuple(min(1, n - 1) for n in shape), tuple(max(1, n - 2) for n in shape))
        for box in (Box.whole(shape), part):
            got = reader.read(name, "weight", box)
            assert got.is_contiguous() and got.dtype == value.dtype
            assert torch.equal(got, value[box.slices] if shape else value)
            got.zero_()
            assert torch.equal(reader.read(name, "weight", box), value[box.slices] if shape else value)


def test_unknown_names_and_kinds_are_key_errors_and_boxes_outside_value_errors(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    reader = HfReader(tmp_path)
    with pytest.raises(KeyError, match="lm_head"):
        reader.read("lm_head.weight", "weight", Box((0,), (1,)))
    with pytest.raises(KeyError, match=r"a\.exp_avg"):
        reader.shape("a", "exp_avg")
    for box in (Box((1, 0), (2, 2)), Box((-1, 0), (1, 2)), Box((0,), (1,))):
        with pytest.raises(ValueError, match="does not lie in it"):
            reader.read("a", "weight", box)


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8, alphabet=st.characters(exclude_categories=["Cs"])).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_our_layout_is_the_librarys_own(tmp_path_factory: pytest.TempPathFactory, table: dict) -> None:
    folder = tmp_path_factory.mktemp("layout")
    tensors = {name: torch.zeros(shape, dtype=TORCH_DTYPES[code]) for name, (code, shape) in table.items()}
    save_file(tensors, folder / "x.safetensors", metadata={"format": "pt"})
    ours = lay_out(TensorEntry(name, code, tuple(shape)) for name, (code, shape) in table.items())
    head = header_bytes(ours)
    assert (folder / "x.safetensors").read_bytes()[: len(head)] == head
    assert read_header(folder / "x.safetensors") == ours


def test_truncation_at_any_place_is_named_with_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(10)}, path)
    whole = path.read_bytes()
    for size in (0, 4, 8, 30, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"model\.safetensors is truncated"):
            HfReader(tmp_path)
    path.write_bytes(whole + b"x")
    with pytest.raises(DataError, match="41 bytes of data, its header says 40"):
        HfReader(tmp_path)
    path.write_bytes((8).to_bytes(8, "little") + b"not json")
    with pytest.raises(DataError, match="broken safetensors header"):
        HfReader(tmp_path)
    path.write_bytes(whole.replace(b"[0,40]", b"[4,40]"))
    with pytest.raises(DataError, match=r"broken safetensors header: a at bytes 4\.\.40"):
        HfReader(tmp_path)


@pytest.mark.parametrize("file", ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", ".."])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, file: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(DataError, match=r"only \.safetensors files beside it are read"):
        HfReader(tmp_path)


def test_broken_indices_are_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, some_tensors())
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], "ghost": "none.safetensors"}}))
    with pytest.raises(DataError, match=r"none\.safetensors is missing: 2 of 3 files"):
        HfReader(tmp_path)
    first = sorted(set(index["weight_map"].values()))[0]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], "ghost": first}}))
    with pytest.raises(DataError, match="places ghost in"):
        HfReader(tmp_path)
    for text, message in (("{", "no valid JSON"), ("[]", "no JSON object"), ("{}", "no weight_map")):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(DataError, match=message):
            HfReader(tmp_path)


def test_one_key_in_two_files_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path, some_tensors())
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    save_file({"a": torch.zeros(1)}, second)
    with pytest.raises(DataError, match="a is both in"):
        HfReader(tmp_path)


def test_pickled_weights_are_refused_with_a_hint_that_converts(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin, but pickled weights are not opened") as error:
        HfReader(tmp_path)
    assert error.value.hint == f"isotrain convert {tmp_path} NEW_FOLDER --allow-pickle"
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError, match=r"adapter_model\.bin.* but pickled weights are not opened"):
        AdapterReader(tmp_path)
    with pytest.raises(ConfigError) as error:
        HfReader(tmp_path / "nowhere")
    assert "is no folder" in error.value.hint


def test_an_adapter_folder_is_read_with_its_configuration(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(2, 3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"has no adapter_config\.json"):
        AdapterReader(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 2}')
    reader = AdapterReader(tmp_path)
    assert reader.config == {"r": 2} and reader.names == (name,) and reader.shape(name) == (2, 3)
    assert torch.equal(reader.read(name, "weight", Box((1, 1), (1, 2))), torch.ones(1, 2))


def test_what_cannot_be_read_or_is_of_no_known_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.safetensors cannot be read: No such file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(DataError, match=r"none\.json cannot be read: No such file"):
        read_json(tmp_path / "none.json")
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(10)}, path)
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F99"'))
    with pytest.raises(DataError, match="a has type F99, which is not supported"):
        HfReader(tmp_path).read("a", "weight", Box((0,), (1,)))
    save_file({"a": torch.zeros(10)}, path)
    reader = HfReader(tmp_path)
    path.write_bytes(b"changed since")
    with pytest.raises(DataError, match=r"model\.safetensors has changed since its header was read"):
        reader.read("a", "weight", Box((0,), (1,)))


def test_a_model_without_one_of_its_tensors_is_named_before_any_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(10)}, tmp_path / "model.safetensors")
    reader = HfReader(tmp_path)
    reader.check(tmp_path, {"a": (10,)})
    with pytest.raises(DataError, match=r"has a of shape \[10\], its config\.json asks for \[2, 5\]"):
        reader.check(tmp_path, {"a": (2, 5)})
    with pytest.raises(DataError, match=r"has no tensor b, which its config\.json asks for"):
        reader.check(tmp_path, {"a": (10,), "b": (1,)})


def test_a_file_is_not_closed_before_all_its_tensors_are_written(tmp_path: Path) -> None:
    entries = lay_out([TensorEntry("a", "F32", (2,)), TensorEntry("b", "F32", (3,))])
    writer = FileWriter(tmp_path / "x", entries)
    writer.write(torch.zeros(4))
    with pytest.raises(ValueError, match="1 tensors were not written"):
        writer.close()
    writer.abort()
