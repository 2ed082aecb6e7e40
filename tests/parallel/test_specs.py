"""Spec promises: a folder's config.json is read, and a cluster counts its ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parallel.specs import ClusterSpec, SpecError, read_hf_config

CONFIG = {"model_type": "llama", "hidden_size": 24}


def test_a_config_is_read_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    assert read_hf_config(tmp_path) == CONFIG


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no model folder: it has no config.json"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[]", "holds no JSON object"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(SpecError, match=message):
        read_hf_config(tmp_path)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpecError, match="cannot be read as JSON"):
        read_hf_config(tmp_path / "file")


def test_a_cluster_counts_its_ranks() -> None:
    assert ClusterSpec("pair", nodes=2, gpus_per_node=8).ranks == 16
