"""From words on a command line to a frozen job, and every way in which that can go wrong."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.building import (
    all_keys,
    as_override,
    build_job,
    differences,
    flatten,
    job_from_yaml,
    job_to_yaml,
    read_job,
    same_run,
)
from orchestrator.config.checking import CHOICES, RANGES
from orchestrator.config.hints import ELSEWHERE, OTHER_VALUES, SETTINGS
from orchestrator.config.job import JobConfig
from orchestrator.config.loading import compose_job, config_root, group_choices, override_job
from orchestrator.errors import ConfigError

GROUPS = ["checkpoint", "cluster", "data", "engine", "experiment", "metrics", "model", "objective", "optimizer"]


def test_configs_without_overrides_are_the_defaults_of_the_job() -> None:
    assert compose_job() == JobConfig()


def test_every_group_has_choices_and_every_choice_composes() -> None:
    choices = group_choices()
    assert set(choices) == {*GROUPS, "topology", "tuner"}
    for group, names in choices.items():
        assert names, group
        for name in names:
            assert isinstance(compose_job([f"{group}={name}"]), JobConfig)


def test_a_group_file_holds_only_keys_of_its_section() -> None:
    import yaml

    for group, names in group_choices().items():
        for name in names if group != "experiment" else []:
            section = yaml.safe_load((config_root() / group / f"{name}.yaml").read_text())
            known = {field.name for field in dataclasses.fields(getattr(JobConfig(), group))}
            assert set(section) <= known, f"configs/{group}/{name}.yaml"


def test_a_recipe_sets_groups_and_values_and_overrides_still_win() -> None:
    job = compose_job(["experiment=demo", "steps=3", "cluster=one"])
    assert (job.data.path, job.model.path) == ("builtin:lighthouse", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert (job.steps, job.cluster.gpus_per_node, job.topology.pp) == (3, 1, 2)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.lr=1e-3", "optimizer.lr", 0.001),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("tuner.targets=[q_proj,v_proj]", "tuner.targets", ["q_proj", "v_proj"]),
        ("tuner.targets='.*(q|v)_proj'", "tuner.targets", ".*(q|v)_proj"),
        ("tuner.path=/a b/c", "tuner.path", "/a b/c"),
        ("++steps=7", "steps", 7),
        ("+steps=7", "steps", 7),
        ("topology.sp=true", "topology.sp", True),
        ("run_dir=/r-${seed}", "run_dir", "/r-0"),
        ("experiment=null", "steps", 100),
        ("tuner=full", "tuner.name", "full"),
        ("model.config={model_type: llama}", "model.config", {"model_type": "llama"}),
    ],
)
def test_overrides_follow_the_grammar_of_hydra(override: str, key: str, value: Any) -> None:
    assert flatten(compose_job([override]))[key] == value


@pytest.mark.parametrize("hint", SETTINGS.values())
def test_a_tuner_that_is_a_setting_here_composes_as_hinted(hint: str) -> None:
    assert compose_job(hint.split()).tuner.name == hint.split()[0].removeprefix("tuner=")


def test_a_whole_number_may_be_written_as_one_of_another_kind() -> None:
    steps = compose_job(["steps=1e3"]).steps
    assert steps == 1000 and type(steps) is int


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; the nearest is 'optimizer.lr'", "optimizer.lr=1"),
        ("lr=1", "the nearest is 'optimizer.lr'", "optimizer.lr=1"),
        ("learning_rate=1e-4", "here it is 'optimizer.lr'", "optimizer.lr=1e-4"),
        ("tuner.lora_rank=8", "here it is 'tuner.r'", "tuner.r=8"),
        ("num_train_epochs=3", "here it is 'steps'", "steps=VALUE"),
        ("clutser=laptop", "the nearest is 'cluster'", "cluster=laptop"),
        ("~tuner", "nothing can be left out of a job", "tuner="),
        ("qqq.zzz=1", "unknown key 'qqq.zzz'; there are run_dir, steps", "run_dir=VALUE"),
        ("steps=x", "steps='x' should be a whole number", "for example steps=100"),
        ("tuner=rslora", "there is no configs/tuner/rslora.yaml", "tuner=lora tuner.rslora=true"),
        ("steps=1.5", "steps=1.5 should be a whole number", "for example steps=100"),
        ("steps=true", "steps=True should be a whole number", "for example steps=100"),
        ("optimizer.lr=nan", "optimizer.lr=nan should be a number", "for example optimizer.lr=0.0002"),
        ("topology.sp=yes", "should be true or false or null", "for example topology.sp=null"),
        (
            "tuner.targets=3",
            "tuner.targets=3 should be text or a list of texts",
            "for example tuner.targets=all-linear",
        ),
        ("model=llama", "no configs/model/llama.yaml; choices: deepseek_v2_lite, ", "model=llama3_8b"),
        ("model=null", "model=null: there is no", "model="),
        ("experiment=dem", "choices: demo", "experiment=demo"),
        ("data=/x.jsonl", "there is no configs/data", "data=jsonl  or  data.path=/x.jsonl"),
        ("steps=1,2", "asks for several runs at once", "steps=1 "),
        ("steps", "'steps' is no override", "steps=VALUE"),
        ("tuner.targets=(a|b)", "is no override", "'tuner.targets=\"(a|b)\"'"),
        ("metrics.sinks=jsonl,wandb", "asks for several runs at once", "'metrics.sinks=[jsonl,wandb]'"),
        ("hydra.run.dir=x", "isotrain has no Hydra settings", "leave it out"),
        ("run_dir=${nope}", "a value cannot be resolved: Interpolation key 'nope' not found", "write the value"),
        ("cluster@x=one", "do not compose", "GROUP=CHOICE"),
        ("precision=fp16", "precision=fp16 is none of fp32, bf16", "precision=bf16"),
        ("metrics.sinks=[tensorbord]", "is none of jsonl, tensorboard, wandb", "metrics.sinks=[tensorboard]"),
        ("topology.tp=0", "topology.tp=0 should be at least 1", "topology.tp=1"),
        ("cluster.nodes=4-2", "cluster.nodes=4-2 should be a whole number or FEWEST-MOST", "cluster.nodes=2-8"),
        ("cluster.nodes=0-2", "cluster.nodes=0-2 should be a whole number or FEWEST-MOST", "cluster.nodes=2-8"),
        ("cluster.fewest_nodes=3", "cluster.nodes=1 is below cluster.fewest_nodes=3", "cluster.nodes=1-1"),
        ("cluster.slurm.nodes=2-4", "here it is 'cluster.nodes'", "cluster.nodes=2-4"),
        ("optimizer.betas=[0.9]", "should be two numbers", "optimizer.betas=[0.9,0.999]"),
        ("optimizer.min_lr=1", "optimizer.min_lr=1.0 is above optimizer.lr=0.0002", "optimizer.min_lr=0"),
        ("tuner.targets=[]", "adapts nothing", "tuner.targets=all-linear"),
        ("tuner.targets='(a'", "is no regular expression", "tuner.targets=all-linear"),
        ("model.config=3", "model.config=3 should be a mapping or null", "for example model.config=null"),
    ],
)
def test_a_wrong_override_names_the_key_and_a_hint(override: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        compose_job([override])
    assert message in str(raised.value)
    assert raised.value.hint.startswith(hint)
    assert len(raised.value.render().splitlines()) < 20


def test_a_list_that_the_shell_has_cut_is_put_together_in_the_hint() -> None:
    with pytest.raises(ConfigError) as raised:
        compose_job(["tuner.targets=[q_proj,", "v_proj]", "steps=3"])
    assert raised.value.hint.startswith("'tuner.targets=[q_proj, v_proj]'")


def test_every_key_that_a_name_from_elsewhere_leads_to_exists() -> None:
    assert set(ELSEWHERE) <= set(all_keys())
    names = [name for known in ELSEWHERE.values() for name in known]
    assert len(names) == len(set(names)) and set(names) >= OTHER_VALUES


def test_paths_are_named_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    here = ["model.path=model", "data.path=chat.jsonl", "run_dir=runs/a", "tuner.path=adapter"]
    job = compose_job(here)
    paths = (job.model.path, job.data.path, job.run_dir, job.tuner.path)
    assert paths == tuple(str(tmp_path / name) for name in ("model", "chat.jsonl", "runs/a", "adapter"))
    elsewhere = override_job(job_to_yaml(job), ["data=lighthouse", "model.path=org/name"])
    assert (elsewhere.data.path, elsewhere.model.path) == ("builtin:lighthouse", "org/name")


@pytest.mark.parametrize("key", [*CHOICES, *RANGES])
def test_every_checked_key_exists_and_a_proposed_value_works(key: str) -> None:
    assert key in all_keys()
    for example in [RANGES[key][2]] if key in RANGES else CHOICES[key]:
        compose_job([f"{key}=[{example}]" if key == "metrics.sinks" else f"{key}={example}", "optimizer.min_lr=0"])


def test_no_section_may_be_a_plain_value() -> None:
    with pytest.raises(ConfigError, match="tuner=3 should be a mapping of keys"):
        build_job({"tuner": 3})


def test_configs_that_are_not_installed_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("orchestrator.config.loading.__file__", str(tmp_path / "a" / "loading.py"))
    with pytest.raises(ConfigError, match="no configs were found") as raised:
        config_root()
    assert raised.value.hint == "pip install --force-reinstall isotrain"


texts = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00\x85\u2028\u2029"), max_size=12)


@given(
    steps=st.integers(1, 10**9),
    lr=st.floats(0, 1, allow_subnormal=False),
    path=st.none() | texts,
    targets=st.lists(st.sampled_from(["q_proj", "null", "1", "a: b"]), min_size=1),
)
def test_a_job_survives_yaml(steps: int, lr: float, path: str | None, targets: list[str]) -> None:
    default = JobConfig()
    job = dataclasses.replace(
        default,
        steps=steps,
        run_dir=path,
        optimizer=dataclasses.replace(default.optimizer, lr=lr),
        tuner=dataclasses.replace(default.tuner, targets=targets),
    )
    assert job_from_yaml(job_to_yaml(job)) == job


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "job.yaml is no YAML"), ("- 1", "job.yaml holds list"), ("stepz: 1", "'stepz'")]
)
def test_a_broken_job_file_is_said(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job_from_yaml(text)


def test_a_folder_without_a_job_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder") as raised:
        read_job(tmp_path)
    assert raised.value.hint == "isotrain train ... run_dir=DIR"


def test_resume_overrides_lie_on_top_of_the_job_and_groups_replace_sections() -> None:
    asked = compose_job(["experiment=demo", "optimizer.lr=0.5"])
    job = override_job(job_to_yaml(asked), ["topology.tp=3", "topology.pp=1", "cluster=one", "steps=50"])
    changed = {key for key, _, _ in differences(asked, job)}
    assert changed >= {"topology.tp", "topology.pp", "steps", "cluster.gpus_per_node"}
    assert all(key.startswith(("topology.", "cluster.", "steps")) for key in changed)
    assert override_job(job_to_yaml(job), ["topology=tp3"]).topology.dp is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment=demo", "a recipe cannot be laid over a run"),
        ("~steps", "nothing can be left out"),
        ("stepz=1", "the nearest is 'steps'"),
        ("seed=${nope}", "cannot be resolved"),
        ("seed=-1", "seed=-1 should be at least 0"),
    ],
)
def test_wrong_resume_overrides_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override_job(job_to_yaml(JobConfig()), [override])


@pytest.mark.parametrize(
    ("override", "is_same"),
    [
        ("cluster=one", True),
        ("topology.tp=3", True),
        ("metrics=tensorboard", True),
        ("memory.recompute=full", True),
        ("batch.micro_sequences=2", True),
        ("optimizer.distributed=true", True),
        ("checkpoint.every_steps=7", True),
        ("run_dir=elsewhere", True),
        ("steps=101", True),
        ("steps=99", False),
        ("seed=1", False),
        ("optimizer.lr=1", False),
        ("batch.global_sequences=16", False),
        ("data.path=x", False),
        ("tuner.r=8", False),
        ("precision=bf16", False),
    ],
)
def test_which_changes_leave_a_run_the_same(override: str, is_same: bool) -> None:
    assert same_run(JobConfig(), compose_job([override])) is is_same


@pytest.mark.parametrize(
    "value", [None, True, 3, 0.001, "plain", "/a/b-c.d", "a b", "it's", "(a|b).*\\d", "null", "7", "a\\", "\\'"]
)
@pytest.mark.parametrize("key", ["run_dir", "tuner.targets", "optimizer.lr", "steps", "topology.sp"])
def test_a_value_written_as_an_override_reads_back_as_itself(key: str, value: Any) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(f"{key}={as_override(value)}").value()
    assert parsed == value and type(parsed) is type(value)


def test_a_worker_reads_its_job_without_hydra_torch_or_transformers() -> None:
    code = (
        "import sys; from orchestrator.config.loading import job_from_yaml; job_from_yaml('steps: 3');"
        "print([name for name in ('hydra', 'omegaconf', 'torch', 'transformers', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_composing_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose_job(["steps=3"])
    assert list(tmp_path.iterdir()) == [] and Path.cwd() == tmp_path
