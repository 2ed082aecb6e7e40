"""Versions, what torch was built for, and the libraries that make a run faster where they are there."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from orchestrator.config.job import ClusterConfig
from orchestrator.detection.host import Accelerators
from orchestrator.doctor.finding import Finding, State

CHECKOUT = Path(__file__).resolve().parents[2]
ROWS = ("torch", "megatron-core")  # the other libraries share a row while nothing is wrong with them
PYTHON = ">=3.11,<3.12"
# the versions that megatron-core 0.16.1 names in its own metadata
TRANSFORMER_ENGINE = "pip install --no-build-isolation 'transformer_engine[pytorch]>=2.9,<2.12'"
BITSANDBYTES = "pip install bitsandbytes"


@dataclass(frozen=True)
class Versions:
    """``found``: None where it is not installed. ``asked``: the ranges of our own metadata. ``pinned``: what is tested,
    known in a checkout only."""

    found: dict[str, str | None]
    asked: dict[str, str]
    pinned: dict[str, str]


def seen_versions() -> Versions:
    """The versions of this environment, and those that isotrain asks for."""
    from packaging.requirements import Requirement

    file = CHECKOUT / "constraints.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("isotrain") or []]
    except importlib.metadata.PackageNotFoundError:
        wanted = []
    asked = {one.name: str(one.specifier) for one in wanted if one.marker is None}
    names = ("isotrain", *(asked or ROWS))
    return Versions({name: _installed(name) for name in names}, asked, pinned)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python(found: str | None = None) -> Finding:
    """Whether this Python is one that isotrain runs on.

    Example:
        >>> check_python("3.12.1").state, check_python("3.11.9").state
        ('fault', 'ok')
    """
    from packaging.specifiers import SpecifierSet

    found = found or platform.python_version()
    if SpecifierSet(PYTHON).contains(found):
        return Finding("python", "ok", found)
    return Finding("python", "fault", f"{found}, but isotrain runs on {PYTHON}", "make setup PYTHON=python3.11")


def check_versions(versions: Versions) -> list[Finding]:
    """A row for isotrain, torch and megatron-core each, one for all other libraries that are right, and one for each
    that is not."""
    ours = versions.found.get("isotrain")
    mine = (
        Finding("isotrain", "ok", ours)
        if ours
        else Finding("isotrain", "warning", f"not installed: it runs from {CHECKOUT}", "make setup")
    )
    rows = [check_version(name, versions) for name in versions.found if name != "isotrain"]
    alone = [row for row in rows if row.subject in ROWS or row.state != "ok"]
    right = [f"{row.subject} {versions.found[row.subject]}" for row in rows if row not in alone]
    return [mine, *alone, *([Finding("libraries", "ok", ", ".join(right))] if right else [])]


def check_version(name: str, versions: Versions) -> Finding:
    """One library against the range that isotrain asks for (a fault) and the version it is tested with (a warning).

    Example:
        >>> check_version("torch", Versions({"torch": "2.8"}, {"torch": ">=2.9"}, {})).hint
        "pip install 'torch>=2.9'"
    """
    from packaging.specifiers import SpecifierSet

    found, asked, pinned = versions.found[name], versions.asked.get(name, ""), versions.pinned.get(name)
    install = "make setup" if versions.pinned else f"pip install '{name}{asked}'"
    if found is None:
        return Finding(name, "fault", "not installed", install)
    if not SpecifierSet(asked).contains(found, prereleases=True):
        return Finding(name, "fault", f"{found}, but isotrain asks for {asked}", install)
    if pinned and found != pinned:
        return Finding(name, "warning", f"{found}; isotrain is tested with {pinned}", install)
    return Finding(name, "ok", found)


def check_cuda(seen: Accelerators, cluster: ClusterConfig, is_elsewhere: bool) -> Finding:
    """Whether torch's build, its NCCL and the driver fit each other and the cluster.

    Args:
        is_elsewhere: ranks will run on other machines than this one, so that no driver is needed here.
    """
    if cluster.device != "cuda":
        kind = f"CUDA {seen.build}" if seen.build else "CPUs only"
        return Finding("CUDA", "ok", f"not used by cluster={cluster.name}; torch is built for {kind}")
    if seen.build is None:
        words = f"this torch is built for CPUs only, but cluster={cluster.name} computes on CUDA"
        if cluster.slurm.prologue:
            words += "; ranks have the environment of cluster.slurm.prologue"
            return Finding("CUDA", "warning", words, on_nodes(cluster))
        return Finding("CUDA", "fault", words, "cluster=laptop   or torch for CUDA: README.md, CUDA")
    driver = f"driver {seen.driver}" if seen.driver else "no driver"
    if is_elsewhere:
        return Finding("CUDA", "warning", f"torch is built for CUDA {seen.build}; drivers of nodes", on_nodes(cluster))
    if not seen.names:
        return Finding("CUDA", "fault", f"CUDA {seen.build}, {driver}: {seen.reason or 'no device'}", "nvidia-smi")
    if not seen.nccl:
        return Finding("CUDA", "fault", f"this torch (CUDA {seen.build}) is built without NCCL", "make setup")
    return Finding("CUDA", "ok", f"CUDA {seen.build}, NCCL {seen.nccl}, {driver}")


def check_devices(seen: Accelerators, cluster: ClusterConfig, is_elsewhere: bool) -> Finding:
    """The cluster's devices against those that torch sees: how many, which kind, and their memory."""
    from orchestrator.planning.devices import device, seen_device

    if cluster.device != "cuda":
        return Finding("devices", "ok", f"cluster={cluster.name} asks for none")
    asked = f"{cluster.gpus_per_node} x {cluster.gpu or 'GPU'}"
    if is_elsewhere:
        return Finding("devices", "warning", f"{asked} per node: only nodes can tell", on_nodes(cluster))
    there = len(seen.names)
    if there < cluster.gpus_per_node:
        hint = f"cluster.gpus_per_node={there}" if there else "cluster=laptop"
        return Finding("devices", "fault", f"cluster={cluster.name} has {asked} per node, torch sees {there}", hint)
    smallest = min(seen.memory_gib)
    if cluster.memory_gib > smallest:
        words = f"cluster.memory_gib={cluster.memory_gib:g}, but {seen.names[0]} has {smallest:.1f} GiB"
        return Finding("devices", "warning", words, f"cluster.memory_gib={smallest - 1.5:.0f}")
    kind, is_known = seen_device(seen.names[0], smallest)
    if cluster.gpu and is_known and device(cluster.gpu).kind != kind.kind:
        words = f"cluster.gpu={cluster.gpu}, but torch sees {seen.names[0]}: times are estimated for the former"
        return Finding("devices", "warning", words, f"cluster.gpu={kind.kind}")
    return Finding("devices", "ok", f"{there} x {seen.names[0]}, {smallest:.1f} GiB")


