"""Save, load and reshard on one state and one disk: what the tables of docs/checkpoints.md are made by."""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.pool import Pool

RANKS = 2
PLACE = Path("runs")  # on the disk that runs are on
CALL_LIMIT_S = 600
WHAT = ("save", "load", "reshard")


@dataclass(frozen=True)
class Measured:
    """One side's seconds, a value per round."""

    side: str
    save_s: tuple[float, ...]
    load_s: tuple[float, ...]
    reshard_s: tuple[float, ...]


@dataclass(frozen=True)
class Costs:
    """What parts of our save cost, medians in seconds.

    ``hash_s``: sha256 of the state twice (tensors and files) on the ranks' cores; ``readback_s``: what reading back
    adds to a save; ``stall_s``: how long an asynchronous save holds training up; ``save_s``: a save that training
    waits for.
    """

    hash_s: float
    readback_s: float
    stall_s: float
    save_s: float


def measure(rounds: int, layers: int, width: int) -> tuple[list[Measured], Costs, int]:
    """Let the sides take turns; returns their times, the costs, and the bytes of the state."""
    from orchestrator.bench.checkpoint_sides import SIDES, Shape

    shape = Shape(layers, width)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    pool = Pool(RANKS)
    try:
        PLACE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=PLACE) as place:
            for number in range(rounds):
                for side in SIDES:
                    folder = Path(place) / "state"
                    found[side].append(pool.run(RANKS, one_side, side, folder, shape, timeout_s=CALL_LIMIT_S)[0])
                    shutil.rmtree(folder)
                    shutil.rmtree(folder.with_name("warm-up"))
                    said = " ".join(f"{what} {found[side][-1][what]:.2f} s" for what in WHAT)
                    print(f"round {number + 1}/{rounds} {side}: {said}", file=sys.stderr, flush=True)
            parts = pool.run(RANKS, our_costs, Path(place) / "costs", shape, rounds, timeout_s=CALL_LIMIT_S)[0]
    finally:
        pool.leave()  # orderly: megatron-core has started a process of its own in each
    rows = [Measured(side, *(tuple(each[what] for each in found[side]) for what in WHAT)) for side in SIDES]
    return rows, Costs(**parts), shape.bytes


def one_side(side: str, folder: Path, shape: Any) -> dict[str, float]:
    """A rank of one side: save, load into fresh memory, load cut along the other axis; values are checked."""
    import torch

    from orchestrator.bench.checkpoint_sides import SIDES, Cut, Shape, forget, local_state, seconds

    this, small = SIDES[side](), Shape(1, 8)
    warm_up = local_state(small, Cut(0), fill=True)  # what a library imports and starts once is not what is measured
    this.save(folder.with_name("warm-up"), warm_up, small, Cut(0))
    this.load(folder.with_name("warm-up"), warm_up, small, Cut(0))
    state = local_state(shape, Cut(0), fill=True)
    times = {"save": seconds(lambda: this.save(folder, state, shape, Cut(0)))}
    for what, cut in (("load", Cut(0)), ("reshard", Cut(1))):
        forget(folder)
        there = local_state(shape, cut, fill=False)
        for data in there.values():
            data.zero_()  # so that no side pays for the pages
        if side.startswith("plain") and what == "reshard":
            times[what] = float("nan")
            continue
        times[what] = seconds(lambda there=there, cut=cut: this.load(folder, there, shape, cut))  # type: ignore[misc]
        expected = local_state(shape, cut, fill=True)
        wrong = [key for key, data in there.items() if not torch.equal(data, expected[key])]
        if wrong:
            raise ValueError(f"{side} {what}: {len(wrong)} tensors are not what was saved, first {wrong[0]}")
    return times


def our_costs(folder: Path, shape: Any, rounds: int) -> dict[str, float]:
    """A rank that times the parts of our save."""
    import hashlib

    import torch.distributed as dist

    from orchestrator.bench.checkpoint_sides import Cut, Ours, local_state, seconds
    from orchestrator.checkpoint.publish import Contents
    from orchestrator.checkpoint.save import SavePolicy
    from orchestrator.checkpoint.saver import Saver

    state = local_state(shape, Cut(0), fill=True)
    shards = Ours().shards(state, shape, Cut(0))
    contents = Contents("model", {"step": 1}, {"config.json": b"{}"})

    def hashed() -> None:
        for data in state.values():
            content: Any = data.numpy()
            for _ in range(2):
                hashlib.sha256(memoryview(content).cast("B")).hexdigest()

    found: dict[str, list[float]] = {"hash_s": [], "plain": [], "readback": [], "stall_s": []}
    group = dist.new_group(backend="gloo")
    with Saver(folder / "beside", SavePolicy(readback=False), group, asynchronous=True) as beside:
        beside.prepare(shards, contents)
        for step in range(1, rounds + 2):
            found["hash_s"].append(seconds(hashed))
            for name in ("plain", "readback"):
                saver = Saver(folder / name, SavePolicy(readback=name == "readback"))
                saver.prepare(shards, contents)
                found[name].append(seconds(lambda saver=saver, step=step: saver.save(step, shards, contents)))  # type: ignore[misc]
            dist.barrier()
            began = time.perf_counter()
            beside.save(step, shards, contents)
            found["stall_s"].append(time.perf_counter() - began)
            beside.finish()
            dist.barrier()
            if dist.get_rank() == 0:
                for name in ("plain", "readback"):
                    shutil.rmtree(folder / name)
    medians = {name: statistics.median(values[1:]) for name, values in found.items()}  # the first makes buffers
    plain, readback = medians.pop("plain"), medians.pop("readback")
    return {**medians, "save_s": plain, "readback_s": readback - plain}


def table(rows: list[Measured], costs: Costs, state_bytes: int) -> str:
    """The times as a markdown table, with the ratio to the faster peer."""
    peers = [row for row in rows if "isotrain" not in row.side and "plain" not in row.side]
    lines = [
        f"{state_bytes / 1e9:.2f} GB (fp32 weights and two moments), {RANKS} processes on one disk; medians of "
        f"{len(rows[0].save_s)} rounds, in which the sides took turns.",
        "",
        "| | save s | load s | reshard s |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [statistics.median(values) for values in (row.save_s, row.load_s, row.reshard_s)]
        lines.append(f"| {row.side} | " + " | ".join("" if cell != cell else f"{cell:.2f}" for cell in cells) + " |")
    ours = rows[0]
    ratios = [
        min(statistics.median(getattr(peer, f"{what}_s")) for peer in peers)
        / statistics.median(getattr(ours, f"{what}_s"))
        for what in WHAT
    ]
    lines.append("| times as fast as the faster peer | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    stall = costs.stall_s / costs.save_s
    lines += [
        "",
        f"Of our save of {costs.save_s:.2f} s (ranks agreed before): both hashes alone take {costs.hash_s:.2f} s. "
        f"Reading back adds {costs.readback_s:.2f} s. An asynchronous save holds training up for "
        f"{costs.stall_s:.3f} s, {stall:.0%} of it.",
    ]
    return "\n".join(lines)
