"""One step, learned from or refused: what the job wants done about a loss that is no number, or a spike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.distributed as dist

from orchestrator.anomalies import Anomalies, note_rewind
from orchestrator.checkpoint.folder import step_name
from orchestrator.checkpoint.saver import Saver
from orchestrator.errors import GaveUp, Rewound
from orchestrator.runs import latest_step
from orchestrator.saving import attempt
from orchestrator.training import Cursor, Run
from parallel.engine import MicroBatch, StepResult


def learn(run: Run, anomalies: Anomalies, batches: Sequence[MicroBatch], rate: float, step: int) -> StepResult:
    """One step. What should not be learned from is computed once more: a fault of a machine does not come again."""
    result = run.engine.train_step(batches, rate, anomalies.accepts)
    anomaly = anomalies.found(result.loss, result.grad_norm)
    if anomaly is not None and result.applied:
        run.say(f"step {step}: {anomaly.words}; anomalies.spike=warn: learned from all the same")
    elif anomaly is not None:
        result = run.engine.train_step(batches, rate, anomalies.accepts)
        if result.applied:
            words = f"computed again, the loss is {result.loss:g}: a machine erred, not the data"
            run.say(f"step {step}: {anomaly.words}; {words}")
    if result.applied:
        anomalies.learned(result.loss)
    return result


def skip_or_leave(run: Run, anomalies: Anomalies, saver: Saver, result: StepResult, done: Cursor) -> None:
    """Say what is done about a step that nothing was learned from; what is not skipped ends here.

    Raises:
        GaveUp: the job says to stop, or too many steps in a row were skipped. Rewound: it says to go back.
    """
    anomaly = anomalies.found(result.loss, result.grad_norm)
    assert anomaly is not None
    words = f"step {done.steps}: {anomaly.words}"
    if anomaly.policy == "rewind":
        attempt(run, saver.last_step, saver.finish)
        step = latest_step(run.run_dir) or 0
        if run.metrics is not None:
            note_rewind(run.run_dir, step, done.samples)
        dist.barrier(group=run.cpu_group)  # nobody leaves before it is written
        raise Rewound(
            f"{words}; back to step {step}, and on with sample {done.samples + 1}",
            f"{_with_smaller_rate(run)}   (goes on from the newest checkpoint)",
        )
    if anomaly.policy == "stop" or anomalies.skipped_too_many():
        limit = run.job.anomalies.limit
        after = f"after {limit} steps skipped in a row" if limit else "and no step may be skipped"
        many = "" if anomaly.policy == "stop" else f", {after} (anomalies.limit={limit})"
        may_be_damaged = not (anomalies.has_learned or math.isfinite(result.loss))
        raise _give_up(run, f"{words}{many}; nothing of this step was saved", may_be_damaged)
    run.say(f"{words}; skipped: nothing is learned from it")


def _give_up(run: Run, words: str, may_be_damaged: bool) -> GaveUp:
    """A smaller rate helps where steps before were well; not where what was loaded is the cause."""
    again = _with_smaller_rate(run)
    newest = latest_step(run.run_dir)
    if not may_be_damaged or not newest:
        more = "goes on from the newest checkpoint; without one: isotrain train with that and another run_dir"
        return GaveUp(words, f"{again}   ({more})")
    folder = run.run_dir / "checkpoints" / step_name(newest)
    return GaveUp(
        f"{words}; no step since the start was well: step {newest} may have spoilt the weights that were loaded",
        f"rm -r {folder} && {again}   (goes on from the checkpoint before; without one: isotrain train with that and "
        "another run_dir)",
    )


def _with_smaller_rate(run: Run) -> str:
    return f"isotrain resume {run.run_dir} optimizer.lr={run.job.optimizer.lr / 10:g}"
