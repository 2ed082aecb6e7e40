"""The benchmark compares like with like, and says which process failed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from orchestrator.bench import __main__ as bench
from orchestrator.bench import case as bench_case
from orchestrator.bench import sharing
from orchestrator.bench.case import Case, Measured
from orchestrator.bench.peer import real, unshifted
from orchestrator.bench.sharing import Swept
from orchestrator.errors import ResourceError
from parallel.engine import IGNORED_LABEL, MicroBatch

N = IGNORED_LABEL


def batch() -> MicroBatch:
    """A row of 4 tokens, learned from the third on, and a row of 3 tokens with 1 of padding."""
    return MicroBatch(torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0]]), torch.tensor([[N, 7, 8, N], [6, 7, N, N]]), (0, 1))


def test_the_other_side_gets_the_same_labels_and_no_padding() -> None:
    assert unshifted(batch().labels).tolist() == [[N, N, 7, 8], [N, 6, 7, N]]
    assert real(batch()).tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert bench_case.real_tokens(batch()) == 7


def test_peak_memory_is_what_was_touched() -> None:
    program = "from orchestrator.bench.case import peak_bytes as p; a = p(); b = b'x' * (80 << 20); print(p() - a)"
    grown = int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout)
    assert 75 << 20 < grown < 90 << 20


def test_a_process_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOTRAIN_CACHE", "/nowhere")
    case = Case("ours", "fp32", "all", threads=1, model="/nowhere/model")
    with pytest.raises(ResourceError, match=r"process ours fp32 all ended with 1: .*/nowhere/model") as caught:
        bench.measured(case)
    assert "python -m orchestrator.bench.case" in caught.value.hint


def test_a_run_that_never_steps_is_an_error(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process.wait()
    with pytest.raises(ResourceError, match=r"no first step after .* s: isotrain train ended with 3"):
        bench._until_lines(tmp_path / "metrics.jsonl", process, time.perf_counter())


def test_sides_take_turns_and_medians_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def fake(case: Case) -> Measured:
        seen.append(case.side)
        speed = {"theirs": 100.0, "ours": 120.0 + 1000 * (len(seen) == 2)}[case.side]
        return Measured(speed, 10**9, 1.0, (2.0, 1.0))

    monkeypatch.setattr(bench, "measured", fake)
    rows = bench.compare(rounds=3, threads=1, steps=1)
    assert seen == ["theirs", "ours"] * 12
    assert [(row.precision, row.labels) for row in rows] == [
        ("fp32", "all"), ("fp32", "assistant"), ("bf16", "all"), ("bf16", "assistant"),
    ]  # fmt: skip
    assert all(row.speed_ratio == pytest.approx(1.2) and row.loss_gap == 0 for row in rows)


def test_the_page_gets_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench, "measured", lambda case: Measured(100.0, 10**9, 1.0, (2.0,)))
    mark, page = bench.MARK.format(name="train"), tmp_path / "page.md"
    page.write_text(f"before\n{mark}\nold\n{mark}\nafter\n")
    assert bench.main(["train", "--rounds", "1", "--json", "--write", str(page)]) == 0
    assert [row["speed_ratio"] for row in json.loads(capsys.readouterr().out)["rows"]] == [1.0] * 4
    text = page.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert "| bf16 | assistant | 100 | 100 | 1.00 | 1000 | 1000 | 1.00 | 0e+00 |" in text


def test_ways_to_run_a_sweep_are_compared_by_medians_and_their_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([8.0, 6.0, 2.0, 9.0, 5.0, 3.0, 10.0, 7.0, 1.0])
    monkeypatch.setattr(sharing, "swept", lambda words, steps, threads: Swept(next(times), 4.0, 2_000_000, ((2.0,),)))
    sides = sharing.measure(3, steps=5, threads=2)
    assert [side.wall_s for side in sides] == [9.0, 6.0, 2.0] and {side.loss_gap for side in sides} == {0.0}
    text = sharing.table(sides, 3, 5, 2)
    assert "| in turns on one base (`sweep.share_base=true`) | 2.0 | 0.22 | 4.0 | 1.00 | 2 | 0e+00 |" in text


@pytest.mark.parametrize(("asked", "threads"), [([], 3), (["--threads", "5"], 5)])
def test_all_ways_to_run_a_sweep_have_the_threads_that_two_at_once_can_have(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, asked: list[str], threads: int
) -> None:
    found: list[int] = []

    def swept(words: Sequence[str], steps: int, threads: int) -> Swept:
        found.append(threads)
        return Swept(1.0, 4.0, 2_000_000, ((2.0,),))

    monkeypatch.setattr(sharing, "swept", swept)
    monkeypatch.setattr(bench, "usable_cores", lambda: 6)
    assert bench.main(["share", "--rounds", "1", *asked]) == 0
    assert found == [threads] * 3 and f"SmolLM2-135M, {threads} threads a rank" in capsys.readouterr().out


def test_a_sweep_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "WORDS", ("model.path=/nowhere", "seed=0,1"))
    with pytest.raises(ResourceError, match=r"the sweep ended with 64: ") as caught:
        sharing.swept((), 1, 1)
    assert caught.value.hint.startswith("isotrain sweep model.path=/nowhere seed=0,1 steps=1")
