"""The catalogue of devices: every kind of the rows, each figure with its source, and errors that name the nearest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from orchestrator.errors import ConfigError
from orchestrator.planning.devices import CATALOGUE, catalogue, device

CLUSTERS = Path(__file__).parents[2] / "configs" / "cluster"


def test_every_figure_has_a_source_and_every_source_is_used() -> None:
    text = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))
    used = set()
    for kind, figures in text["devices"].items():
        for name, value in figures.items():
            if name not in ("aliases", "calibrated") and value is not None:
                assert len(value) == 2 and value[1] in text["sources"], f"{kind}.{name}"
                used.add(value[1])
    assert used | {"dgxc"} == set(text["sources"])
    assert all(one.sources["memory_gb"] for one in catalogue().values())


def test_best_measured_rates_are_below_the_peak() -> None:
    for one in catalogue().values():
        assert one.memory_bytes > 0 and one.memory_rate > 0 and one.link_rate > 0 and one.domain >= 1
        for precision, rate in one.best.items():
            assert rate <= one.peaks[precision], (one.kind, precision)
            assert one.matmul_rate(precision) == rate


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ("A100", "A100-80GB"),
        ("h100", "H100-80GB"),
        ("RTX 4090", "RTX-4090"),
        ("rtx-4090", "RTX-4090"),
        ("v100", "V100-32GB"),
    ],
)
def test_a_kind_is_found_by_its_aliases(asked: str, kind: str) -> None:
    assert device(asked).kind == kind


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=re.escape("cluster.gpu=H2000 is not in the catalogue of devices")) as caught:
        device("H2000")
    assert caught.value.hint == "cluster.gpu=H200"
    with pytest.raises(ConfigError) as caught:
        device("?")
    assert caught.value.hint == "cluster.gpu=H100-80GB"


def test_precisions_fall_back_to_units_that_the_device_has() -> None:
    assert device("V100").precision("bf16") == "fp16"
    assert device("L40S").precision("nvfp4") == "fp8"
    assert device("cpu").precision("fp8") == "bf16"
    assert device("GB300").matmul_rate("bf16") == pytest.approx(0.8 * 2500e12)


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_cluster_of_gpus_names_a_kind(path: Path) -> None:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert (values["gpu"] is None) == (values["device"] in ("cpu", "auto"))
    assert values["gpu"] is None or values["memory_gib"] < device(values["gpu"]).memory_bytes / 1e9
