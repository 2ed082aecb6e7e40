"""What a rank does at this moment, in a line: which collective it waits in, of which group, and where in the code."""

from __future__ import annotations

import linecache
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

COLLECTIVES = "distributed_c10d.py"
PIPELINE = "pipeline_parallel/p2p_communication.py"
NAMELESS = ("", "undefined", "default_pg")


def tell() -> str:
    """What the main thread does; its whole stack goes into this rank's log."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    print("asked what it does:\n" + "".join(traceback.format_stack(frame)), file=sys.__stderr__, flush=True)
    return story(frame)


def story(frame: FrameType) -> str:
    """What a stack of Python frames is at, innermost first.

    Example:
        >>> story(sys._getframe()).startswith("is at ")
        True
    """
    frames = list(_outwards(frame))
    place = next((one for one in frames if not _is_of_torch(one)), frame)
    where = f"at {_file(place)}:{place.f_lineno} in {place.f_code.co_name}"
    if (waits := next((one for one in frames if _is_collective(one)), None)) is not None:
        return f"waits in {waits.f_code.co_name} of {_group(waits.f_locals['group'])} {where}"
    if (waits := next((one for one in frames if _is_of_pipeline(one)), None)) is not None:
        return f"waits in {waits.f_code.co_name} of {_group(waits.f_locals['self'].pp_group)} {where}"
    if ".wait(" in linecache.getline(frame.f_code.co_filename, frame.f_lineno):  # of a collective that was only started
        return f"waits in wait {where}"
    return f"is {where}"


def is_waiting(frame: FrameType) -> bool:
    """Whether a stack of Python frames waits for other ranks: in a collective, or for what a pipeline sends."""
    return any(one.f_code.co_filename.endswith((COLLECTIVES, PIPELINE)) for one in _outwards(frame))


def _is_of_pipeline(frame: FrameType) -> bool:
    """Whether a frame is one of a pipeline's sends and receives; it waits for them in C, so none of torch's is seen."""
    code = frame.f_code
    return code.co_filename.endswith(PIPELINE) and code.co_name[0] != "_" and "self" in frame.f_locals


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_of_torch(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in ("torch", "threading")


def _is_collective(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_filename.endswith(COLLECTIVES) and code.co_name[0] != "_" and "group" in frame.f_locals


def _group(group: Any) -> str:
    """``tp (ranks 0, 1)``; a group without a name, or none, is all ranks or is told by its ranks."""
    import torch.distributed as dist

    name = getattr(group, "group_desc", "")
    members = [str(rank) for rank in dist.get_process_group_ranks(group)]
    return f"{'the world' if name in NAMELESS else name} (ranks {', '.join(members)})"


def _file(frame: FrameType) -> str:
    """The module's file, as an import would find it."""
    file = frame.f_code.co_filename
    roots = sorted((root for root in sys.path if root and file.startswith(f"{root}/")), key=len)
    return file.removeprefix(f"{roots[-1]}/") if roots else file
