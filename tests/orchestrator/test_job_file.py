"""A job file says what its words would say on a command line, and gives way to what is typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.cli import main
from orchestrator.config.building import job_to_yaml
from orchestrator.config.job_file import with_job_files, words_of
from orchestrator.config.loading import compose_job
from orchestrator.errors import ConfigError

TEXT = """\
model: smollm2_135m
cluster.slurm.partition: gpu
cluster: slurm_4x8
data: {path: "my rows, $(id).jsonl", on_bad_row: skip}
optimizer:
  lr: 1e-4
  betas: [0.9, 0.95]
tuner.targets: [q_proj, v_proj]
run_dir: null
steps: 7
"""
WORDS = [
    *("model=smollm2_135m", "cluster=slurm_4x8", "cluster.slurm.partition=gpu", "data.on_bad_row=skip", "steps=7"),
    *("data.path='my rows, $(id).jsonl'", "optimizer.lr=1e-4", "optimizer.betas=[0.9,0.95]", "run_dir=null"),
    "tuner.targets=[q_proj,v_proj]",
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(TEXT)
    return path


def test_a_file_is_the_words_in_it(file: Path) -> None:
    assert compose_job([str(file)]) == compose_job(WORDS)


@pytest.mark.parametrize("before", [True, False])
def test_what_is_typed_wins_on_either_side_of_the_file(file: Path, before: bool) -> None:
    typed = ["steps=9", "cluster=one"]
    job = compose_job([*typed, str(file)] if before else [str(file), *typed])
    assert job.steps == 9 and job.model.path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert job.cluster == compose_job(["cluster=one"]).cluster  # and nothing of the file's section is left


def test_one_file_lies_over_another(file: Path) -> None:
    (file.parent / "here.yml").write_text("cluster: laptop\nsteps: 3\n")
    job = compose_job([str(file), str(file.parent / "here.yml")])
    assert (job.steps, job.cluster) == (3, compose_job(["cluster=laptop"]).cluster)


@pytest.mark.parametrize(
    "words",
    [
        ["experiment=demo", "seed=5"],
        ["model=deepseek_v2_lite", "cluster=slurm_cpu", "cluster.slurm.prologue=[module,cuda/12]"],
        ["tuner=full", "optimizer.lr_ratios={lm_head:0.1}", "tuner.freeze=['layers\\.(0|1)\\..*']", "data=lighthouse"],
    ],
)
def test_the_job_of_a_run_folder_is_a_job_file(tmp_path: Path, words: list[str]) -> None:
    job = compose_job(words)
    (tmp_path / "job.yaml").write_text(job_to_yaml(job))
    assert compose_job([str(tmp_path / "job.yaml")]) == job


TEXTS = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1)


@settings(max_examples=4)
@given(st.lists(TEXTS, min_size=20, max_size=40).map(lambda texts: ["Yā", "it's", "null", "a\\", "$HOME", *texts]))
def test_any_text_comes_through(texts: list[str]) -> None:
    (word,) = words_of({"cluster": {"slurm": {"extra": texts}}})
    assert compose_job([word]).cluster.slurm.extra == texts


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (None, r"job file .*x\.yaml: No such file", "isotrain init "),
        ("a: [", r"job file .*x\.yaml is no YAML", "KEY: VALUE, a line each"),
        ("- steps=3\n", r"job file .*x\.yaml holds list, not a mapping", "KEY: VALUE, a line each"),
        ("stepz: 3\n", "the nearest is 'steps'", "steps=3"),
        ("optimizer: {learning_rate: 0.1}\n", "here it is 'optimizer.lr'", "optimizer.lr=0.1"),
        ("tuner: qlroa\n", "there is no configs/tuner/qlroa.yaml", "tuner=qlora"),
        ("metrics.api_key: abc\n", "metrics.api_key: a secret does not belong", "export API_KEY=... before"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(tmp_path: Path, text: str | None, message: str, hint: str) -> None:
    file = tmp_path / "x.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        compose_job([str(file)])
    assert raised.value.hint.startswith(hint)


def test_words_without_a_file_stay_as_they_are() -> None:
    words = ["model.path=x", "model=hf", "steps=1"]
    assert with_job_files(words) == words


def test_ranks_by_hand_and_batch_scripts_take_files_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[list[str]] = []
    monkeypatch.setattr("orchestrator.torchrun.train_by_hand", lambda words, as_json: got.append(words) or 0)
    monkeypatch.setattr("orchestrator.jobs.allocation.run_allocation", lambda run, words, say: got.append(words) or 0)
    assert main(["allocation", "--run-dir", "", "--", str(file), "cluster=one"]) == 0  # as slurm/train.sbatch does
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", str(file), "cluster=one"]) == 0  # as torchrun does
    assert got[0] == got[1] == with_job_files([str(file), "cluster=one"])
    assert "cluster=one" in got[0] and "model=smollm2_135m" in got[0] and str(file) not in got[0]
