"""``cluster=auto``: what of a cluster nobody has named is found out, on this host or among Slurm's nodes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from launch.environment import slurm_variables, usable_cores
from launch.slurm.allocation import read_allocation
from launch.slurm.commands import SlurmError, partitions
from launch.slurm.nodes import job_share, seen_nodes
from orchestrator.config.job import AUTO, ClusterConfig, JobConfig, SlurmConfig
from orchestrator.detection.host import available_memory_bytes, has_driver, seen_accelerators, seen_nvlinks
from orchestrator.errors import ConfigError
from orchestrator.planning.devices import device, seen_device
from orchestrator.planning.estimate import cluster_device
from orchestrator.planning.profile import profile_file, read_profile
from parallel.specs import ClusterSpec

MOST_RANKS = 4
"""Processes of a node without a GPU, as ``cluster=laptop`` has them; but no more than it has cores."""
GPU_SHARE = 0.95
"""Of a GPU's memory: the driver and nccl take the rest."""


@dataclass(frozen=True)
class Machines:
    """Nodes that are alike. ``memory_gib``: that ranks on a node's CPU may share. ``gpu``: the kind in the words of
    whoever named it; ``gpu_gib``: of one, 0 where nobody said. ``ranks``: per node, 0 where nobody asked for a number.
    ``where``: in words; ``more``: what else is to say."""

    nodes: int
    cores: int
    memory_gib: float
    gpus: int = 0
    gpu: str = ""
    gpu_gib: float = 0.0
    ranks: int = 0
    where: str = "here"
    more: tuple[str, ...] = ()


def found_cluster(asked: ClusterConfig) -> ClusterSpec:
    """The cluster of a job: as it was named, or for ``cluster=auto`` as it is found now; what was typed stays.

    With it the profile of this host, where there is one, it is of these devices, and the cluster is one node and not
    Slurm's.

    Looked at is, in this order: the allocation of Slurm's that this process is in, the partition that
    ``cluster.slurm.partition`` names, this host.

    Raises:
        ConfigError: there is no such partition or no GPU, or Slurm does not answer.
    """
    found = found_machines(asked)
    profile = asked.profile or ""
    if not profile and found.nodes == 1 and asked.slurm == SlurmConfig():
        file = profile_file(found.device)
        kind = cluster_device(found).kind
        profile = str(file) if file.is_file() and read_profile(str(file)).kind == kind else ""
    return replace(found, profile=profile)


def found_machines(asked: ClusterConfig) -> ClusterSpec:
    """:func:`found_cluster` without a profile."""
    is_open = asked.device == AUTO or not (asked.nodes and asked.gpus_per_node and asked.memory_gib)
    if asked.name != AUTO or not is_open:
        sizes = (asked.nodes, asked.gpus_per_node)
        return ClusterSpec(asked.name, *sizes, asked.device, asked.memory_gib, asked.gpu)
    try:
        there = _machines(asked)
    except SlurmError as error:
        raise ConfigError(f"cluster=auto: Slurm does not say what there is ({error})", "cluster=slurm_4x8") from error
    kind = asked.device if asked.device != AUTO else "cuda" if there.gpus else "cpu"
    if kind == "cuda" and not there.gpus and not asked.gpus_per_node:
        raise ConfigError(f"cluster=auto found no GPU {there.where}{_list(there.more)}", "cluster.device=cpu")
    return _on_gpus(asked, there) if kind == "cuda" else _on_cores(asked, there)


def on_cluster(job: JobConfig, found: ClusterSpec) -> JobConfig:
    """A job with the numbers of the cluster that was found for it."""
    names = ("nodes", "gpus_per_node", "device", "memory_gib", "gpu")
    return replace(job, cluster=replace(job.cluster, **{name: getattr(found, name) for name in names}))


def as_asked(job: JobConfig, asked: JobConfig) -> JobConfig:
    """What a run folder keeps of a job that was planned: what is open (``cluster=auto``, a range of nodes) stays so."""
    if asked.cluster.name == AUTO:
        return replace(job, cluster=asked.cluster)
    return replace(job, cluster=replace(job.cluster, nodes=asked.cluster.nodes))


def _on_cores(asked: ClusterConfig, there: Machines) -> ClusterSpec:
    ranks = asked.gpus_per_node or there.ranks or min(MOST_RANKS, there.cores)
    memory = asked.memory_gib or max(0.1, int(10 * there.memory_gib / ranks) / 10)
    nodes = asked.nodes or there.nodes
    words = f"{_nodes(nodes)} {there.where}: {there.cores} cores, {there.memory_gib:.1f} GiB for {_ranks(ranks)}"
    return ClusterSpec(AUTO, nodes, ranks, "cpu", memory, asked.gpu, f"found {words}{_list(there.more)}")


