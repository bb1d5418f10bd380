"""Chapter 15. The loss: cross entropy without the logits of a batch.

Only answers are learned from, so only their positions need logits; and logits are wide: 512 positions of a
49,152-word vocabulary are 100 MB in float32, their gradient as much again. Here supervised positions go
through the output head in chunks, and each chunk's loss and gradient are finished before the next one
begins::

    hidden (5 positions, D), targets [-100, 17, 4, -100, 9]
    -> 3 positions are kept -> logits of a chunk (<= 256, vocab) -> its loss and d loss / d hidden -> dropped

What stays for the backward pass is the gradient of the hidden states, as large as they are. A frozen head
pays no gradient of its own.

The loss is a *sum* over positions: whoever divides must know how many answers a whole optimizer step holds,
and a mean taken earlier would weigh a short answer's tokens more than a long one's.

Shapes and dtypes: hidden (B, T, D) in the compute dtype; targets (B, T) int64; the head's weight (vocab, D)
in its own dtype. Logits and their softmax are float32. Cost: 4 vocab D FLOPs a supervised position, twice
that with gradient; a chunk of memory.

Before: data. Next: generate.
"""

from typing import Any

import torch
from torch import Tensor

from minqlora.data import IGNORE
from minqlora.matmul import cast_linear, cast_linear_backward
from minqlora.model import Head

CHUNK = 256  # positions whose logits exist at a time: 50 MB of float32 at a vocabulary of 49,152


def supervised_loss(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Return the summed cross entropy over all supervised positions, float32 ().

    hidden: (B, T, D), differentiable. targets: (B, T) int64, the next token at each position, or -100 where
    none is learned. head: the model's output head, whose scale and cap the logits get; its weight receives a
    gradient if it is trained. Zero if no position is supervised.
    """
    kept = targets != IGNORE  # (B, T)
    return LinearCrossEntropy.apply(hidden[kept], targets[kept], head.weight, head.scale, head.softcap)


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of hidden @ weight.T, chunk by chunk, the gradients made in the same pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, scale: float, cap: float | None
    ) -> Tensor:
        """Return the sum. hidden: (n, D); targets: (n,) int64; weight: (vocab, D); scale, cap: of logits."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Float32: a sum over all positions. A frozen head has none.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), CHUNK):
            chunk = slice(start, start + CHUNK)
            logits = cast_linear(hidden[chunk], weight).float().mul_(scale)  # (chunk, vocab)
            if cap is not None:
                logits = logits.div_(cap).tanh_().mul_(cap)
            slope = None if cap is None else 1 - (logits / cap).square()  # of the cap
            wanted = targets[chunk, None]
            log_normalizer = logits.logsumexp(dim=1, keepdim=True)
            total += (log_normalizer - logits.gather(1, wanted)).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax - one-hot, written over the logits
            grad_logits = logits.sub_(log_normalizer).exp_()
            grad_logits.scatter_add_(1, wanted, torch.full_like(log_normalizer, -1.0))
            if slope is not None:
                grad_logits.mul_(slope)
            grad_logits.mul_(scale)
            if grad_hidden is not None:
                grad_hidden[chunk] = cast_linear_backward(grad_logits.to(hidden.dtype), weight)
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, hidden[chunk].float())
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        """Return the gradients of hidden states and weight, made in forward, times that of the sum."""
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None,
            None if grad_weight is None else grad_weight * grad,
            None,
            None,
        )
