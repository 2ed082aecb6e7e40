"""The megatron engine: megatron-core's model, schedules, gradient buffers and optimizer, driven one step at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel import mappings

from parallel import names
from parallel.balancing import BalancingClock
from parallel.device import cuda_type_names, current_device
from parallel.engine import Accepts, EngineSpec, MicroBatch, StepResult, TensorReader, always
from parallel.engines import megatron_galore as galore
from parallel.engines import megatron_model as models
from parallel.engines import megatron_pissa as pissa
from parallel.engines import megatron_rates as rates
from parallel.engines import megatron_state as states
from parallel.engines.megatron_base import SharedBase
from parallel.engines.megatron_experts import balance_routers, count_experts_once, shift_biases
from parallel.groups import Groups
from parallel.host_memory import keep_freed_memory
from parallel.loss import HeadAdapter, VocabShard, bound_, head_logits, summed_loss
from parallel.seeding import DropoutClock
from parallel.sequence import SequenceCut, in_order
from parallel.shards import Piece, Shard

# A learning rate is given at every step; megatron-core only wants one to be there.
_PLACEHOLDER_LR = 1.0
# (micro-batch, hidden states of the last stage) -> loss sum, label tokens, both for the log
LossFunction = Callable[[MicroBatch, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class NoGradientError(RuntimeError):
    """A trainable tensor took no part in the first backward pass: the run would not train it."""


class MegatronEngine:
    """A rank of a megatron-core run; see :class:`parallel.engine.Engine` for what each method promises.

    Args:
        base: where the frozen (or initial) weights are read from; None for random ones that only depend on names.
        groups: stay the caller's: :meth:`close` does not close them.
        shared: frozen weights that engines of the same base have in common; what is not in it yet is put there.
    """

    def __init__(
        self, spec: EngineSpec, groups: Groups, base: TensorReader | None, shared: SharedBase | None = None
    ) -> None:
        keep_freed_memory()
        self._spec, self._groups = spec, groups
        self._cut = SequenceCut(groups.topology.cp, groups.coordinate("cp"))
        self._clock = DropoutClock(spec.seed, spec.sequence_tokens, self._cut)
        self._balancing = BalancingClock()
        self._chunks = models.build_chunks(spec, groups, self._clock, on_host=bool(shared))
        balance_routers(self._chunks, spec, groups, self._balancing)
        there = shared.adopted_by(self._chunks) if shared else frozenset[int]()
        models.fill_base(spec, groups, self._chunks, base, there)
        self._pgs = models.process_groups(groups)
        self._device = current_device()
        for chunk in self._chunks:
            chunk.to(self._device)
        if shared is not None:
            shared.add(self._chunks)
        models.start_adapters(self._chunks)
        self._started = spec.lora is None or spec.lora.init == "default"
        self._base = None if self._started else base  # an open reader keeps the pages of its files in memory
        self._config = self._chunks[0].config
        self._wrapped = [self._wrap(chunk) for chunk in self._chunks]
        self._optimizer = self._build_optimizer()
        states.create_moments(self._optimizer)
        self._steps = 0
        self._checked = False

    def train_step(
        self, microbatches: Sequence[MicroBatch], learning_rate: float, accepts: Accepts = always
    ) -> StepResult:
        """Run one optimizer step, or leave everything as it is where ``accepts`` refuses it.

        Raises:
            NoGradientError: in the first step, a trainable tensor got no gradient.
        """
        self._start()
        for chunk in self._wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        watch = None if self._checked else _GradientWatch(self._chunks)
        losses = self._run_schedule(microbatches, forward_only=False)
        if watch is not None:
            watch.finish()
            self._checked = True
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_mult"]
        loss, tokens = self._global_loss(losses)
        with cuda_type_names():
            norm = states.gradients_ready(self._optimizer)
            is_good = accepts(loss, norm)
            if is_good:
                states.step(self._optimizer, self._spec.adam.clip_norm, norm)
        shift_biases(self._chunks, self._spec, self._groups, is_good)
        self._steps += is_good
        return StepResult(loss, tokens, norm, is_good)

    def evaluate(self, microbatches: Sequence[MicroBatch]) -> StepResult:
        """The loss of these micro-batches without learning."""
        self._start()
        for chunk in self._wrapped:
            chunk.eval()
        with torch.no_grad():
            losses = self._run_schedule(microbatches, forward_only=True)
        loss, tokens = self._global_loss(losses)
        return StepResult(loss, tokens, 0.0)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Whole logits ``[sequences, tokens, vocab]`` in fp32 on the ranks of the last stage, None on the others."""
        self._start()
        found: list[torch.Tensor] = []

        def collect(batch: MicroBatch, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            adapter = self._head_adapter(hidden)
            if self._spec.sp:
                hidden = mappings.gather_from_sequence_parallel_region(hidden, group=self._groups.by_name["tp"])
            local = head_logits(hidden, self._head(), adapter)
            bound_(local, self._spec.model.logit_cap)
            rows = in_order(self._gathered(torch.cat(self._gathered(local, "tp").unbind(0), dim=-1), "cp"))
            found.append(rows[..., : self._spec.model.vocab].transpose(0, 1))
            return hidden.new_zeros(()), torch.tensor(0, dtype=torch.int), hidden.new_zeros(2)

        for chunk in self._wrapped:
            chunk.eval()
        with torch.no_grad():
            batch = MicroBatch(tokens, torch.full_like(tokens, -100), tuple(range(tokens.shape[0])))
            rounds = self._groups.topology.pp if self._spec.vpp else 1  # the interleaved schedule runs so many at least
            self._run_schedule([batch] * rounds, forward_only=True, loss=collect)
        return found[0] if found else None

    def shards(self) -> Iterator[Shard]:
        """Every trained tensor and its moments on this rank."""
        self._start()
        for parameter, pieces in self._trained():
            yield from states.state_shards(self._optimizer, parameter, pieces)
            if self._spec.model.tied_embeddings and pieces[0].name == names.ADAPTER + names.EMBEDDING:
                for piece in pieces:  # PEFT wants a tied head beside the embedding that it is
                    name = names.ADAPTER + names.HEAD
                    yield Shard(name, "weight", piece.shape, piece.box, parameter.data[piece.local.slices])

    def load(self, reader: TensorReader, *, moments: bool) -> None:
        """Fill the training state from logical tensors."""
        self._started, self._base = True, None
        with torch.no_grad():
            has_master = set()
            for shard in self.shards():
                if shard.kind == "weight" or moments:
                    shard.data.copy_(reader.read(shard.name, shard.kind, shard.box))
                    has_master |= {shard.kind} & {"master"}
            if not has_master:
                self._optimizer.reload_model_params()

    @property
    def optimizer_steps(self) -> int:
        """Steps that Adam has counted."""
        return self._steps

    def set_optimizer_steps(self, steps: int) -> None:
        """Set Adam's count after a load."""
        self._steps = steps
        states.set_steps(self._optimizer, steps)

    def close(self) -> None:
        """Drop the model and the optimizer."""
        self._chunks.clear()
        self._wrapped.clear()
        del self._optimizer

    def _start(self) -> None:
        """Compute a start that takes long from the base's weights, unless a state was loaded instead; once."""
        if not self._started:
            pissa.start(self._spec, self._groups, self._chunks, self._base)
            self._optimizer.reload_model_params()
            self._started, self._base = True, None

    def _trained(self) -> Iterator[tuple[torch.nn.Parameter, list[Piece]]]:
        every = models.tensors(self._spec, self._groups, self._chunks)
        for _, entries in groupby(every, key=lambda entry: id(entry[0])):
            listed = list(entries)
            is_base = not listed[0][1].name.startswith(names.ADAPTER)
            if listed[0][0].requires_grad or is_base == (self._spec.lora is None):  # what is fixed is saved as well
                prefix = names.ADAPTER if is_base and self._spec.lora is not None else ""  # as PEFT saves modules
                pieces = [replace(piece, name=prefix + piece.name) for _, piece in listed]
                yield listed[0][0], pieces  # type: ignore[misc]

    def _wrap(self, chunk: models.HiddenGPTModel) -> DistributedDataParallel:
        config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            use_distributed_optimizer=self._spec.adam.distributed,
            check_for_nan_in_grad=False,
        )
        return DistributedDataParallel(config=self._config, ddp_config=config, module=chunk, pg_collection=self._pgs)

    def _build_optimizer(self) -> MegatronOptimizer:
        adam = self._spec.adam
        adapters_only = self._spec.lora is not None and not self._spec.lora.saved  # which are fp32
        sixteen_bit = not adapters_only and self._spec.precision != "fp32"
        config = OptimizerConfig(
            optimizer="adam",
            lr=_PLACEHOLDER_LR,
            weight_decay=adam.weight_decay,
            adam_beta1=adam.betas[0],
            adam_beta2=adam.betas[1],
            adam_eps=adam.eps,
            clip_grad=adam.clip_norm,
            bf16=sixteen_bit,
            params_dtype=torch.bfloat16 if sixteen_bit else torch.float32,
            use_distributed_optimizer=adam.distributed,
        )
        with cuda_type_names(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = get_megatron_optimizer(
                config,
                self._wrapped,
                config_overrides=rates.overrides(config, self._chunks),
                use_gloo_process_groups=False,
                pg_collection=self._pgs,
            )
        count_experts_once(built, self._groups)
        if self._spec.galore is not None:
            every = models.tensors(self._spec, self._groups, self._chunks)
            galore.install(states.parts(built), self._spec, self._groups, every)
        return built

    def _run_schedule(
        self, microbatches: Sequence[MicroBatch], forward_only: bool, loss: LossFunction | None = None
    ) -> list[torch.Tensor]:
        """Run megatron-core's schedule; returns ``[loss sum, label tokens]`` per micro-batch on the last stage."""
        chosen = loss or self._loss
        topology = self._groups.topology
        sequences, tokens = microbatches[0].tokens.shape

        def forward_step(batches: Iterator[tuple[int, MicroBatch]], chunk: torch.nn.Module) -> tuple[Any, Any]:
            number, batch = next(batches)
            self._clock.announce(number, batch.sample_ids)
            self._balancing.announce(number, batch.labels)
            positions = torch.arange(batch.tokens.shape[1], device=self._device).expand_as(batch.tokens)
            here = self._cut.take(batch.tokens.to(self._device), 1)
            hidden = chunk(here, self._cut.take(positions, 1), None)
            return hidden, lambda output: chosen(batch, output)

        self._clock.begin_step()
        schedule = get_forward_backward_func(topology.pp, self._spec.vpp)
        iterators = [iter(list(enumerate(microbatches))) for _ in self._wrapped]
        return schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._wrapped if len(iterators) > 1 else self._wrapped[0],
            num_microbatches=len(microbatches),
            seq_length=tokens,
            micro_batch_size=sequences,
            forward_only=forward_only,
            p2p_communicator=P2PCommunicator(self._groups.by_name["pp"], self._config),
            pg_collection=self._pgs,
        )

    def _loss(self, batch: MicroBatch, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sum of the losses, count of label tokens and both for the log, of one micro-batch on the last stage."""
        group, adapter = self._groups.by_name["tp"], self._head_adapter(hidden)
        if self._spec.sp:
            hidden = mappings.gather_from_sequence_parallel_region(hidden, group=group)
        elif self._groups.size("tp") > 1:
            hidden = mappings.copy_to_tensor_model_parallel_region(hidden, group=group)
        labels = self._cut.take(batch.labels.to(self._device), 1).t()
        total, count = summed_loss(
            hidden, self._head(), labels, self._vocab_shard(), self._spec.model.logit_cap, adapter
        )
        tokens = torch.tensor(count, dtype=torch.int, device=self._device)
        return total, tokens, torch.stack([total.detach().double(), tokens.double()])

    def _gathered(self, local: torch.Tensor, axis: str) -> torch.Tensor:
        """The equally shaped tensors of all ranks along an axis, stacked."""
        shares = [torch.empty_like(local) for _ in range(self._groups.size(axis))]
        dist.all_gather(shares, local.contiguous(), group=self._groups.by_name[axis])
        return torch.stack(shares)

    def _head(self) -> torch.Tensor:
        return self._chunks[-1].head_weight()

    def _head_adapter(self, hidden: torch.Tensor) -> HeadAdapter | None:
        adapter = self._chunks[-1].head_adapter
        return None if adapter is None else adapter.of(hidden)

    def _vocab_shard(self) -> VocabShard:
        topology = self._groups.topology
        piece = names.vocab_piece(names.HEAD, self._spec.model, topology.tp, self._groups.coordinate("tp"))
        return VocabShard(piece.box.offset[0], piece.box.size[0], self._groups.by_name["tp"])

    def _global_loss(self, losses: list[torch.Tensor]) -> tuple[float, int]:
        """The mean loss over the global batch's label tokens, on every rank."""
        total = torch.zeros(2, dtype=torch.float64, device=self._device)
        if losses and self._groups.index("tp") == 0:
            total += torch.stack(losses).sum(dim=0)
        dist.all_reduce(total, group=self._groups.by_name["world"])
        loss_sum, count = total.tolist()
        return loss_sum / max(count, 1.0), int(count)


class _GradientWatch:
    """Notes which trainable tensors a backward pass reaches."""

    def __init__(self, chunks: list[models.HiddenGPTModel]) -> None:
        self._silent: dict[int, str] = {}
        self._handles = []
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if parameter.requires_grad:
                    self._silent[id(parameter)] = name
                    self._handles.append(parameter.register_hook(self._heard(id(parameter))))

    def _heard(self, key: int) -> Callable[[torch.Tensor], None]:
        def note(gradient: torch.Tensor) -> None:
            self._silent.pop(key, None)

        return note

    def finish(self) -> None:
        """Check and take the hooks away."""
        for handle in self._handles:
            handle.remove()
        if self._silent:
            missing = sorted(self._silent.values())
            raise NoGradientError(
                f"{len(missing)} trainable tensors got no gradient in the first step, first {missing[0]}"
            )
