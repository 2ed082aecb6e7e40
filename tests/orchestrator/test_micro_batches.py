"""``batch.micro_sequences=auto``: larger while that is faster and memory is idle, smaller where memory runs out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launch.exits import RankExit
from launch.stop import StopRequest
from orchestrator.commands import plan_job
from orchestrator.config.loading import compose_job
from orchestrator.errors import ConfigError, ExitCode
from orchestrator.loop import train
from orchestrator.micro_batches import MicroBatches, Size, read_size, smaller, write_size
from orchestrator.recovery import run_ranks
from orchestrator.runs import write_run
from orchestrator.training import Cursor
from parallel.engine import Accepts, MicroBatch, StepResult, always
from tests.orchestrator.test_loop import CountingEngine, make_run

GIB = 2**30


def sizes(paces: dict[int, float], memory_gib: float = 100.0, start: int = 1, steps: int = 15) -> list[int]:
    """The size of every step, where a step of each size takes so many seconds and a row needs 1 GiB."""
    micro, used = MicroBatches([1, 2, 4, 8], Size(start), memory_gib * GIB), []
    for _ in range(steps):
        rows = micro.size.rows
        used.append(rows)
        micro.heard(paces[rows], rows * GIB, tokens=100)
    assert micro.size.settled
    return used


@pytest.mark.parametrize(
    ("paces", "used"),
    [
        ({1: 4.0, 2: 3.0, 4: 2.0, 8: 1.0}, [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8, 8, 8, 8]),
        ({1: 4.0, 2: 3.0, 4: 2.95, 8: 1.0}, [1, 1, 1, 2, 2, 2, 4, 4, 4, 2, 2, 2, 2, 2, 2]),  # hardly faster
        ({1: 4.0, 2: 5.0, 4: 1.0, 8: 1.0}, [1, 1, 1, 2, 2, 2, *[1] * 9]),
    ],
)
def test_larger_ones_are_tried_while_they_are_faster(paces: dict[int, float], used: list[int]) -> None:
    assert sizes(paces) == used


def test_what_memory_has_no_room_for_is_not_tried() -> None:
    assert sizes({1: 4.0, 2: 3.0, 4: 2.0, 8: 1.0}, memory_gib=4.2) == [1, 1, 1] + [2] * 12  # 4 rows would fill 95%


def test_the_first_step_of_a_size_does_not_count() -> None:
    micro = MicroBatches([1, 2], Size(1), 100 * GIB)
    seconds = [9.0, 4.0, 4.0, 9.0, 3.0, 3.0]
    for step_s in seconds:
        micro.heard(step_s, GIB, 100)
    assert micro.size == Size(2, settled=True)


def test_a_found_size_is_kept_and_taken_up_where_it_is_legal(tmp_path: Path) -> None:
    assert read_size(tmp_path, [1, 2], 1) == Size(1) and read_size(tmp_path, [], 3) == Size(3, settled=True)
    write_size(tmp_path, Size(4, settled=True))
    assert read_size(tmp_path, [1, 2, 4], 1) == Size(4, settled=True)
    assert read_size(tmp_path, [1, 2], 2) == Size(2)  # on another topology
    assert smaller(tmp_path, [1, 2, 4], 1) == 2 and smaller(tmp_path, [1, 2, 4], 1) == 1
    assert smaller(tmp_path, [1, 2, 4], 1) is None and read_size(tmp_path, [1, 2, 4], 4) == Size(1, settled=True)


def test_the_plan_tells_the_sizes_and_the_same_batch_is_planned() -> None:
    words = ["model=smollm2_135m", "cluster=laptop", "batch.global_sequences=24", "topology.dp=2"]
    auto, plain = (plan_job(compose_job([*words, more])).plan for more in ("batch.micro_sequences=auto", "seed=0"))
    assert auto.micro_choices == (1, 2, 3, 4, 6, 12) and plain.micro_choices == ()
    assert auto.micro_sequences == plain.micro_sequences and auto.topology == plain.topology


@pytest.mark.parametrize("value", ["0", "automatic"])
def test_other_words_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="should be at least 1, or auto") as caught:
        compose_job([f"batch.micro_sequences={value}"])
    assert caught.value.hint == "batch.micro_sequences=auto"


def test_where_the_size_changes_the_run_it_is_not_looked_for() -> None:
    words = ["model=qwen3_30b_a3b", "cluster=h100x8", "tuner.targets=[q_proj]", "batch.micro_sequences=auto"]
    with pytest.raises(ConfigError, match=r"batch\.micro_sequences=auto changes the run") as caught:
        plan_job(compose_job([*words, "experts.capacity_factor=2"]))
    assert caught.value.hint == "batch.micro_sequences=1"


@dataclass
class Hungry(CountingEngine):
    """An engine that has no memory for more than so many rows at once; notes the rows of every step."""

    most_rows: int = 100
    rows: list[int] = field(default_factory=list)

    def train_step(
        self, microbatches: Sequence[MicroBatch], learning_rate: float, accepts: Accepts = always
    ) -> StepResult:
        self.rows.append(len(microbatches[0].sample_ids))
        if self.rows[-1] > self.most_rows:
            raise MemoryError("out of memory: tried to allocate 2.00 GiB")
        return super().train_step(microbatches, learning_rate, accepts)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def auto_run(folder: Path, engine: CountingEngine) -> Any:
    """A run of two rows a step, which may be one or two micro-batches."""
    run = make_run(folder, engine, steps=12)
    run.plan.micro_choices, run.plan.cluster = (1, 2), type("Cluster", (), {"memory_gib": 1000.0})()  # type: ignore[misc]
    return run


def test_a_run_tries_a_larger_size_in_its_first_steps(
    tmp_path: Path, one_rank: None, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Hungry()
    assert train(auto_run(tmp_path, engine), Cursor(), StopRequest()) == ExitCode.DONE
    assert engine.rows[:6] == [1, 1, 1, 2, 2, 2] and len(set(engine.rows[6:])) == 1
    assert sorted(engine.samples) == list(range(24))  # whatever the size, the same samples
    assert "step 3: batch.micro_sequences=2 is tried\n" in capsys.readouterr().err
    assert read_size(tmp_path, (1, 2), 1) == Size(engine.rows[-1], settled=True)


@dataclass(frozen=True)
class End:
    code: int
    cause: RankExit | None


def test_out_of_memory_starts_the_ranks_again_with_less(
    tmp_path: Path, one_rank: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model=smollm2_135m", "cluster=one", "batch.global_sequences=2", "batch.micro_sequences=auto"]
    planned = plan_job(compose_job(words))
    assert planned.plan.micro_choices == (1, 2)
    write_run(tmp_path, planned.job, planned.plan.to_json())
    engine, said = Hungry(most_rows=1), list[str]()

    def start(attempt: int) -> End:
        run = auto_run(tmp_path, engine)
        steps = engine.optimizer_steps - engine.optimizer_steps % 2  # what is saved
        engine.optimizer_steps = steps
        try:
            code = train(run, Cursor(steps, 2 * steps), StopRequest())
        except MemoryError as error:
            return End(71, RankExit(0, 71, "OutOfMemory", str(error), "", None, 0.0))
        return End(code, None)

    end, given_up = run_ranks(start, tmp_path, 3, said.append, lambda end: False)
    assert (end.code, given_up) == (0, "") and engine.rows[3] == 2 and set(engine.rows[4:]) == {1}
    assert said == [
        "out of memory: tried to allocate 2.00 GiB; starting again from step 2 with batch.micro_sequences=1"
    ]
