"""Words, paths and variables arrive at every rank as they were typed, through the real sbatch and srun."""

from __future__ import annotations

import json
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from orchestrator.config.building import as_override
from orchestrator.jobs.submit import header, render_script, static_script
from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import ISOTRAIN, ROOT, wait_for
from tests.slurm.conftest import SlurmShell

pytestmark = pytest.mark.slurm
SCRIPT = ROOT / "slurm" / "train.sbatch"
# What `isotrain allocation` is here: the same srun command, for a rank that only says what it got.
STAND_IN = """#!{python}
import os, sys
from pathlib import Path
from launch.environment import slurm_variables
from launch.slurm.allocation import read_allocation
from launch.slurm.commands import host_names
from launch.slurm.step import StepRequest, srun_command
assert sys.argv[1:3] == ["allocation", "--run-dir"] and sys.argv[4] == "--"
program = ("{python}", "-S", "{dump}", os.environ["DUMP_INTO"], sys.argv[3], *sys.argv[5:])
given = read_allocation(slurm_variables())
argv = srun_command(StepRequest(given, tuple(host_names(given.node_list)), 2, program, {{}}, Path(".")))
os.execvp(argv[0], argv)
"""
STRANGE = [
    "two words",
    "it's",
    '"',
    "a,b",
    "$(touch x)",
    "`id`",
    "a\nb",
    "é漢😀",
    "$HOME",
    "\\",
    "%j",
    "#x",
    ";",
    "",
    "*",
    "~",
    "-n",
]
TEXT = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=12)


