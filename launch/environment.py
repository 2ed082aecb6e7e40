"""The one file that reads environment variables: who this process is, and where caches lie."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TERMINAL_VARIABLE = "ISOTRAIN_TERMINAL"
MEETING_VARIABLE = "ISOTRAIN_MEETING"
MEETING_HOST_VARIABLE = "ISOTRAIN_MEETING_HOST"
CROWDED = 1.5  # threads for each core, from which on they are said to be too many
TELLING = (
    *("OMP_", "MKL_", "CUDA_", "CUBLAS_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "NVTE_"),
    *("HF_", "ISOTRAIN_", "WANDB_", "SLURM_JOB_", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_RESTART_COUNT"),
)


class LaunchError(ValueError):
    """Processes cannot be started as asked; ``hint`` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class RankEnvironment:
    """Who this process is among ``world_size`` processes (global rank) and on its node (local rank)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def rank_environment(variables: Mapping[str, str] | None = None) -> RankEnvironment | None:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun sets them; None outside of a launch.

    Slurm sets its own for every task, also for a shell, so they count only where isotrain has started the tasks.

    Raises:
        LaunchError: a variable is no whole number, or the rank is not below the world size.
    Example:
        >>> rank_environment({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
        RankEnvironment(rank=1, world_size=4, local_rank=1, local_world_size=4)
        >>> rank_environment({}) is None
        True
    """
    known = os.environ if variables is None else variables
    if MEETING_VARIABLE in known and "SLURM_PROCID" in known:
        return _task_of_slurm(known)
    if "RANK" not in known or "WORLD_SIZE" not in known:
        return None
    rank, world_size = _whole(known, "RANK"), _whole(known, "WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise LaunchError(
            f"RANK={rank} is not below WORLD_SIZE={world_size}", "start with torchrun, or unset RANK and WORLD_SIZE"
        )
    local_rank = _whole(known, "LOCAL_RANK") if "LOCAL_RANK" in known else rank
    local_world_size = _whole(known, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in known else world_size
    return RankEnvironment(rank, world_size, local_rank, local_world_size)


def restarts_in_one_store(variables: Mapping[str, str] | None = None) -> int:
    """How often torchrun may start ranks again that then meet in the store of the attempt before; 0: never.

    Example:
        >>> told = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
        >>> restarts_in_one_store(told), restarts_in_one_store(told | {"TORCHELASTIC_USE_AGENT_STORE": "False"})
        (3, 0)
    """
    known = os.environ if variables is None else variables
    shared = known.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return _whole(known, "TORCHELASTIC_MAX_RESTARTS") if shared and "TORCHELASTIC_MAX_RESTARTS" in known else 0


def _task_of_slurm(known: Mapping[str, str]) -> RankEnvironment:
    """Who a task of an srun step is. Slurm counts the tasks of nodes in its short form: ``4(x2),3``."""
    counts: list[int] = []
    for part in known["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return RankEnvironment(
        rank=_whole(known, "SLURM_PROCID"),
        world_size=_whole(known, "SLURM_NTASKS"),
        local_rank=_whole(known, "SLURM_LOCALID"),
        local_world_size=counts[_whole(known, "SLURM_NODEID")],
    )


def meeting_place(variables: Mapping[str, str] | None = None) -> tuple[Path, str] | None:
    """Where ranks that isotrain has started on Slurm meet: the file that says it, and the first rank's host.

    Example:
        >>> meeting_place({"ISOTRAIN_MEETING": "/run/slurm/meeting.json", "ISOTRAIN_MEETING_HOST": "10.0.0.7"})
        (PosixPath('/run/slurm/meeting.json'), '10.0.0.7')
        >>> meeting_place({}) is None
        True
    """
    known = os.environ if variables is None else variables
    file = known.get(MEETING_VARIABLE)
    return (Path(file), known[MEETING_HOST_VARIABLE]) if file else None


def slurm_step(variables: Mapping[str, str] | None = None) -> tuple[str, int, int] | None:
    """The name of the srun step that this process is a task of, which task, and of how many; None outside of one.

    Example:
        >>> slurm_step({"SLURM_JOB_ID": "42", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"})
        ('42.0', 1, 4)
        >>> slurm_step({"SLURM_JOB_ID": "42"}) is None
        True
    """
    known = os.environ if variables is None else variables
    if "SLURM_JOB_ID" not in known or "SLURM_STEP_NUM_TASKS" not in known:
        return None
    name = f"{known['SLURM_JOB_ID']}.{known['SLURM_STEP_ID']}"
    return name, _whole(known, "SLURM_PROCID"), _whole(known, "SLURM_STEP_NUM_TASKS")


def slurm_variables() -> dict[str, str]:
    """What Slurm has told this process."""
    return {name: value for name, value in os.environ.items() if name.startswith("SLURM")}


def telling_variables(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that change how a run computes or where it finds things, by name; some may be secrets.

    Example:
        >>> telling_variables({"OMP_NUM_THREADS": "2", "NCCL_DEBUG": "INFO", "EDITOR": "vi"})
        {'NCCL_DEBUG': 'INFO', 'OMP_NUM_THREADS': '2'}
    """
    known = os.environ if variables is None else variables
    return {name: known[name] for name in sorted(known) if name.startswith(TELLING)}


def become_rank(rank: int, world_size: int) -> None:
    """Make this process rank ``rank`` of ``world_size`` on one machine, computing with one thread."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ["OMP_NUM_THREADS"] = "1"


def _whole(variables: Mapping[str, str], name: str) -> int:
    try:
        return int(variables[name])
    except ValueError:
        raise LaunchError(
            f"{name}={variables[name]!r} is no whole number", f"start with torchrun, or unset {name}"
        ) from None


def isotrain_cache(variables: Mapping[str, str] | None = None) -> Path:
    """Where isotrain keeps models: $ISOTRAIN_CACHE, else $XDG_CACHE_HOME/isotrain, else ~/.cache/isotrain.

    Example:
        >>> isotrain_cache({"ISOTRAIN_CACHE": "/scratch/isotrain"}).as_posix()
        '/scratch/isotrain'
    """
    known = os.environ if variables is None else variables
    if folder := known.get("ISOTRAIN_CACHE"):
        return Path(folder).expanduser()
    return Path(known.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "isotrain"


def profiles_folder(variables: Mapping[str, str] | None = None) -> Path:
    """Where measured profiles of machines lie: $ISOTRAIN_PROFILES, else ``profiles`` in isotrain's cache.

    Example:
        >>> profiles_folder({"ISOTRAIN_CACHE": "/scratch"}).as_posix()
        '/scratch/profiles'
    """
    known = os.environ if variables is None else variables
    return Path(known.get("ISOTRAIN_PROFILES") or isotrain_cache(known) / "profiles").expanduser()


def ledger_file(variables: Mapping[str, str] | None = None) -> Path | None:
    """Where runs are noted: $ISOTRAIN_LEDGER (empty: nowhere), else ``ledger.sqlite`` in isotrain's cache.

    Example:
        >>> ledger_file({"ISOTRAIN_CACHE": "/scratch"}), ledger_file({"ISOTRAIN_LEDGER": ""})
        (PosixPath('/scratch/ledger.sqlite'), None)
    """
    known = os.environ if variables is None else variables
    if "ISOTRAIN_LEDGER" in known:
        return Path(known["ISOTRAIN_LEDGER"]).expanduser() if known["ISOTRAIN_LEDGER"] else None
    return isotrain_cache(known) / "ledger.sqlite"


def hugging_face_cache(variables: Mapping[str, str] | None = None) -> Path:
    """Where huggingface_hub keeps snapshots: $HF_HUB_CACHE, else $HF_HOME/hub, else ~/.cache/huggingface/hub.

    Example:
        >>> hugging_face_cache({"HF_HOME": "/scratch/hf"}).as_posix()
        '/scratch/hf/hub'
    """
    known = os.environ if variables is None else variables
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := known.get(name):
            return Path(folder).expanduser()
    home = known.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    return Path(known.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def terminal_descriptor(variables: Mapping[str, str] | None = None) -> int | None:
    """The file descriptor of the launcher's standard error in a rank that it has started; None without launcher.

    Example:
        >>> terminal_descriptor({"ISOTRAIN_TERMINAL": "0"}), terminal_descriptor({})
        (0, None)
    """
    number = (os.environ if variables is None else variables).get(TERMINAL_VARIABLE)
    return int(number) if number else None


def rank_variables(ranks_on_node: int, cores: int, variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a launched rank needs beside the launcher's own environment; what the user has set stays.

    Threads: the cores are dealt out among the ranks, at least one each. Hugging Face libraries stay off the network.
    torch asks for huge pages for large tensors (8% more tokens/s in bf16 on a CPU, no more memory).

    Example:
        >>> rank_variables(4, 10, {})["OMP_NUM_THREADS"]
        '2'
        >>> "OMP_NUM_THREADS" in rank_variables(4, 10, {"OMP_NUM_THREADS": "8"})
        False
    """
    known = os.environ if variables is None else variables
    wanted = {
        "OMP_NUM_THREADS": str(max(1, cores // ranks_on_node)),
        "HF_HUB_OFFLINE": "1",
        "THP_MEM_ALLOC_ENABLE": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return {name: value for name, value in wanted.items() if name not in known}


def crowding(ranks_on_node: int, cores: int, variables: Mapping[str, str] | None = None) -> str:
    """What to say where the user's OMP_NUM_THREADS is far too much for the ranks of a node together; else empty.

    OpenMP's threads spin while they wait for each other: with twice as many as cores, a step of 1 s took 38 s.

    Example:
        >>> crowding(4, 10, {"OMP_NUM_THREADS": "8"})
        'OMP_NUM_THREADS=8 is 32 threads of 4 ranks on 10 cores, and every step will be slow: set 2, or leave it unset'
        >>> crowding(4, 10, {"OMP_NUM_THREADS": "3"}), crowding(4, 2, {"OMP_NUM_THREADS": "1"}), crowding(4, 2, {})
        ('', '', '')
    """
    threads = wanted_threads(variables) or 1
    if threads == 1 or ranks_on_node * threads < CROWDED * cores:
        return ""
    whole = f"OMP_NUM_THREADS={threads} is {ranks_on_node * threads} threads of {ranks_on_node} ranks on {cores} cores"
    return f"{whole}, and every step will be slow: set {max(1, cores // ranks_on_node)}, or leave it unset"


def wanted_threads(variables: Mapping[str, str] | None = None) -> int | None:
    """How many threads a rank shall compute with (OMP_NUM_THREADS); None: the library's own choice.

    Example:
        >>> wanted_threads({"OMP_NUM_THREADS": "4"}), wanted_threads({})
        (4, None)
    """
    known = os.environ if variables is None else variables
    return _whole(known, "OMP_NUM_THREADS") if known.get("OMP_NUM_THREADS") else None


def scheduler_job(variables: Mapping[str, str] | None = None) -> str:
    """The scheduler's name of the job that this process belongs to; empty outside of one.

    Example:
        >>> scheduler_job({"SLURM_JOB_ID": "42"}), scheduler_job({"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "1"})
        ('Slurm job 42', 'Slurm job 42, restart 1')
    """
    known = os.environ if variables is None else variables
    job, restart = known.get("SLURM_JOB_ID"), known.get("SLURM_RESTART_COUNT", "0")
    again = f", restart {restart}" if restart != "0" else ""
    return f"Slurm job {job}{again}" if job else ""


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_devices(count: int, variables: Mapping[str, str] | None = None) -> list[str]:
    """The names by which a child can be given some of the ``count`` GPUs that this process sees.

    Example:
        >>> visible_devices(2, {"CUDA_VISIBLE_DEVICES": "4,5"}), visible_devices(2, {})
        (['4', '5'], ['0', '1'])
    """
    known = os.environ if variables is None else variables
    named = [name.strip() for name in known.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def child_environment(additions: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child: ours without what an outer torchrun set, and the additions."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    return inherited | dict(additions)


def submitting_environment(additions: Mapping[str, str]) -> dict[str, str]:
    """:func:`child_environment` for a new job: without what the job says in which this process may run itself."""
    inherited = child_environment(additions)
    foreign = ("SLURM_", "SLURMD_", "ISOTRAIN_MEETING")
    mine = {name: value for name, value in inherited.items() if not name.startswith(foreign) or name == "SLURM_CONF"}
    return {name: value for name, value in mine.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def path_with(folder: Path, variables: Mapping[str, str] | None = None) -> str:
    """PATH with a folder of commands before all others.

    Example:
        >>> path_with(Path("/venv/bin"), {"PATH": "/bin"})
        '/venv/bin:/bin'
    """
    known = os.environ if variables is None else variables
    return os.pathsep.join([str(folder), *(part for part in [known.get("PATH", "")] if part)])


def wandb_is_offline(variables: Mapping[str, str] | None = None) -> bool:
    """Whether Weights & Biases has no key (WANDB_API_KEY, ~/.netrc) and no WANDB_MODE that says otherwise.

    Example:
        >>> wandb_is_offline({"WANDB_MODE": "online"}), wandb_is_offline({"WANDB_API_KEY": "k"})
        (False, False)
    """
    known = os.environ if variables is None else variables
    if mode := known.get("WANDB_MODE"):
        return mode == "offline"
    if known.get("WANDB_API_KEY"):
        return False
    file = Path(known.get("NETRC") or "~/.netrc").expanduser()
    return not (file.is_file() and "wandb" in file.read_text(errors="replace"))
