"""Pickled weights come in bit for bit, by choice only, and nothing in them is ever run."""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.checkpoint.hf_reader import HfReader
from orchestrator.checkpoint.pickles import load_pickle
from orchestrator.cli import main
from orchestrator.convert import convert
from orchestrator.errors import ConfigError, DataError, IsotrainError


class Payload:
    """An object whose unpickling makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def pickled(tiny: Path, folder: Path, shard: str | None = None) -> dict[str, torch.Tensor]:
    """Write a tiny model as transformers 4 wrote it without safetensors; returns its tensors, the head among them."""
    tensors = load_file(tiny / "model.safetensors")
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (folder / "tokenizer.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(pickle.dumps(print))
    if json.loads((tiny / "config.json").read_text())["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    if shard is None:
        torch.save(tensors, folder / "pytorch_model.bin")
        return tensors
    names = sorted(tensors)
    first = {*names[:5], "model.embed_tokens.weight", "lm_head.weight"}
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    weight_map = {name: files[name not in first] for name in names}
    for file in files:
        torch.save({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("shard", [None, "two"])
@pytest.mark.parametrize("family", ["llama", "qwen2"], ids=["tied", "untied"])
def test_a_model_comes_in_bit_for_bit(tiny_model: Any, tmp_path: Path, family: str, shard: str | None) -> None:
    from transformers import AutoModelForCausalLM

    tensors = pickled(tiny_model(family), tmp_path / "old", shard)
    assert main(["convert", str(tmp_path / "old"), str(tmp_path / "new"), "--allow-pickle"]) == 0
    reader = HfReader(tmp_path / "new")
    expected = set(tensors) - ({"lm_head.weight"} if family == "llama" else set())  # tied: as transformers writes it
    assert set(reader.names) == expected
    held: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "new").glob("*.safetensors"):
        held |= load_file(file)
    assert all(torch.equal(held[name], tensors[name]) for name in expected)
    assert (tmp_path / "new/tokenizer.json").exists() and not list((tmp_path / "new").glob("*.bin"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert torch.equal(model.state_dict()["lm_head.weight"], tensors["lm_head.weight"])


def test_an_adapter_comes_in_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    view = torch.arange(24.0).reshape(4, 6).t()[1:3]  # a view of part of a transposed tensor is a tensor like others
    torch.save({name: view}, tmp_path / "old/adapter_model.bin")
    (tmp_path / "old/adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert convert(tmp_path / "old", tmp_path / "new", allow_pickle=True) == "pickles"
    assert torch.equal(load_file(tmp_path / "new/adapter_model.safetensors")[name], view)
    assert (tmp_path / "new/adapter_config.json").read_text() == '{"peft_type": "LORA"}'
    with pytest.raises(ConfigError, match=r"has a adapter_model\.safetensors: there is nothing to convert"):
        convert(tmp_path / "new", tmp_path / "newer", allow_pickle=True)


def test_generate_opens_no_pickle_either(tiny_model: Any, tmp_path: Path, capsys: Any) -> None:
    proof = tmp_path / "ran"
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    pickled(tiny_model("llama"), model)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_model("llama"))}))
    for folder, name in ((model, "pytorch_model.bin"), (adapter, "adapter_model.bin")):
        torch.save({"x": Payload(proof)}, folder / name)
        assert main(["generate", str(folder), "--prompt", "?"]) == 64
        words = capsys.readouterr().err
        assert f"; it has {name}" in words and "but pickled weights are not opened" in words
        assert f"hint: isotrain convert {folder} NEW_FOLDER --allow-pickle" in words
    assert not proof.exists()


def test_torchs_form_before_its_archives_comes_in_too(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {"w": torch.arange(6.0).reshape(2, 3)}
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(folder, tmp_path / "out", allow_pickle=True)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], tensors["w"])


def in_state(path: Path, proof: Path) -> None:
    torch.save({"w": torch.ones(1), "x": Payload(proof)}, path)


def bare(path: Path, proof: Path) -> None:
    path.write_bytes(pickle.dumps({"x": Payload(proof)}))


def legacy(path: Path, proof: Path) -> None:
    torch.save({"x": Payload(proof)}, path, _use_new_zipfile_serialization=False)


def in_archive(path: Path, proof: Path) -> None:
    """A zip file that looks like torch's, whose pickle calls straight away."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(proof), protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


