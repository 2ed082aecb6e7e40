"""Keys and tokens: never typed as values, because command lines and job files are seen by others."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.errors import ConfigError

WORDS = frozenset(
    [*("key", "apikey", "token", "secret", "password", "passwd", "credential", "credentials"), *("auth", "jwt")]
)
USER_IN_URL = re.compile(r"://[^/@\s]+@")
ASSIGNED = re.compile(r"([A-Za-z_][\w.-]*) *= *(?=[^\s,}\]])")


def refuse_secrets(texts: Sequence[str]) -> None:
    """Refuse values for names like KEY, TOKEN or SECRET; the value is not repeated.

    Raises:
        ConfigError: names the key, and says where secrets go instead.
    Example:
        >>> refuse_secrets(["batch.sequence_tokens=512", "steps=3"])
    """
    for text in texts:
        for name in ASSIGNED.findall(text):
            if re.split(r"[_\W]+", name.lower())[-1] in WORDS:
                last = name.rpartition(".")[2].upper()
                raise ConfigError(
                    f"{name}: a secret does not belong on a command line or in a job file, which others see",
                    f"export {last}=... before, or put {last}=... into a file (chmod 600) and "
                    "cluster.slurm.secrets=FILE",
                )


def without_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables that may be written down: none that is named like a secret, and no user in a URL.

    Example:
        >>> without_secrets({"HF_TOKEN": "t", "WANDB_API_KEY": "k", "HF_ENDPOINT": "https://me:word@hub/x"})
        {'HF_ENDPOINT': 'https://...@hub/x'}
    """
    harmless = {name: text for name, text in variables.items() if not WORDS & set(re.split(r"[_\W]+", name.lower()))}
    return {name: USER_IN_URL.sub("://...@", text) for name, text in harmless.items()}


def read_secrets(file: Path) -> dict[str, str]:
    """The NAME=VALUE lines of a file that only its owner can read; empty lines and ``#`` comments do not count.

    Raises:
        ConfigError: it is not there, others can read it, or a line (which is not repeated) is something else.
    """
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cluster.slurm.secrets={file}: {error.strerror}", "cluster.slurm.secrets=null") from error
    if mode & 0o077:
        raise ConfigError(f"cluster.slurm.secrets={file} has mode {mode:04o}: others can read it", f"chmod 600 {file}")
    values = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ConfigError(f"{file}:{number} is no NAME=VALUE", "WANDB_API_KEY=...")
        values[name] = value
    return values
