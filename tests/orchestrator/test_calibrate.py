"""Calibration: what is measured becomes the figures of a plan, which says so; the fit finds what made the times."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.bench import planner_single
from orchestrator.bench.planner_here import MARK, TOPOLOGIES, Here, bench_here, measure, words_of
from orchestrator.bench.planner_single import Single
from orchestrator.calibrate import command as module
from orchestrator.calibrate.command import calibrate, check_here, mean, slowest
from orchestrator.calibrate.launching import measure_launch
from orchestrator.calibrate.measuring import measure_messages, median_s
from orchestrator.cli import main
from orchestrator.commands import plan_job
from orchestrator.config.job import ClusterConfig
from orchestrator.config.loading import compose_job
from orchestrator.detection.cluster import found_cluster
from orchestrator.errors import ConfigError, ResourceError
from orchestrator.planning.constants import FITTED, constants_for
from orchestrator.planning.devices import device
from orchestrator.planning.estimate import cluster_device
from orchestrator.planning.profile import (
    FORMAT_VERSION,
    Link,
    Message,
    Pace,
    Profile,
    fit_link,
    measured_device,
    profile_file,
    read_profile,
)
from parallel.specs import ClusterSpec
from tests.helpers.pool import Pool

PROFILE = Profile(
    host="tide",
    kind="cpu",
    cores=2,
    paces=(
        Pace(1, {"fp32": 5e10, "bf16": 1e11}, 2e10, 1e10, 1e-5, {"fp32": ((16, 0.5), (64, 0.75), (256, 1.0))}),
        Pace(2, {"fp32": 9e10, "bf16": 2e11}, 3e10, 1.5e10, 2e-5),
    ),
    links=(Link(2, 2e9, 2e-4), Link(3, 1.5e9, 4e-4), Link(4, 1e9, 8e-4)),
    measured="2026-11-22 12:00",
    torch="2.13.0",
)
JOB = ["model=smollm2_135m", "data=lighthouse", "topology.tp=1", "topology.cp=1", "topology.vpp=1"]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a profile of this host's CPU."""
    monkeypatch.setenv("ISOTRAIN_PROFILES", str(tmp_path / "profiles"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    file = profile_file("cpu")
    file.parent.mkdir(parents=True)
    file.write_text(PROFILE.to_json())
    read_profile.cache_clear()
    measured_device.cache_clear()
    return file


def test_a_profile_comes_back_as_it_was_written(kept: Path) -> None:
    assert read_profile(str(kept)) == PROFILE
    assert [PROFILE.pace(threads).threads for threads in (1, 2, 16)] == [1, 2, 2]
    assert [PROFILE.link(ranks).ranks for ranks in (1, 2, 3, 16)] == [2, 2, 3, 4]


def test_plans_of_this_host_use_its_profile_and_say_so(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan_job(compose_job([*JOB, "cluster=laptop"])).plan
    assert "times as measured on tide, 2026-11-22 12:00 (isotrain calibrate)" in planned.reasons
    assert planned.cluster is not None and planned.cluster.profile == str(kept)
    here = cluster_device(planned.cluster)
    assert (here.matmul_rate("fp32"), here.link_rate, here.message_s) == (5e10, 1e9, 8e-4)
    assert here.measured is not None and (here.measured.threads, here.measured.cores) == (1, 2)
    alone = cluster_device(replace(planned.cluster, gpus_per_node=1))
    assert alone.matmul_rate("fp32") == 9e10 and alone.measured is not None and alone.measured.threads == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what the user has set is what ranks compute with
    assert cluster_device(replace(planned.cluster, gpus_per_node=1)).matmul_rate("fp32") == 5e10
    for elsewhere in ("h100x8", "slurm_cpu"):
        assert found_cluster(compose_job([f"cluster={elsewhere}"]).cluster).profile == ""


def test_few_tokens_reach_a_part_of_the_rate(kept: Path) -> None:
    here = measured_device(str(kept), 2, "cpu")
    shares = [here.product_share("fp32", tokens) for tokens in (1, 16, 32, 64, 128, 256, 4096)]
    assert shares == pytest.approx([0.5, 0.5, 0.625, 0.75, 0.875, 1.0, 1.0])
    assert here.product_share("bf16", 16) == device("H100").product_share("bf16", 16) == 1.0


@pytest.mark.parametrize(("axis", "ranks"), [("dp", 1), ("dp", 2), ("tp", 3)])
def test_operators_take_the_host_as_long_whatever_they_compute(kept: Path, axis: str, ranks: int) -> None:
    """On a CPU launching an operator is work like all other: 60 of a layer, 4 for each of 4 adapters, both ways."""
    words = [*JOB[:2], "cluster=one", "batch.micro_sequences=1", "memory.recompute=none", f"topology.{axis}={ranks}"]
    found = plan_job(compose_job([*words, f"cluster.gpus_per_node={ranks}"])).plan
    launch_s = 2e-5 if ranks == 1 else 1e-5
    assert found.step_time.launch_s == pytest.approx(2 * found.micro_batches * (30 + 1) * 76 * launch_s)


def test_ranks_that_cut_a_layer_wait_for_cores_in_each(kept: Path) -> None:
    """Three ranks compute at once on two cores: half as long again, and messages come on top of that."""
    words = [*JOB[:2], "cluster=one", "batch.micro_sequences=1", "memory.recompute=none", "topology.tp=3"]
    time = plan_job(compose_job([*words, "cluster.gpus_per_node=3"])).plan.step_time
    assert time.tensor_s > 0 and time.shared_s >= time.compute_s / 2
    assert time.total_s >= 1.5 * time.compute_s + time.tensor_s


def test_cores_that_ranks_share_make_steps_longer(kept: Path) -> None:
    """Four processes on two cores take at least as long as two of them that do all the work."""
    words = [*JOB, "cluster=one", "topology.pp=1", "batch.micro_sequences=1", "memory.recompute=none"]
    times = {
        ranks: plan_job(compose_job([*words, f"cluster.gpus_per_node={ranks}", f"topology.dp={ranks}"])).plan.step_time
        for ranks in (1, 2, 4)
    }
    assert times[1].shared_s == times[2].shared_s == 0 < times[4].shared_s
    assert times[4].total_s >= times[2].compute_s
    piped = plan_job(compose_job([*words[:-3], "topology.pp=4", "topology.dp=1", "cluster.gpus_per_node=4"])).plan
    assert piped.step_time.shared_s < times[4].shared_s  # who waits in the bubble leaves the cores to others


def test_a_named_profile_is_used_anywhere_and_must_fit(kept: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(replace(PROFILE, host="far").to_json())
    named = compose_job(["cluster=slurm_cpu", f"cluster.profile={file}"]).cluster
    assert found_cluster(named).profile == str(file)
    for text, message in (("[]", "is no profile"), ("{}", "is no profile"), ('{"paces": 3}', "is no profile")):
        file.write_text(text)
        read_profile.cache_clear()
        with pytest.raises(ConfigError, match=message) as caught:
            read_profile(str(file))
        assert caught.value.hint == f"isotrain calibrate --out {file}"
    file.write_text(PROFILE.to_json().replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 1'))
    read_profile.cache_clear()
    with pytest.raises(ConfigError, match=f"its format is 1, not {FORMAT_VERSION}"):
        read_profile(str(file))
    with pytest.raises(ConfigError, match="No such file"):
        read_profile(str(tmp_path / "nowhere.json"))
    with pytest.raises(ConfigError, match="was measured on cpu, but the plan is for H100-80GB") as caught:
        cluster_device(ClusterSpec("h100x8", 1, 8, "cuda", 76.0, "H100", profile=str(kept)))
    assert caught.value.hint == "cluster.profile=null"


def test_a_gpu_with_a_profile_keeps_what_was_not_measured(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    pace = Pace(1, {"fp32": 5e13, "bf16": 7e14}, 4e14, 3e12)
    file.write_text(replace(PROFILE, kind="H100-80GB", paces=(pace,)).to_json())
    found = measured_device(str(file), 8, "H100-80GB")
    assert found.matmul_rate("bf16") == 7e14 and found.peaks == device("H100").peaks and not found.is_measured
    assert found.measured is not None and found.measured.cores == 0
    shares = constants_for(False, FITTED, found.measured.attention)
    assert (shares.matmul, shares.memory, shares.link, shares.network) == (1, 1, 1, FITTED.network)
    assert shares.attention == pytest.approx(4 / 7) and constants_for(False) == FITTED


@pytest.mark.parametrize(("rate", "latency"), [(1e9, 1e-4), (5e8, 2e-3), (4e11, 5e-6)])
def test_the_fit_finds_rate_and_latency(rate: float, latency: float) -> None:
    places = [(size * (n - 1) / n, n - 1) for size in (2**14, 2**18, 2**22) for n in (2, 4)]
    found = fit_link([Message(moved, hops, moved / rate + hops * latency) for moved, hops in places])
    assert found == pytest.approx((rate, latency), rel=1e-6)


def test_the_fit_survives_noise_that_hides_one_of_both() -> None:
    rate, latency = fit_link([Message(1e6, 1, 1e-3), Message(2e6, 2, 2e-3), Message(4e6, 1, 4e-3)])
    assert rate > 0 and latency > 0
    rate, latency = fit_link([Message(1e3, 1, 1e-3), Message(1e6, 1, 9e-4), Message(1e3, 3, 3e-3)])
    assert rate > 0 and latency == pytest.approx(1e-3, rel=0.2)


def test_ranks_are_put_together() -> None:
    pace = PROFILE.paces[0]
    both = mean([pace, replace(pace, attention=4e10)])
    assert both == replace(pace, attention=3e10)
    assert slowest([[Message(1, 1, 2.0)], [Message(1, 1, 3.0)]]) == [Message(1, 1, 3.0)]


def test_work_is_timed_as_often_as_is_asked() -> None:
    calls: list[int] = []
    assert median_s(lambda: calls.append(1), lambda: None, repeats=5) >= 0 and len(calls) == 6


def test_collectives_are_measured_between_real_processes(pool: Pool) -> None:
    by_rank = pool.run(2, measure_messages, "cpu")
    found = slowest(by_rank)
    assert len(found) == 12 and all(one.seconds > 0 for one in found)
    assert {one.hops for one in found} == {1, 2}
    rate, latency = fit_link(found)
    assert rate > 1e6 and 0 < latency < 1


def test_an_operator_is_measured_with_a_real_layer(pool: Pool) -> None:
    assert 1e-7 <= pool.run(1, measure_launch, 1)[0] < 1


def test_a_profile_of_before_is_no_reason_not_to_measure(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept.write_text('{"link": 2e9}')
    read_profile.cache_clear()
    assert main(["plan", *JOB, "cluster=laptop"]) == 64
    assert f"hint: isotrain calibrate --out {kept}" in capsys.readouterr().err
    monkeypatch.setattr(module, "calibrate", lambda cluster: PROFILE)
    assert main(["calibrate", "cluster=laptop", "--out", str(kept)]) == 0
    read_profile.cache_clear()
    assert main(["plan", *JOB, "cluster=laptop"]) == 0


def test_the_command_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "calibrate", lambda cluster: PROFILE)
    out = tmp_path / "new" / "profile.json"
    assert main(["calibrate", "cluster=laptop", "--out", str(out)]) == 0
    assert read_profile(str(out)) == PROFILE
    told = capsys.readouterr().out
    assert "1 thread a process: products fp32 50.0, bf16 100.0 GFLOP/s" in told and "10 us an operator" in told
    assert "fp32 by tokens: 16 50%, 64 75%, 256 100%" in told and "between 3 processes: 1.50 GB/s, 400 us" in told
    assert main(["calibrate", "cluster=laptop", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"code": 0, "out": str(out)} | json.loads(PROFILE.to_json())
    (tmp_path / "file").touch()
    assert main(["calibrate", "cluster=laptop", "--out", str(tmp_path / "file" / "x.json")]) == 64
    assert "cannot be written" in capsys.readouterr().err


def test_only_this_host_is_measured() -> None:
    with pytest.raises(ConfigError, match="cluster=slurm_cpu has 4 nodes, and what is measured is this host") as caught:
        check_here(found_cluster(compose_job(["cluster=slurm_cpu"]).cluster))
    assert caught.value.hint.startswith("isotrain calibrate cluster=auto")
    check_here(found_cluster(ClusterConfig()))


@pytest.mark.grid
def test_this_machine_is_measured_whole() -> None:
    profile = calibrate(found_cluster(compose_job(["cluster=auto"]).cluster))
    assert profile.kind == "cpu" and profile.cores >= 1
    assert [link.ranks for link in profile.links] == [2, 3, 4]
    assert all(link.rate > 0 and link.message_s > 0 for link in profile.links)
    assert all(0 < pace.launch_s < 1 for pace in profile.paces)
    assert all(0 < share <= 1 for pace in profile.paces for points in pace.shares.values() for _, share in points)
    assert all(rate > 1e8 for pace in profile.paces for rate in (*pace.products.values(), pace.attention))


def test_the_bench_of_this_machine_fills_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARK}\nold\n{MARK}\nafter\n")

    def one(sizes: dict[str, int], run_dir: Path) -> Here:
        return Here(str(sizes), 1, 2.0, 2.5)

    assert bench_here(False, [page], one) == 0
    text = page.read_text()
    assert "| mean of 8; worst |  |  |  | 25%; 25% |" in text and "old" not in text and text.endswith("after\n")
    capsys.readouterr()
    assert bench_here(True, [], one) == 0
    runs: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["runs"]
    assert len(runs) == len(TOPOLOGIES) == 8 and runs[0] == asdict(one({}, tmp_path)) | {"error": 0.25}


def test_a_run_that_fails_is_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.bench import planner_here
    from orchestrator.commands import Finished

    monkeypatch.setattr(planner_here, "train", lambda words: Finished(tmp_path, 71, 0, "rank 0 has no memory"))
    with pytest.raises(ResourceError, match=r"pp=2 .*: rank 0 has no memory") as caught:
        measure({"pp": 2}, tmp_path)
    assert caught.value.hint == f"isotrain train {' '.join(words_of({'pp': 2}))}"


@pytest.mark.parametrize("sizes", TOPOLOGIES, ids=str)
def test_every_topology_of_the_bench_can_be_planned(sizes: dict[str, int]) -> None:
    plan = plan_job(compose_job(words_of(sizes))).plan
    assert plan.ranks_used == plan.cluster.gpus_per_node and plan.ranks_idle == 0  # type: ignore[union-attr]


def test_the_bench_of_one_device_fills_its_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{planner_single.MARK}\nold\n{planner_single.MARK}\nafter\n")
    asked: list[list[str]] = []

    def one(name: str, words: Sequence[str], run_dir: Path) -> Single:
        asked.append(list(words))
        plan = plan_job(compose_job(words)).plan
        assert plan.ranks_used == 1 and plan.memory[0].total > 0
        return Single(name, 2.0, 2.5, 100, 90)

    assert planner_single.bench_single(False, [page], one) == 0
    assert f"| mean of {len(asked)}; worst |  |  | 25%; 25% |  |  | 10%; 10% |" in page.read_text()
    assert len(asked) >= 6 and {word for words in asked for word in words if word.startswith("tuner=")} == {
        f"tuner={name}" for name in ("lora", "dora", "qlora", "full")
    }