def _on_gpus(asked: ClusterConfig, there: Machines) -> ClusterSpec:
    kind, is_known = (device(asked.gpu), True) if asked.gpu else seen_device(there.gpu, there.gpu_gib)
    ranks, nodes = asked.gpus_per_node or there.gpus, asked.nodes or there.nodes
    size = there.gpu_gib or kind.memory_bytes / 2**30
    memory = asked.memory_gib or int(10 * GPU_SHARE * size) / 10
    named = f"{there.gpus} x {there.gpu or 'GPU'}"
    more = list(there.more)
    if not is_known:
        more.append(
            f"{there.gpu} is not in the catalogue: times are those of {kind.kind}, the nearest in memory, uncalibrated"
            if there.gpu
            else f"nobody names the kind: times are those of {kind.kind} (cluster.gpu=KIND says it)"
        )
    elif not kind.calibrated:
        more.append(f"{kind.kind} is uncalibrated")
    words = f"found {_nodes(nodes)} {there.where}: {named} of {size:.0f} GiB{_list(more)}"
    return ClusterSpec(AUTO, nodes, ranks, "cuda", memory, kind.kind, words)


def _nodes(count: int) -> str:
    return f"{count} node{'s' if count > 1 else ''}"


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _list(more: tuple[str, ...] | list[str]) -> str:
    return "".join(f"; {one}" for one in more)


def _machines(asked: ClusterConfig) -> Machines:
    variables = slurm_variables()
    if {"SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST"} <= set(variables):
        return _allocated(variables)
    return _in_partition(asked.slurm.partition) if asked.slurm.partition else _here()


def _here() -> Machines:
    memory_gib = available_memory_bytes() / 2**30
    if not has_driver():
        return Machines(1, usable_cores(), memory_gib)
    seen = seen_accelerators()
    if not seen.names:
        why = seen.reason or ("no device" if seen.build else "this torch is built for CPUs only")
        return Machines(1, usable_cores(), memory_gib, more=(f"torch sees none of the GPUs: {why}",))
    links = seen_nvlinks()
    more: tuple[str, ...] = ()
    if links is not None and len(seen.names) > 1:
        more = (f"{links} NVLinks each" if links else "no NVLink: what ranks tell each other takes longer",)
    alike = [size for name, size in zip(seen.names, seen.memory_gib, strict=True) if name == seen.names[0]]
    if len(alike) < len(seen.names):
        more += (f"{len(seen.names) - len(alike)} of other kinds are left alone",)
    return Machines(1, usable_cores(), memory_gib, len(alike), seen.names[0], min(alike), more=more)


def _allocated(variables: dict[str, str]) -> Machines:
    """The nodes of the job that this process is in, with the part of them that the job has."""
    given = read_allocation(variables)
    nodes = seen_nodes(given.node_list)
    share = job_share(given)
    smallest = min(nodes, key=lambda node: (node.cores, node.memory_mib))
    memory_mib = share.memory_mib or min(node.memory_mib for node in nodes)
    cores = min(given.cpus_per_node, smallest.cores) if "SLURM_CPUS_ON_NODE" in variables else smallest.cores
    named, size = share.kind or smallest.kind, 0.0
    if share.gpus and not named and has_driver() and (seen := seen_accelerators()).names:
        named, size = seen.names[0], min(seen.memory_gib)
    where = f"in Slurm's job {given.job_id}"
    return Machines(given.nodes, cores, memory_mib / 1024, share.gpus, named, size, given.ranks_per_node, where)


def _in_partition(name: str) -> Machines:
    """The nodes of a partition: those of the kind that most of its nodes are of."""
    there = [node for node in seen_nodes() if name in node.partitions]
    if not there:
        names = partitions()
        raise ConfigError(
            f"cluster.slurm.partition={name} has no nodes; there is {', '.join(names) or 'no partition'}",
            f"cluster.slurm.partition={names[0] if names else 'NAME'}",
        )
    up = [node for node in there if node.is_up] or there
    kinds = Counter((node.gpus, node.kind, node.cores, node.memory_mib) for node in up)
    (gpus, kind, cores, memory_mib), count = max(kinds.items(), key=lambda one: (one[0][0] > 0, one[1]))
    other, away = len(up) - count, len(there) - len(up)
    more = [f"{other} of other kinds are left alone"] if other else []
    more += [f"{away} are down"] if away else []
    return Machines(count, cores, memory_mib / 1024, gpus, kind, where=f"in partition {name}", more=tuple(more))


def refuse_login_node(cluster: ClusterConfig) -> None:
    """A job that is handed to Slurm does not run where it is typed, so that looking here would tell nothing.

    Raises:
        ConfigError: ``cluster=auto`` without a partition.
    """
    if cluster.name == AUTO and not cluster.slurm.partition:
        names = partitions()
        raise ConfigError(
            "cluster=auto would describe this host, but a submitted job runs on Slurm's nodes: name their partition"
            + (f" ({', '.join(names)})" if names else ""),
            f"cluster.slurm.partition={names[0] if names else 'NAME'}",
        )
