"""``cluster=auto``: this host, its GPUs, an allocation's nodes, a partition's; by fakes where the machine has none."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.environment import usable_cores
from launch.slurm.allocation import Allocation
from launch.slurm.nodes import Share, job_share
from orchestrator.commands import plan_job
from orchestrator.config.building import job_from_yaml, job_to_yaml
from orchestrator.config.job import ClusterConfig
from orchestrator.config.loading import compose_job
from orchestrator.detection import cluster as module
from orchestrator.detection.cluster import as_asked, found_cluster, on_cluster, refuse_login_node
from orchestrator.detection.host import Accelerators, available_memory_bytes, seen_nvlinks
from orchestrator.errors import ConfigError
from orchestrator.planning.devices import seen_device
from orchestrator.planning.plan import Plan

NODE = "NodeName={name} CPUTot=64 RealMemory=512000 State={state} Gres={gres} Partitions=batch,all OS=Linux 6.1"
SMI = (
    '#!/bin/sh\n[ "$1" = nvlink ] && printf "GPU 0: x\\n\\t Link 0: 26.562 GB/s\\n\\t Link 1: 26.562 GB/s\\n"\nexit 0\n'
)


def auto(*words: str) -> ClusterConfig:
    return compose_job(["cluster=auto", *words]).cluster


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """A PATH on which commands answer as they are told, and no Slurm job around us."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "has_driver", lambda: False)

    def answers(command: str, script: str) -> None:
        (tmp_path / command).write_text(script)
        (tmp_path / command).chmod(0o755)

    return answers


def show(*lines: str) -> str:
    return "#!/bin/sh\ncat <<'EOF'\n" + "\n".join(lines) + "\nEOF\n"


def test_a_host_without_gpus_is_its_cores_and_its_free_memory(desk: Callable[[str, str], None]) -> None:
    found = found_cluster(auto())
    ranks = min(4, usable_cores())
    assert (found.name, found.nodes, found.gpus_per_node, found.device, found.gpu) == ("auto", 1, ranks, "cpu", None)
    assert found.memory_gib * ranks == pytest.approx(available_memory_bytes() / 2**30, rel=0.2)
    assert f"found 1 node here: {usable_cores()} cores" in found.found
    asked = found_cluster(auto("cluster.gpus_per_node=3", "cluster.memory_gib=1.5"))
    assert (asked.gpus_per_node, asked.memory_gib) == (3, 1.5)


def test_what_was_found_is_in_the_plan_and_what_was_asked_in_the_job(desk: Callable[[str, str], None]) -> None:
    asked = compose_job(["cluster=auto", "model=smollm2_135m", "data=lighthouse"])
    planned = plan_job(asked)
    assert planned.plan.cluster == found_cluster(planned.job.cluster) or planned.plan.cluster is not None
    assert planned.plan.cluster is not None and planned.plan.cluster.gpus_per_node == min(4, usable_cores())
    assert planned.plan.reasons[0].startswith("cluster=auto: found 1 node here")
    assert Plan.from_json(planned.plan.to_json()) == planned.plan
    assert as_asked(planned.job, asked) == asked == job_from_yaml(job_to_yaml(asked))
    named = compose_job(["cluster=laptop"])
    assert as_asked(on_cluster(named, found_cluster(named.cluster)), named) == named
    old = {key: value for key, value in json.loads(planned.plan.to_json()).items() if key != "cluster"}
    assert Plan.from_json(json.dumps(old)).cluster is None


