"""megatron-core's own training: its model, its optimizers, its checkpoints of both; the oracle of torch_dist's moments.

Batches, rates and Adam's numbers are those of a ``Run``, whose own engine is not used.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from parallel.device import cuda_type_names, stand_in_for_cuda
from tests.helpers import megatron_own
from tests.helpers.exported import hf_weights
from tests.helpers.runs import Run, engine_spec, global_batch


@dataclass
class Own:
    """This rank's model and optimizer."""

    run: Run
    style: str
    sharding: str
    model: Any
    optimizer: Any

    def train(self, first: int, stop: int) -> list[float]:
        """Steps ``first`` (from 0) to ``stop``, each one micro-batch; their losses."""
        return [self._step(step) for step in range(first, stop)]

    def _step(self, step: int) -> float:
        rows = global_batch(self.run, step)
        total = sum(int((labels != -100).sum()) for _, labels, _ in rows)
        group = parallel_state.get_data_parallel_group()
        mine = rows[dist.get_rank(group) :: group.size()]
        tokens, labels = (torch.stack([row[part] for row in mine]) for part in (0, 1))
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        losses = self.model(tokens, positions, None, labels=labels.clamp(min=0)).float()
        loss = (losses * (labels != -100)).sum() / total
        (loss * group.size()).backward()  # which DistributedDataParallel averages
        finalize_model_grads([self.model])
        for part in self.optimizer.param_groups:
            part["lr"] = self.run.rate(step)
        with cuda_type_names():
            self.optimizer.step()
        dist.all_reduce(loss := loss.detach(), group=group)
        return float(loss)

    def sharded(self, is_loading: bool = False, content: dict[str, Any] | None = None) -> dict[str, Any]:
        """Model and optimizer, as Megatron-LM hands them to dist_checkpointing."""
        metadata = megatron_own.metadata(self.style) | {"distrib_optim_sharding_type": self.sharding} | (content or {})
        model = self.model.module.sharded_state_dict(metadata=metadata)
        if not self.run.distributed:
            metadata.pop("distrib_optim_sharding_type")
        with cuda_type_names():
            state = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        return {"model": model, "optimizer": state}

    def save(self, out: Path, iteration: int) -> None:
        """Write a torch_dist checkpoint, with what Megatron-LM keeps beside the state."""
        if dist.get_rank() == 0:
            out.mkdir(parents=True)
        dist.barrier()
        beside = argparse.Namespace(lr=1e-3, params_dtype=torch.float32, model_type=ModelType.encoder_or_decoder)
        state = {**self.sharded(), "args": beside, "iteration": iteration, "checkpoint_version": 3.0}
        megatron_own.write(state, out, self.style, content_metadata={"distrib_optim_sharding_type": self.sharding})

    def differing(self, tensors: dict[tuple[str, str], torch.Tensor]) -> list[str]:
        """What is not as in ``tensors`` (by name and kind): weights, and an optimizer's state where it is not flat."""
        wrong = []
        for kind in {kind for _, kind in tensors}:
            named = {name: value for (name, other), value in tensors.items() if other == kind}
            model = self.model.module
            topology, spec = self.run.topology, self.run.model
            for name, parameter, value in megatron_own.expected(model, named, spec, topology, spec.vocab):
                held = self._held(parameter, kind)
                if held is not None and not torch.equal(held.float(), value):
                    wrong.append(f"{kind} of {name}")
        return wrong

    def _held(self, parameter: torch.Tensor, kind: str) -> torch.Tensor | None:
        if kind == "weight" or self.run.distributed:
            return parameter if kind == "weight" else None
        main = getattr(parameter, "main_param", parameter)
        if kind == "master":
            return main
        (part,) = self.optimizer.chained_optimizers
        return part.optimizer.state[main][kind]

    def load(self, folder: Path) -> tuple[int, int]:
        """Load a torch_dist checkpoint by what it says of its content; returns iterations and sequences completed."""
        content = dist_checkpointing.load_content_metadata(str(folder))
        state = dist_checkpointing.load(self.sharded(True, content), str(folder))
        self.model.module.load_state_dict(state["model"], strict=False)
        if self.run.distributed:
            _keep_steps(self.optimizer.chained_optimizers[0])
        self.optimizer.load_state_dict(state["optimizer"])
        scheduler = OptimizerParamScheduler(self.optimizer, 0.0, 1.0, 0.0, 0, 1, "constant", 0.0, 0.0, 1, "constant")
        scheduler.load_state_dict(state["opt_param_scheduler"])
        return state["iteration"], scheduler.num_steps


