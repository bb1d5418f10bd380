"""Chapter 19. The loss: cross entropy without the logits of a batch.

Only answers are learned from, so only their positions need logits; and logits are wide: 512 positions of a
49,152-word vocabulary are 100 MB in float32, their gradient as much again. Here supervised positions go
through the output head in chunks, and each chunk's loss and gradient are finished before the next one
begins::

    hidden (5 positions, D), targets [-100, 17, 4, -100, 9]
    -> 3 positions are kept -> logits of a chunk (<= 256, vocab) -> its loss and d loss / d hidden -> dropped

What stays for the backward pass is the gradient of the hidden states, as large as they are. A frozen head
pays no gradient of its own; a trained one gets its from the same chunks, and so do some tokens' trained rows.

The loss is a *sum* over positions: whoever divides must know how many answers a whole optimizer step holds,
and a mean taken earlier would weigh a short answer's tokens more than a long one's.

Shapes and dtypes: hidden (B, T, D) in the compute dtype; targets (B, T) int64; the head's weight (vocab, D)
in its own dtype. Logits and their softmax are float32. Cost: 4 vocab D FLOPs a supervised position, twice
that with gradient; a chunk of memory.

Before: check. Next: generate.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minqlora.data import IGNORE
from minqlora.lora import TrainedTokens
from minqlora.matmul import cast_linear, cast_linear_backward
from minqlora.model import Head

CHUNK = 256  # positions whose logits exist at a time: 50 MB of float32 at a vocabulary of 49,152


def supervised_loss(hidden: Tensor, targets: Tensor, head: Head | TrainedTokens) -> Tensor:
    """Return the summed cross entropy over all supervised positions, float32 ().

    hidden: (B, T, D), differentiable. targets: (B, T) int64, the next token at each position, or -100 where
    none is learned. head: the model's output head, whose scale and cap the logits get; what is trained of it
    receives a gradient. Zero if no position is supervised.
    """
    kept = targets != IGNORE  # (B, T)
    if isinstance(head, TrainedTokens):
        base, rows, tokens = head.base, head.rows.weight, head.tokens
    else:
        base, rows, tokens = head, hidden.new_empty(0, hidden.shape[-1]), targets.new_empty(0)
    return LinearCrossEntropy.apply(
        hidden[kept], targets[kept], base.weight, base.scale, base.softcap, rows, tokens
    )


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of hidden @ weight.T, chunk by chunk, the gradients made in the same pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        scale: float,
        cap: float | None,
        rows: Tensor,
        tokens: Tensor,
    ) -> Tensor:
        """Return the sum.

        hidden: (n, D). targets: (n,) int64. weight: (vocab, D). scale, cap: of logits. rows: (n_tokens, D),
        in the place of the weight's own for `tokens`, (n_tokens,) int64; there may be none.
        """
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Float32: a sum over all positions. A frozen head has none.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        grad_rows = torch.zeros_like(rows, dtype=torch.float32) if ctx.needs_input_grad[5] else None
        for start in range(0, len(hidden), CHUNK):
            chunk = slice(start, start + CHUNK)
            logits = cast_linear(hidden[chunk], weight)  # (chunk, vocab)
            logits.index_copy_(1, tokens, F.linear(hidden[chunk], rows.to(hidden.dtype)))
            loss, grad_logits = cross_entropy(logits.float(), targets[chunk], scale, cap)
            total += loss
            del logits  # or the next chunk's would be made beside it
            if not any(ctx.needs_input_grad):
                continue
            grad_own = grad_logits[:, tokens]  # (chunk, n_tokens)
            grad_logits.index_fill_(1, tokens, 0.0)  # the weight's rows for them were not used
            if grad_rows is not None:
                grad_rows.addmm_(grad_own.T, hidden[chunk].float())
            if grad_hidden is not None:
                grad_hidden[chunk] = cast_linear_backward(grad_logits.to(hidden.dtype), weight)
                grad_hidden[chunk] += grad_own.to(hidden.dtype) @ rows.to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, hidden[chunk].float())
            del grad_logits
        ctx.save_for_backward(grad_hidden, grad_weight, grad_rows)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden states, weight and rows, made in forward, times that of the sum."""
        of_hidden, of_weight, of_rows = (
            None if made is None else made * grad.to(made.dtype) for made in ctx.saved_tensors
        )
        return of_hidden, None, of_weight, None, None, of_rows, None


def cross_entropy(logits: Tensor, targets: Tensor, scale: float, cap: float | None) -> tuple[Tensor, Tensor]:
    """Return the summed cross entropy () of scaled and capped logits, and its gradient for the logits as they
    came, which is written over them.

    logits: (n, vocab) float32. targets: (n,) int64.
    """
    wanted = targets[:, None]
    if scale != 1.0:
        logits.mul_(scale)
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)
    slope = None if cap is None else 1 - (logits / cap).square()  # of the cap
    top = logits.amax(dim=1, keepdim=True)
    wanted_logits = logits.gather(1, wanted)
    # Row by row and over the logits: a pass over all of them costs more than the arithmetic. The likeliest
    # token's probability, which is never small, tells what the row was divided by.
    probability = torch.softmax(logits, dim=1, out=logits)
    log_normalizer = top - probability.amax(dim=1, keepdim=True).log()
    # d loss / d logits = softmax - one-hot
    gradient = probability.scatter_add_(1, wanted, torch.full_like(top, -1.0))
    if slope is not None:
        gradient.mul_(slope)
    if scale != 1.0:
        gradient.mul_(scale)
    return (log_normalizer - wanted_logits).sum(), gradient
