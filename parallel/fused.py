"""Hand-written forward and backward passes of what lies between the matrix products: norm, SwiGLU, LoRA's products.

Each does the arithmetic of the plain definition in fewer passes over memory, and keeps less for the backward pass:
the norm one number per row, SwiGLU only its input, a LoRA linear its input and ``A x``. All are elementwise or matrix
products of torch, so they run on every device and under activation recompute. GeGLU is here too, as it is defined.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, silu


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, in fp32 (Zhang and Sennrich 2019, arXiv:1910.07467).

    Example:
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0).square().mean().item()
        1.0
    """
    return _RmsNorm.apply(hidden, weight, eps)


def geglu(gate_up: torch.Tensor) -> torch.Tensor:
    """``gelu(gate) * up`` of ``[..., gate | up]``, gelu by its tanh approximation (Shazeer 2020, arXiv:2002.05202).

    Example:
        >>> geglu(torch.tensor([0.0, 5.0])).tolist()
        [0.0]
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return gelu(gate, approximate="tanh") * up


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of ``[..., gate | up]``, halving the last axis (Shazeer 2020, arXiv:2002.05202).

    Example:
        >>> swiglu(torch.tensor([0.0, 5.0])).tolist()
        [0.0]
    """
    return _SwiGlu.apply(gate_up)


def lora_linear(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    """``x W^T + bias + (x down^T) up^T`` with a frozen W and bias.

    Args:
        hidden: ``[..., in]``; weight: ``[out, in]``; bias: ``[out]``.
        down: ``[k, in]``; up: ``[out, k]``, with LoRA's scale in it. Same dtype as ``hidden``.
    Returns:
        ``[..., out]``.
    """
    return _LoraLinear.apply(hidden, weight, bias, down, up)


def product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``rows @ matrix``; large fp32 products by oneDNN, on some CPUs 3 to 20% faster than torch's default (MKL).

    Small ones go to MKL: oneDNN takes 0.15 ms for a product of any size, and 1 ms where a shape is new, as the rows of
    an expert are in every step.

    Args:
        rows: ``[n, in]``; matrix: ``[in, out]``, best if its transpose or itself is contiguous. No gradients.
    Example:
        >>> product(torch.ones(1, 2), torch.eye(2)).tolist()
        [[1.0, 1.0]]
    """
    large = rows.shape[0] * matrix.numel() >= LARGE
    if not large or _ONEDNN is None or rows.dtype != torch.float32 or rows.device.type != "cpu":
        return rows @ matrix
    return _ONEDNN(rows, matrix.t(), None, "none", [], "")


LARGE = 2**28  # multiplications: some 5 ms of one core
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        if weight.dtype != hidden.dtype:  # Gemma's is fp32 in a 16-bit model too: rounded once
            return (wide * scale * weight).to(hidden.dtype)
        return (wide * scale).to(hidden.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With ``s = 1/rms``, ``h = g * weight``: ``dx = s h - x s^3 mean(h x)`` and ``dweight = sum(g x s)``."""
        hidden, weight, scale = ctx.saved_tensors
        wide = hidden.to(scale.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grads[0] * (wide * scale).to(hidden.dtype)).flatten(0, -2).sum(0)
        weighted = (grads[0] * weight).to(scale.dtype)
        along = (weighted * wide).mean(dim=-1, keepdim=True).mul_(scale.pow(3))
        grad = weighted.mul_(scale).addcmul_(wide, along, value=-1)
        return grad.to(hidden.dtype), grad_weight, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(grads[0], silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=grad_gate)
        return grad


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
    ) -> torch.Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        out = product(rows, weight.t())
        if bias is not None:
            out.add_(bias)
        low = rows @ down.t()
        out.addmm_(low, up.t())
        ctx.save_for_backward(hidden, weight, down, up, low)
        return out.view(*hidden.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, down, up, low = ctx.saved_tensors
        rows, grad = hidden.reshape(-1, hidden.shape[-1]), grads[0].reshape(-1, weight.shape[0])
        grad_low = product(grad, up)
        grad_up = (low.t() @ grad).t()
        grad_down = grad_low.t() @ rows
        if not ctx.needs_input_grad[0]:
            return None, None, None, grad_down, grad_up
        grad_rows = product(grad, weight).addmm_(grad_low, down)
        return grad_rows.view(hidden.shape), None, None, grad_down, grad_up