@pytest.mark.parametrize("poison", [in_state, bare, legacy, in_archive])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_a_payload_never_runs(tmp_path: Path, poison: Callable[[Path, Path], None], name: str) -> None:
    folder, proof = tmp_path / "bad", tmp_path / "ran"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    poison(folder / name, proof)
    with pytest.raises(ConfigError, match="is a pickle, which is opened only when you say so") as error:
        convert(folder, tmp_path / "out")
    assert error.value.hint == f"isotrain convert {folder} {tmp_path / 'out'} --allow-pickle"
    with pytest.raises(DataError, match=r"no file of tensors that can be opened without running code"):
        convert(folder, tmp_path / "out", allow_pickle=True)
    assert not proof.exists() and not (tmp_path / "out").exists()
    Payload(proof).__reduce__()[0](*Payload(proof).__reduce__()[1])
    assert proof.exists()  # the payload would have shown


def test_only_named_plain_tensors_come_in(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    for value, message in (
        ({"model": {"w": torch.ones(1)}}, "holds 'model', which is no plain tensor but a dict"),
        ({"w": torch.eye(2).to_sparse()}, r"which is no plain tensor but a torch\.sparse_coo"),
        ({"w": 3}, "which is no plain tensor but a int"),
        ([torch.ones(1)], "holds a list, not a table of named tensors"),
    ):
        torch.save(value, file)
        with pytest.raises(DataError, match=message):
            convert(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", allow_pickle=True)
    torch.save({"w": torch.ones(1000)}, file)
    whole = file.read_bytes()
    for broken in (whole[:200], b"", whole.replace(b"PK", b"XX")):
        file.write_bytes(broken)
        with pytest.raises(DataError, match="no file of tensors"):
            convert(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", allow_pickle=True)


def test_whatever_the_bytes_are_the_error_is_one_of_ours(tmp_path: Path) -> None:
    draw = random.Random(6)
    torch.save({"a": torch.arange(24.0).reshape(4, 6), "b": torch.ones(3)}, tmp_path / "x.bin")
    whole, refused = (tmp_path / "x.bin").read_bytes(), 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            at, less = draw.randrange(len(data)), draw.choice((0, 1, 1, 1, 5))
            data[at : at + less] = draw.randbytes(draw.choice((0, 1, 1, 1, 3)))
        (tmp_path / "x.bin").write_bytes(data)
        try:
            load_pickle(tmp_path / "x.bin")
        except DataError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("file", ["../evil.bin", "/etc/passwd", "sub/x.bin", "x.safetensors", ".."])
def test_an_index_of_pickles_cannot_lead_out_of_its_folder(tmp_path: Path, file: str) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(DataError, match=r"only \.bin files beside it are read"):
        convert(tmp_path, tmp_path / "out", allow_pickle=True)


def test_an_index_that_lies_is_named(tmp_path: Path) -> None:
    for number in (1, 2):
        torch.save({f"w{number}": torch.ones(1)}, tmp_path / f"{number}.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    out = tmp_path.parent / f"{tmp_path.name}-out"
    index.write_text(json.dumps({"weight_map": {"w1": "1.bin", "w2": "1.bin", "w3": "2.bin"}}))
    with pytest.raises(DataError, match=r"places w2 in 1\.bin, which does not hold it"):
        convert(tmp_path, out, allow_pickle=True)
    torch.save({"w1": torch.ones(1)}, tmp_path / "2.bin")
    with pytest.raises(DataError, match=r"w1 is both in .*1\.bin and in .*2\.bin"):
        convert(tmp_path, out, allow_pickle=True)
    assert not out.exists()


def test_what_is_no_folder_of_weights_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"has no pytorch_model\.bin, no pytorch_model\.bin\.index\.json and no"):
        convert(tmp_path, tmp_path / "out")
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(IsotrainError, match="which is only read"):
        convert(tmp_path, tmp_path / "inside", allow_pickle=True)


def test_many_views_of_one_memory_are_written_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes that stand for many: written row by row, never made whole."""
    from orchestrator.checkpoint import export

    (tmp_path / "old").mkdir()
    torch.save({"w": torch.arange(4.0).expand(1000, 4)}, tmp_path / "old/pytorch_model.bin")
    monkeypatch.setattr(export, "BUFFER_BYTES", 160)
    sizes: list[int] = []
    write = export.FileWriter.write
    monkeypatch.setattr(export.FileWriter, "write", lambda self, data: (sizes.append(data.numel()), write(self, data)))
    convert(tmp_path / "old", tmp_path / "new", allow_pickle=True)
    assert max(sizes) == 40 and sum(sizes) == 4000
    assert torch.equal(load_file(tmp_path / "new/model.safetensors")["w"], torch.arange(4.0).expand(1000, 4))