def _keep_steps(optimizer: Any) -> None:
    """Where torch's Adam stands in for apex's, a tensor has a step of its own, which the distributed optimizer has set
    already when it looks for it in what it loads (KeyError, also in its own checkpoints: megatron-core 0.16.1). What
    it has set is one tensor for all, to which each parameter would add its own step.
    """
    original = optimizer._set_main_param_and_optimizer_states

    def with_step(parameter: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = optimizer.model_param_group_index_map[parameter]
        main = optimizer.param_groups[group]["params"][order]
        step = optimizer.optimizer.state[main]["step"].clone()
        optimizer.optimizer.state[main]["step"] = step
        original(parameter, {**tensors, "step": step.clone()})

    optimizer._set_main_param_and_optimizer_states = with_step


def start(run: Run, hf_folder: Path, style: str, sharding: str) -> Own:
    """A model with the folder's weights, and an optimizer that has taken no step."""
    topology, vocab = run.topology, run.model.vocab
    tracker = get_cuda_rng_tracker()  # attention asks for it, though nothing is dropped
    if "model-parallel-rng" not in tracker.get_states():
        tracker.add("model-parallel-rng", 1)
    model = megatron_own.build(run.model, topology, vocab)
    model.config.finalize_model_grads_func = finalize_model_grads
    with torch.no_grad():
        for _, parameter, value in megatron_own.expected(model, hf_weights(hf_folder), run.model, topology, vocab):
            parameter.copy_(value)
    sixteen_bit = run.precision == "bf16"
    if sixteen_bit:
        model.bfloat16()
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=run.distributed),
        model,
    )
    adam = engine_spec(run).adam
    config = OptimizerConfig(
        optimizer="adam",
        lr=run.learning_rate,
        weight_decay=adam.weight_decay,
        adam_beta1=adam.betas[0],
        adam_beta2=adam.betas[1],
        adam_eps=adam.eps,
        clip_grad=adam.clip_norm,
        bf16=sixteen_bit,
        params_dtype=torch.bfloat16 if sixteen_bit else torch.float32,
        use_distributed_optimizer=run.distributed,
    )
    with cuda_type_names():
        return Own(run, style, sharding, wrapped, get_megatron_optimizer(config, [wrapped]))


def train_and_save(
    run: Run, hf_folder: Path, saved: Path, ended: Path, after: int, style: str, sharding: str
) -> list[float]:
    """Train, save after ``after`` steps and (as a continuation) at the end; the losses of the steps between."""
    stand_in_for_cuda()
    with megatron_own.opened(run.topology):
        own = start(run, hf_folder, style, sharding)
        own.train(0, after)
        own.save(saved, after)
        losses = own.train(after, run.steps)
        if sharding == "fully_reshardable":
            own.save(ended, run.steps)
        return losses


def load_and_go_on(
    run: Run, hf_folder: Path, saved: Path, again: Path, tensors: dict[tuple[str, str], torch.Tensor]
) -> tuple[tuple[int, int], list[str], list[float], list[dict[str, Any]]]:
    """Load a checkpoint, save it again at once, train to the end.

    Returns:
        Iterations and sequences loaded, what then is not one of ``tensors``, losses, and what groups of parameters say.
    """
    stand_in_for_cuda()
    with megatron_own.opened(run.topology):
        own = start(run, hf_folder, "stacked", "fully_reshardable")
        own.train(run.steps, run.steps + 1)  # torch's Adam, which stands in for apex's here, has no state before
        with torch.no_grad():
            for parameter in own.model.parameters():
                parameter.fill_(float("nan"))
        iteration, sequences = own.load(saved)
        own.save(again, iteration)
        wrong, losses = own.differing(tensors), own.train(iteration, run.steps)
        groups = [{**group, "params": None} for group in own.optimizer.param_groups]
        return (iteration, sequences), wrong, losses, groups