@pytest.fixture
def stand_in(slurm: SlurmShell, tmp_path: Path) -> dict[str, str]:
    """An environment in which ``isotrain`` is the stand-in."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "isotrain"
    command.write_text(STAND_IN.format(python=sys.executable, dump=Path(__file__).with_name("dump.py")))
    command.chmod(0o755)
    return slurm.environment | {"PATH": f"{tmp_path}/bin:{slurm.environment['PATH']}"}


def sent(slurm: SlurmShell, environment: dict[str, str], folder: Path, script: Path, words: list[str]) -> list[dict]:
    """What the ranks of a job of two nodes got."""
    folder.mkdir()
    into = folder / "into"
    into.mkdir()
    argv = ["sbatch", "--parsable", "-N2", "--exclusive", "--output=into/log", str(script), *words]
    done = subprocess.run(
        argv, cwd=folder, env=environment | {"DUMP_INTO": str(into)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    slurm.wait_for_state(done.stdout.strip(), "COMPLETED", "FAILED", "NODE_FAIL")
    wait_for(lambda: len(list(into.glob("rank-*.json"))) == 4 or "error" in (into / "log").read_text(), 20)
    values = [json.loads((into / f"rank-{rank}.json").read_text()) for rank in range(4)]
    assert [value["host"] for value in values] == ["node1", "node1", "node2", "node2"]
    assert {value["gpus"] for value in values} == {"0,1,2,3,4,5,6,7"}  # a whole node's, though none was asked for
    return values


def test_strange_words_and_variables_arrive(slurm: SlurmShell, stand_in: dict[str, str], tmp_path: Path) -> None:
    variables = {f"STRANGE_{number}": text for number, text in enumerate(STRANGE)}
    for value in sent(slurm, stand_in | variables, tmp_path / "job", SCRIPT, STRANGE):
        assert value["argv"] == ["", *STRANGE]  # no run folder: by hand
        assert value["environment"] == variables


@settings(max_examples=8, deadline=None)
@given(st.lists(TEXT, min_size=20, max_size=40))
def test_any_words_and_variables_arrive(
    slurm: SlurmShell, tmp_path_factory: pytest.TempPathFactory, words: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    command = folder / "bin" / "isotrain"
    command.parent.mkdir()
    command.write_text(STAND_IN.format(python=sys.executable, dump=Path(__file__).with_name("dump.py")))
    command.chmod(0o755)
    environment = slurm.environment | {"PATH": f"{folder}/bin:{slurm.environment['PATH']}"}
    variables = {f"STRANGE_{number}": text for number, text in enumerate(words)}
    for value in sent(slurm, environment | variables, folder / "job", SCRIPT, words):
        assert value["argv"] == ["", *words]
        assert value["environment"] == variables


# What `apptainer` is here: a rank that says what it was told, and what the job is that it reads.
CONTAINER = """#!{python}
import json, os, sys
from pathlib import Path
from orchestrator.config.building import read_job
job = read_job(Path(sys.argv[-1]))
mine = {{name: value for name, value in os.environ.items() if name.startswith("STRANGE")}}
value = {{"argv": sys.argv[1:], "environment": mine, "project": job.metrics.project}}
value["prologue"] = job.cluster.slurm.prologue
Path(os.environ["DUMP_INTO"], "rank-" + os.environ["SLURM_PROCID"] + ".json").write_text(json.dumps(value))
"""
SHOWN = st.characters(blacklist_categories=("Cs", "Cc")) | st.sampled_from("\n\t")  # what a value of a job may hold
FOLDER = st.text(SHOWN.filter(lambda letter: letter not in ",:"), min_size=1, max_size=12)  # that can be bound


@settings(max_examples=2, deadline=None, phases=[Phase.generate])  # a job each: too slow to look for a shorter case
@given(st.text(SHOWN, max_size=40), st.lists(FOLDER, min_size=20, max_size=40))
def test_any_words_of_a_submitted_job_arrive(
    slurm: SlurmShell, tiny_run_model: TinyRun, tmp_path_factory: pytest.TempPathFactory, text: str, folders: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("submitted")
    (folder / "bin").mkdir()
    (folder / "bin" / "apptainer").write_text(CONTAINER.format(python=sys.executable))
    (folder / "bin" / "apptainer").chmod(0o755)
    (folder / "into").mkdir()
    run, image = folder / 'a run; it\'s 100% $(id) "q" é\nnew', "".join(STRANGE) + text
    folders = [word for word in STRANGE if word and not {",", ":"} & set(word)] + folders
    prologue = as_override(["apptainer", image, *folders])
    variables = {f"STRANGE_{number}": word for number, word in enumerate([*STRANGE, image, *folders])}
    typed = tiny_run_model.words(
        cluster="slurm_cpu", cluster__nodes=2, recovery__restarts=0, run_dir=as_override(str(run))
    )
    words = [*typed, f"metrics.project={as_override(image)}", f"cluster.slurm.prologue={prologue}"]
    path = {"PATH": f"{folder}/bin:{slurm.environment['PATH']}", "DUMP_INTO": f"{folder}/into"}
    done = subprocess.run(
        [*ISOTRAIN, "submit", *words, "--json"],
        cwd=folder, env=slurm.environment | path | variables, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    slurm.wait_for_state(json.loads(done.stdout)["job_id"], "COMPLETED", "FAILED")
    for rank in range(2):
        value = json.loads((folder / "into" / f"rank-{rank}.json").read_text())
        bound = ",".join([str(run), *folders])
        assert value["argv"] == ["exec", f"--bind={bound}", image, "isotrain", "worker", str(run)]
        assert value["environment"] == variables
        assert (value["project"], value["prologue"]) == (image, ["apptainer", image, *folders])


@pytest.mark.parametrize("name", ["two words", 'it\'s $(id) "q" `x`', "a,b;#c&d", "é漢\nnew line"], ids=range(4))
def test_a_strange_run_folder_arrives(slurm: SlurmShell, stand_in: dict[str, str], tmp_path: Path, name: str) -> None:
    from orchestrator.config.job import ClusterConfig

    run = tmp_path / name
    (run / "slurm").mkdir(parents=True)
    (run / "slurm" / "prologue").touch()
    script = run / "slurm" / "train.sbatch"
    script.write_text(render_script(static_script(), header(ClusterConfig(nodes=2), run), run))
    for value in sent(slurm, stand_in, run / "cwd", script, []):
        assert value["argv"] == [str(run)]


def test_the_log_of_a_strange_run_folder_is_where_it_is_said(slurm: SlurmShell, tmp_path: Path) -> None:
    run = tmp_path / 'it\'s 100% "odd" $(id)'
    (run / "slurm").mkdir(parents=True)
    job = subprocess.run(
        ["sbatch", "--parsable", "--output=slurm/%j.log", "--wrap", "echo here"],
        cwd=run, env=slurm.environment, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    slurm.wait_for_state(job, "COMPLETED", "FAILED")
    assert (run / "slurm" / f"{job}.log").read_text() == "here\n"


@pytest.mark.parametrize("kind", ["module", "venv", "conda"])
def test_a_prologue_makes_isotrain_known(slurm: SlurmShell, tmp_path: Path, kind: str) -> None:
    from launch.slurm.script import words_file
    from orchestrator.config.job import ClusterConfig

    run, there = tmp_path / "run", tmp_path / "an env"
    (run / "slurm").mkdir(parents=True)
    (there / "bin").mkdir(parents=True)
    (there / "bin" / "isotrain").write_text('#!/bin/sh\necho "from the $KIND: $*"\n')
    (there / "bin" / "isotrain").chmod(0o755)
    activate = f"KIND={kind}; export KIND; PATH='{there}/bin':$PATH; : $UNSET"
    (there / "bin" / "activate").write_text(activate)
    conda = tmp_path / "bin" / "conda"
    conda.parent.mkdir()
    conda.write_text('#!/bin/sh\ncat <<\'EOF\'\nconda() { [ "$*" = "activate an env" ] && ' + activate + "; }\nEOF\n")
    conda.chmod(0o755)
    module = '() { [ "$*" = "load a/1 b/2" ] && ' + activate + "; }"
    environment = slurm.environment | {"PATH": f"{conda.parent}:/usr/bin:/bin", "BASH_FUNC_module%%": module}
    words = {"module": ["a/1", "b/2"], "venv": [str(there)], "conda": ["an env"]}[kind]
    (run / "slurm" / "prologue").write_bytes(words_file([kind, *words]))
    script = run / "slurm" / "train.sbatch"
    script.write_text(render_script(static_script(), header(ClusterConfig(nodes=1), run), run))
    job = subprocess.run(
        ["sbatch", "--parsable", str(script)], cwd=run, env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()
    slurm.wait_for_state(job, "COMPLETED", "FAILED")
    assert (run / "slurm" / f"{job}.log").read_text() == f"from the {kind}: allocation --run-dir {run} --\n"


def test_a_node_without_isotrain_says_so(slurm: SlurmShell, tmp_path: Path) -> None:
    environment = slurm.environment | {"PATH": "/usr/bin:/bin"}
    argv = ["sbatch", "--parsable", "-N1", f"--output={tmp_path}/log", str(SCRIPT), "steps=1"]
    job = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    slurm.wait_for_state(job, "FAILED")
    assert slurm.field(job, "ExitCode") == "64:0"
    assert "isotrain is not on the PATH of node1\nhint: " in (tmp_path / "log").read_text()


def test_the_scripts_are_clean_to_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck not found: apt-get install -y shellcheck")
    scripts = [
        *sorted((ROOT / "slurm").glob("*.sbatch")),
        *sorted((ROOT / "tests" / "golden" / "sbatch").glob("*.sbatch")),
    ]
    done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_letters_that_a_line_may_hold_are_no_shell(slurm: SlurmShell) -> None:
    assert not set(string.whitespace + "$`\\'\"<>#{}") & {letter for letter in map(chr, range(128)) if _plain(letter)}


def _plain(letter: str) -> bool:
    from launch.slurm.script import PLAIN

    return PLAIN.fullmatch(letter) is not None
