"""What a node sees of itself: its GPUs and their errors, the run folder, its clock."""

from __future__ import annotations

import multiprocessing
import re
import subprocess
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from orchestrator.doctor.folder import FolderSeen, seen_folder
from orchestrator.probing.report import Asked, Report, asked_file, read_asked, reports_folder

ECC = ("ecc.errors.uncorrected.volatile.total", "remapped_rows.pending", "remapped_rows.failure")
"""Of ``nvidia-smi --help-query-gpu``: since the driver was loaded; waiting for a reset; out of spare rows."""
XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
BROKEN = {
    48: "double bit ECC error",
    62: "internal micro-controller halt",
    64: "row remapping failure",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    95: "uncontained ECC error",
    119: "GSP timeout",
    120: "GSP error",
    140: "unrecovered ECC error",
}
"""Those of NVIDIA's "Xid Errors" that are the hardware's; others (13, 31, 43, 45, ...) are a program's."""
ERRORS = ("ECC", "XID")
"""Kinds of errors that are looked for; what could not be read of them begins with its name."""
TRIES = 2
ANSWER_S = 30.0


def look(run_dir: Path, node: str, asked: Asked) -> Report:
    """Everything that a node can tell without the others.

    Args:
        asked: as the first node has read it; this node has to find the same in the run folder.
    """
    report = _with_folder(run_dir, Report(node, asked.token))
    return _with_gpus(report, asked) if asked.device == "cuda" else report


def _with_folder(run_dir: Path, report: Report) -> Report:
    file = asked_file(run_dir)
    try:
        there = read_asked(file.read_text(encoding="utf-8")).token
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = error.strerror if isinstance(error, OSError) else "is no request"
        return replace(report, folder_error=f"{file} cannot be read: {why}")
    if there != report.token:
        return replace(report, folder_error=f"{file} is another one than on the first node")
    return judged_folder(report, [seen_folder(reports_folder(run_dir)) for _ in range(TRIES)])


def judged_folder(report: Report, tries: list[FolderSeen]) -> Report:
    """With the best of some tries: a neighbour may have written just then.

    Example:
        >>> folder = Path("/runs")
        >>> tries = [FolderSeen(folder, rate_mb_s=9.0), FolderSeen(folder, rate_mb_s=90.0)]
        >>> judged_folder(Report("n1"), tries).write_mb_s
        90.0
    """
    best = max(tries, key=lambda one: one.rate_mb_s)
    if best.error:
        return replace(report, folder_error=f"{best.folder} cannot be written: {best.error}")
    return replace(report, write_mb_s=best.rate_mb_s, free_gib=best.free_gib)


def _with_gpus(report: Report, asked: Asked) -> Report:
    names, smallest, error = _seen_gpus(asked.patience_s)
    faults, unread = gpu_faults()
    return replace(report, gpus=names, gpu_gib=smallest, gpu_error=error, faults=faults, unread=unread)


def _seen_gpus(patience_s: float) -> tuple[tuple[str, ...], float, str]:
    """Names, memory of the smallest, and why there are none; asked of a process, as a driver may hang."""
    context: Any = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_tell_gpus, args=(theirs,), daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(patience_s / 2):
            return (), 0.0, f"no answer of the driver in {patience_s / 2:.0f} s"
        found: tuple[tuple[str, ...], float, str] = ours.recv()
        return found
    except EOFError:
        return (), 0.0, "the process that asked the driver has died"
    finally:
        child.kill()


def _tell_gpus(to: Connection) -> None:
    from orchestrator.detection.host import seen_accelerators

    seen = seen_accelerators()
    why = "" if seen.build else "this torch is built for CPUs only"
    to.send((seen.names, min(seen.memory_gib, default=0.0), seen.reason or why))


def gpu_faults() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Errors of this node's GPUs that the driver and the kernel tell of, and those kinds that they do not."""
    faults: list[str] = []
    unread: list[str] = []
    said, error = _said(["nvidia-smi", f"--query-gpu=index,{','.join(ECC)}", "--format=csv,noheader,nounits"])
    if error:
        unread.append(f"ECC ({error})")
    else:
        faults += ecc_faults(said)
    said, error = _said(["dmesg"])
    if error:
        unread.append(f"XID ({error})")
    else:
        faults += xid_faults(said)
    return tuple(faults), tuple(unread)


def ecc_faults(table: str) -> list[str]:
    """What nvidia-smi's table says of errors that no program can have made.

    Example:
        >>> ecc_faults("0, 0, No, No\\n1, 3, Yes, No\\n2, [N/A], [N/A], [N/A]\\n")
        ['GPU 1: 3 uncorrected ECC errors', 'GPU 1: rows wait to be remapped (it needs a reset)']
    """
    faults = []
    for line in table.splitlines():
        gpu, errors, pending, failed = [cell.strip() for cell in line.split(",")]
        if errors.isdigit() and int(errors):
            faults.append(f"GPU {gpu}: {errors} uncorrected ECC errors")
        if pending == "Yes":
            faults.append(f"GPU {gpu}: rows wait to be remapped (it needs a reset)")
        if failed == "Yes":
            faults.append(f"GPU {gpu}: no spare rows are left")
    return faults


def xid_faults(log: str) -> list[str]:
    """What the kernel's log says of broken hardware since the node was started; each device and number once.

    Example:
        >>> xid_faults("[1.0] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.\\n"
        ...            "[2.0] NVRM: Xid (PCI:0000:3b:00): 31, pid=7, name=python, MMU Fault\\n")
        ['XID 79 of 0000:3b:00: GPU has fallen off the bus']
    """
    found = {(int(number), device) for device, number in XID.findall(log)}
    return [f"XID {number} of {device}: {BROKEN[number]}" for number, device in sorted(found) if number in BROKEN]


def _said(words: list[str]) -> tuple[str, str]:
    """What a command prints, or why it could not be asked."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=ANSWER_S)
    except FileNotFoundError:
        return "", f"no {words[0]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{words[0]}: {type(error).__name__}"
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return "", lines[-1] if lines else f"{words[0]} ended with {done.returncode}"
    return done.stdout, ""