@pytest.mark.parametrize(
    ("names", "memory_gib", "kind", "words"),
    [
        (("NVIDIA H100 80GB HBM3",) * 8, 79.1, "H100-80GB", "8 x NVIDIA H100 80GB HBM3 of 79 GiB; 2 NVLinks each"),
        (("NVIDIA A100-PCIE-40GB",) * 2, 39.4, "A100-40GB", "2 x NVIDIA A100-PCIE-40GB of 39 GiB"),
        (("NVIDIA L4",), 22.2, "A10", "NVIDIA L4 is not in the catalogue: times are those of A10"),
        (("Tesla T4", "Tesla T4", "Tesla K80"), 14.6, "T4", "1 of other kinds are left alone; T4 is uncalibrated"),
    ],
)
def test_gpus_are_those_that_torch_sees(
    desk: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, ...],
    memory_gib: float,
    kind: str,
    words: str,
) -> None:
    desk("nvidia-smi", SMI)
    monkeypatch.setattr(module, "has_driver", lambda: True)
    seen = Accelerators("12.8", names=names, memory_gib=(memory_gib,) * len(names))
    monkeypatch.setattr(module, "seen_accelerators", lambda: seen)
    found = found_cluster(auto())
    count = sum(name == names[0] for name in names)
    assert (found.device, found.gpus_per_node, found.gpu) == ("cuda", count, kind) and words in found.found
    assert found.memory_gib == pytest.approx(0.95 * memory_gib, abs=0.1)
    assert found_cluster(auto("cluster.device=cpu")).device == "cpu"


