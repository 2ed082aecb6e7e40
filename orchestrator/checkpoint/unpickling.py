"""The ways in which a pickle is opened here; none runs what is in it."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from orchestrator.checkpoint.tensor_file import DTYPE_CODES

_CHECKPOINT = "torch.distributed.checkpoint"
RECORDS = {
    *((f"{_CHECKPOINT}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_CHECKPOINT}.metadata", f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    (f"{_CHECKPOINT}.filesystem", "_StoragePrefix"),
    *((f"{_CHECKPOINT}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType")),
    *((f"{_CHECKPOINT}.planner", f"{kind}WriteData") for kind in ("Tensor", "BytesIO")),
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    *(("megatron.core.dist_checkpointing.strategies.torch", name) for name in ("MCoreMetadata", "MCoreSavePlan")),
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath")),
    *(("pathlib._local", name) for name in ("PosixPath", "WindowsPath")),
}


def _plain_text(value: object) -> str:
    """The text itself: ``str`` would write out whatever it is given, however long that gets."""
    if type(value) is not str:
        raise pickle.UnpicklingError(f"it names a layout by a {type(value).__name__}")
    return value


PLAIN = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _plain_text,
    ("collections", "OrderedDict"): dict,
}
# What no such list has: room made before it is filled, objects from elsewhere.
REFUSED_CODES = {
    code[0]
    for code in (
        *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.PERSID, pickle.BINPERSID),
        *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ),
    )
}
# What bytes that are no such pickle make an unpickler or torch's loader raise.
BROKEN = (
    *(pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError),
    *(ArithmeticError, MemoryError, struct.error),  # of lengths that are no lengths
)


def load_tensors(file: Path | IO[bytes]) -> Any:
    """What ``torch.save`` wrote, by torch's weights-only unpickler. Raises BROKEN.

    A path is mapped, not read, but for the form of torch before 1.6, which is no archive and cannot be.
    """
    mapped = isinstance(file, Path) and zipfile.is_zipfile(file)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def reason(error: BaseException) -> str:
    """The first line of an error, for torch explains itself at length."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class _Record:
    """Stands in for an object of a class that is never made: keeps what the pickle gives it, and does nothing."""

    def __init__(self, *arguments: object) -> None:
        self.state: Any = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state


class ListUnpickler(pickle._Unpickler):  # the one in Python
    """Opens the list of tensors of a torch_dist folder: knows the names in RECORDS and PLAIN, and torch's dtypes.

    None of the classes of RECORDS is made, or even touched: a pickle could set attributes of a class that it reaches.
    The unpickler in C makes room for as many objects as a pickle says it will remember: 6 bytes can take all memory.
    """

    dispatch = {  # noqa: RUF012  as its parent has it
        code: load for code, load in pickle._Unpickler.dispatch.items() if code not in REFUSED_CODES
    }

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._made: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in RECORDS:
            return self._made.setdefault((module, name), type(name, (_Record,), {}))
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return DTYPE_CODES.get(dtype, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no list of tensors needs")


class _Anything(_Record):
    """A record that also lets what a pickle puts into it go by."""

    state: Any = ()

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...

    extend = add = append


class ValuesUnpickler(ListUnpickler):
    """Opens a pickle of plain values among others: those stay, and whatever a class or a function makes is a record.

    The record's ``state`` are the arguments, its class has the name. A tensor's storage is what says where it lies.
    """

    dispatch = {  # noqa: RUF012  as its parent has it
        **ListUnpickler.dispatch,
        pickle.BINPERSID[0]: pickle._Unpickler.dispatch[pickle.BINPERSID[0]],
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except pickle.UnpicklingError:
            return self._made.setdefault((module, name), type(name, (_Anything,), {}))

    def persistent_load(self, place: object) -> object:
        return place