def on_nodes(cluster: ClusterConfig, *words: str) -> str:
    """How to ask every node of a cluster the same.

    Example:
        >>> on_nodes(ClusterConfig("big", nodes=4), "run_dir=runs/x")
        'srun --nodes=4 --ntasks-per-node=1 --label isotrain doctor cluster=big run_dir=runs/x'
    """
    asked = shlex.join(["isotrain", "doctor", f"cluster={cluster.name}", *words])
    return f"srun --nodes={cluster.nodes} --ntasks-per-node=1 --label {asked}"


def seen_libraries() -> dict[str, bool]:
    """Which optional libraries are installed."""
    return {name: find_spec(name) is not None for name in ("transformer_engine", "apex", "bitsandbytes")}


def check_fast_paths(there: Mapping[str, bool], device: str, quantise: str | None) -> list[Finding]:
    """Which optional libraries a run would use, and the line that installs those it lacks.

    transformer-engine brings attention, norms and a fused optimizer on CUDA (``parallel/provider.py``; megatron-core's
    optimizer), apex the optimizer where the former is not there, bitsandbytes the dequantisation of an NF4 base.

    Example:
        >>> [(one.subject, one.state) for one in check_fast_paths({}, "cpu", "nf4")]
        [('transformer-engine', 'ok'), ('bitsandbytes', 'warning')]
    """
    findings = []
    if device != "cuda":
        findings.append(Finding("transformer-engine", "ok", "for CUDA; not used on a CPU"))
    elif there.get("transformer_engine"):
        error = _import_error("transformer_engine.pytorch")
        words = f"installed, and cannot be imported: {error}" if error else "on: attention, norms, optimizer"
        state: State = "fault" if error else "ok"
        hint = "pip uninstall --yes transformer_engine" if error else ""
        findings.append(Finding("transformer-engine", state, words, hint))
    else:
        optimizer = "apex's" if there.get("apex") else "torch's"
        words = f"missing: torch's attention and norms, {optimizer} optimizer"
        findings.append(Finding("transformer-engine", "warning", words, TRANSFORMER_ENGINE))
    if quantise == "nf4" and there.get("bitsandbytes"):
        findings.append(Finding("bitsandbytes", "ok", "on: NF4 is unpacked by its kernels"))
    elif quantise == "nf4":
        findings.append(Finding("bitsandbytes", "warning", "missing: NF4 is unpacked by torch", BITSANDBYTES))
    return findings


def _import_error(name: str) -> str:
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""