def test_a_torch_for_cpus_on_a_machine_with_gpus_says_so(
    desk: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_driver", lambda: True)
    monkeypatch.setattr(module, "seen_accelerators", Accelerators)
    assert "torch sees none of the GPUs: this torch is built for CPUs only" in found_cluster(auto()).found
    with pytest.raises(ConfigError, match="cluster=auto found no GPU here; torch sees none") as caught:
        found_cluster(auto("cluster.device=cuda"))
    assert caught.value.hint == "cluster.device=cpu"


def test_no_nvlink_is_said(desk: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    desk("nvidia-smi", "#!/bin/sh\necho 'GPU 0: x'\n")
    monkeypatch.setattr(module, "has_driver", lambda: True)
    seen = Accelerators("12.8", names=("NVIDIA A10", "NVIDIA A10"), memory_gib=(22.0, 22.0))
    monkeypatch.setattr(module, "seen_accelerators", lambda: seen)
    assert "no NVLink" in found_cluster(auto()).found
    desk("nvidia-smi", "#!/bin/sh\nexit 9\n")
    assert seen_nvlinks() is None and "NVLink" not in found_cluster(auto()).found


@pytest.mark.parametrize(
    ("gres", "gpus", "kind", "words"),
    [
        ("gpu:h100:8(S:0-1),nvme:2", 8, "H100-80GB", "3 nodes in partition batch: 8 x h100 of 75 GiB; 1 are down"),
        ("gpu:nvidia_a100_80gb_pcie:4(S:0,2)", 4, "A100-80GB", "4 x nvidia_a100_80gb_pcie"),
        ("gpu:4", 4, "H100-80GB", "nobody names the kind: times are those of H100-80GB (cluster.gpu=KIND says it)"),
        ("gpu:mi300x:8", 8, "H100-80GB", "mi300x is not in the catalogue"),
        ("(null)", 4, None, "64 cores, 500.0 GiB for 4 ranks"),
    ],
)
def test_a_partition_is_its_nodes(
    desk: Callable[[str, str], None], gres: str, gpus: int, kind: str | None, words: str
) -> None:
    states = ("IDLE", "MIXED+DRAIN", "ALLOCATED", "IDLE")
    lines = [NODE.format(name=f"n{place}", state=state, gres=gres) for place, state in enumerate(states)]
    other = NODE.format(name="x", state="IDLE", gres=gres).replace("batch,", "")
    desk("scontrol", show(*lines, other))
    found = found_cluster(auto("cluster.slurm.partition=batch"))
    assert (found.nodes, found.gpus_per_node, found.gpu) == (3, gpus, kind) and words in found.found
    assert found_cluster(auto("cluster.slurm.partition=batch", "cluster.nodes=2")).nodes == 2


def test_a_mixed_partition_is_the_kind_with_most_nodes(desk: Callable[[str, str], None]) -> None:
    lines = [NODE.format(name=f"a{place}", state="IDLE", gres="gpu:a100:8") for place in range(2)]
    desk("scontrol", show(NODE.format(name="h", state="IDLE", gres="gpu:h100:8"), *lines))
    found = found_cluster(auto("cluster.slurm.partition=batch"))
    assert (found.nodes, found.gpu) == (2, "A100-80GB") and "1 of other kinds are left alone" in found.found


def test_an_unknown_partition_is_refused_with_those_there_are(desk: Callable[[str, str], None]) -> None:
    desk("scontrol", show(NODE.format(name="n1", state="IDLE", gres="(null)")))
    desk("sinfo", "#!/bin/sh\necho 'batch*'\n")
    with pytest.raises(
        ConfigError, match=re.escape("cluster.slurm.partition=btach has no nodes; there is batch")
    ) as one:
        found_cluster(auto("cluster.slurm.partition=btach"))
    assert one.value.hint == "cluster.slurm.partition=batch"
    desk("scontrol", "#!/bin/sh\necho 'scontrol: error: Access denied' >&2; exit 1\n")
    with pytest.raises(ConfigError, match=re.escape("Slurm does not say what there is (Access denied)")):
        found_cluster(auto("cluster.slurm.partition=batch"))


def test_a_job_for_slurm_names_its_partition(desk: Callable[[str, str], None]) -> None:
    desk("sinfo", "#!/bin/sh\necho 'batch*'\n")
    with pytest.raises(ConfigError, match=r"would describe this host.*\(batch\)") as caught:
        refuse_login_node(auto())
    assert caught.value.hint == "cluster.slurm.partition=batch"
    refuse_login_node(auto("cluster.slurm.partition=batch"))


JOB = "JobId=7 JobState=RUNNING NumNodes=2 AllocTRES=cpu=32,mem=250G,node=2,{tres} TresPerNode={asked}"


@pytest.mark.parametrize(
    ("tres", "asked", "given", "expected"),
    [
        ("gres/gpu=8,gres/gpu:a100=8", "gres/gpu:4", 0, Share(4, "a100", 128000)),
        ("billing=4", "gres:gpu:h100:2", 0, Share(2, "h100", 128000)),
        ("gres/gpu=8", "(null)", 0, Share(4, "", 128000)),
        ("gres/gpu=8,gres/gpu:a100=8", "(null)", 3, Share(3, "a100", 128000)),
        ("billing=4", "(null)", 0, Share(0, "", 128000)),
    ],
)
def test_the_share_of_a_job_is_what_it_was_given(
    desk: Callable[[str, str], None], tres: str, asked: str, given: int, expected: Share
) -> None:
    desk("scontrol", show(JOB.format(tres=tres, asked=asked)))
    assert job_share(Allocation("7", 2, "n[1-2]", gpus_per_node=given)) == expected


def test_in_an_allocation_the_cluster_is_its_part_of_the_nodes(
    desk: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = NODE.format(name="n1", state="ALLOCATED", gres="gpu:h100:8")
    job = JOB.format(tres="gres/gpu=8", asked="gres/gpu:4")
    desk("scontrol", f"#!/bin/sh\ncase \"$*\" in *job*) echo '{job}';; *) echo '{node}';; esac\n")
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = found_cluster(auto("cluster.slurm.partition=elsewhere"))
    assert (found.nodes, found.gpus_per_node, found.gpu) == (2, 4, "H100-80GB") and "in Slurm's job 7" in found.found
    on_cores = found_cluster(auto("cluster.device=cpu"))
    assert (on_cores.gpus_per_node, on_cores.memory_gib) == (4, 31.2)


def test_open_numbers_are_for_auto_alone() -> None:
    for word, message in (
        ("cluster.nodes=0", "cluster.nodes=0 should be at least 1"),
        ("cluster.memory_gib=0", "cluster.memory_gib=0.0 should be above 0"),
        ("cluster.device=auto", "cluster.device=auto is none of cpu, cuda"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            compose_job(["cluster=laptop", word])
    named = dataclasses.replace(ClusterConfig(), name="mine")
    assert found_cluster(named).found == ""


def test_a_variant_is_told_by_its_memory() -> None:
    assert seen_device("NVIDIA A100-SXM4-80GB", 79.2)[0].kind == "A100-80GB"
    assert seen_device("")[0].kind == "H100-80GB" and not seen_device("")[1]
