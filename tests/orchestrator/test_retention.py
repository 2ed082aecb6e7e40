"""What stays when a checkpoint has been saved: rules that only ever add, and never less than the newest."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.checkpoint.folder import list_steps
from orchestrator.checkpoint.publish import Contents
from orchestrator.checkpoint.retention import Retention, prune
from orchestrator.checkpoint.save import SavePolicy, save
from parallel.shards import Box, Shard

LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: math.nan, 5: 2.5, 6: 1.0}


@given(
    steps=st.lists(st.integers(1, 60), unique=True, min_size=1, max_size=12).map(sorted),
    last=st.integers(0, 4),
    every=st.integers(0, 7),
    best=st.integers(0, 3),
    values=st.dictionaries(st.integers(1, 60), st.floats(allow_nan=True), max_size=12),
)
def test_what_stays_is_the_union_of_the_rules(
    steps: list[int], last: int, every: int, best: int, values: dict[int, float]
) -> None:
    retention = Retention(last, every, best)
    doomed = retention.doomed(steps, values)
    staying = [step for step in steps if step not in doomed]
    assert steps[-1] in staying and list(doomed) == sorted(doomed)
    if not last and not best:
        assert staying == steps
        return
    assert set(staying) >= set(steps[max(0, len(steps) - last) :]) | {s for s in steps if every and s % every == 0}
    judged = sorted((values[step], -step) for step in steps if step in values and math.isfinite(values[step]))
    assert {-step for _, step in judged[:best]} <= set(staying)
    more = best + last + 1 + sum(1 for step in steps if every and step % every == 0)
    assert len(staying) <= more


def save_all(folder: Path, retention: Retention) -> list[int]:
    for step, loss in LOSSES.items():
        shard = Shard("q.lora_A.weight", "weight", (2,), Box((0,), (2,)), torch.ones(2) * step)
        about = {"metrics": {"loss": loss if math.isfinite(loss) else None}}
        save(folder, step, [shard], Contents("adapter", {}, {}, about), policy=SavePolicy(retention))
    return [step for step, _ in list_steps(folder)]


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(), [1, 2, 3, 4, 5, 6]),
        (Retention(last=2), [5, 6]),
        (Retention(last=1, every=2), [2, 4, 6]),
        (Retention(last=1, best=2), [2, 6]),
        (Retention(best=3), [2, 3, 6]),
        (Retention(every=3), [1, 2, 3, 4, 5, 6]),
    ],
)
def test_a_run_leaves_what_its_rules_say(tmp_path: Path, retention: Retention, left: list[int]) -> None:
    assert save_all(tmp_path, retention) == left


def test_a_damaged_checkpoint_counts_for_nothing_and_one_without_a_loss_is_never_the_best(tmp_path: Path) -> None:
    save_all(tmp_path, Retention())
    (tmp_path / "step-000003" / "manifest.json").write_text("{")
    (tmp_path / "step-000006" / "adapter" / "adapter_model.safetensors").write_bytes(b"short")
    shard = Shard("q.lora_A.weight", "weight", (2,), Box((0,), (2,)), torch.ones(2))
    save(tmp_path, 7, [shard], Contents("adapter", {}), policy=SavePolicy(Retention(last=2, best=2)))
    assert [step for step, _ in list_steps(tmp_path)] == [2, 3, 5, 6, 7]


def test_that_nothing_can_be_deleted_ends_no_run(tmp_path: Path) -> None:
    save_all(tmp_path, Retention())
    (tmp_path / "latest").write_text("rubbish")
    prune(tmp_path, 6, Retention(last=1), "token")
    assert len(list_steps(tmp_path)) == 6
