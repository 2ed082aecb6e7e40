"""A megatron-core run that goes on here: its ``torch_dist`` checkpoint as a run folder, moments and all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from orchestrator.checkpoint.folder import step_name
from orchestrator.checkpoint.layout import LogicalTensor, make_layout
from orchestrator.checkpoint.manifest import FileRecord
from orchestrator.checkpoint.megatron_optimizer import MOMENTS, Numbers, open_states, read_numbers
from orchestrator.checkpoint.megatron_weights import KeyedReader, Source, checkpoint_folder, gathered, sources_in
from orchestrator.checkpoint.out_folder import companions, fresh_folder
from orchestrator.checkpoint.publish import Contents, complete, prepare, publish
from orchestrator.checkpoint.tensor_file import FileWriter
from orchestrator.checkpoint.torch_dist import TorchDistReader
from orchestrator.checkpoint.writing import Written
from parallel import names
from parallel.families import read_model
from parallel.specs import read_hf_config

Sources = dict[str, tuple[KeyedReader, dict[str, Source]]]  # by the kind of what they hold


def import_run(folder: Path, config: Path, out: Path) -> int:
    """Write a torch_dist checkpoint as a run folder that ``isotrain train tuner=full run_dir=OUT`` goes on in.

    Weights stay in their stored types, moments and the masters of 16-bit weights are fp32. Tensor by tensor; the
    largest one is in memory twice at most.

    Args:
        folder, config: as :func:`import_torch_dist` has them.
        out: a new folder.
    Returns:
        The training iterations completed, which are the checkpoint's step.
    Raises:
        ConfigError: the checkpoint is not of the model in ``config``, its optimizer's state is not there or not
            reshardable, or ``out`` is taken.
        DataError: the checkpoint is damaged.
        ResourceError: no space is left.
    """
    spec = read_model(read_hf_config(config))
    reader = TorchDistReader(checkpoint_folder(folder))
    weights = sources_in(reader, spec)
    small = any(source.dtype != "F32" for source in weights.values())
    states = open_states(reader, spec, (*MOMENTS, *(["master"] * small)))
    numbers = read_numbers(reader.folder)
    sources: Sources = {"weight": (reader, weights)}
    sources |= {kind: (state, sources_in(state, spec)) for kind, state in states.items()}
    embedded = weights[names.EMBEDDING].dtype
    layout = make_layout(_tensors(sources), "model", ranks=1)
    token = "import"
    with fresh_folder(out, layout.bytes, [folder, config], {"to": "run"}) as run:
        temporary = run / "checkpoints" / f"{step_name(numbers.iteration)}.tmp-{token}"
        prepare(temporary, layout)
        written = Written({}, {})
        for file in layout.files:
            writer = FileWriter(temporary / file.path, file.entries)
            try:
                for tensor in file.tensors:
                    writer.write(_tensor(sources, tensor))
                written.files[file.path] = FileRecord(writer.bytes, writer.close())
            finally:
                writer.abort()
            written.digests.update({(file.path, key): digest for key, digest in writer.digests.items()})
        contents = Contents("model", _state(numbers), companions(config, embedded), {"imported": "torch_dist"})
        complete(temporary, numbers.iteration, layout, [written], contents)
        publish(temporary, run / "checkpoints" / step_name(numbers.iteration), token)
    return numbers.iteration


def _tensors(sources: Sources) -> Iterator[LogicalTensor]:
    for kind, (_, found) in sources.items():
        for name, source in found.items():
            if kind != "master" or sources["weight"][1][name].dtype != "F32":  # which is its own master
                yield LogicalTensor(name, kind, source.shape, source.dtype if kind == "weight" else "F32")


def _tensor(sources: Sources, tensor: LogicalTensor) -> torch.Tensor:
    reader, found = sources[tensor.kind]
    data = gathered(reader, tensor.name, found[tensor.name])
    return data if isinstance(reader, TorchDistReader) else data.float()


def _state(numbers: Numbers) -> dict[str, object]:
    """What a run goes on from. Its data are other ones than before, so the checkpoint has no word on them."""
    return {
        "step": numbers.iteration,
        "optimizer_steps": numbers.steps,
        "schedule": dict(numbers.hyperparameters),
        "data": None,
    }
