"""Which weights an adapter belongs to: a fingerprint of a model's folder, read in a moment whatever its size."""

from __future__ import annotations

import hashlib
from pathlib import Path

from orchestrator.checkpoint.folder import MANIFEST
from orchestrator.checkpoint.hf_reader import weight_files
from orchestrator.checkpoint.manifest import Manifest
from orchestrator.errors import DataError

SAMPLES, SAMPLE_BYTES = 64, 4096


def fingerprint(folder: Path) -> str:
    """A sha256 over the names, sizes and headers of the weight files, and over samples of each file's data.

    Samples are spread evenly over a file, so that training, quantising or replacing its tensors changes some of them;
    a change of a few bytes may be missed. The folder's place and the files' times do not count.

    Raises:
        ConfigError: there are no weights. OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(weight_files(folder), key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header, size)))
            start = 8 + header
            room = max(0, size - start - SAMPLE_BYTES)
            for sample in range(SAMPLES):
                file.seek(start + room * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def check_base(checkpoint: Path, base: Path) -> None:
    """Find out that a checkpoint's adapter was trained on other weights than those in ``base``, where it says on which.

    Raises:
        DataError: it was; or the manifest is damaged.
    """
    then = Manifest.read(checkpoint / MANIFEST).about.get("base")
    if then and then != (now := fingerprint(base)):
        raise DataError(
            f"{checkpoint} was trained on other weights than {base} holds: fingerprint {then[:12]}, {now[:12]} now",
            f"restore them; the adapter alone: isotrain export {checkpoint} --to peft OUT",
        )
