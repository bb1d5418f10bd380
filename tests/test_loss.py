"""The chunked loss is torch's cross entropy at the supervised positions, and so is its gradient."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minqlora import loss
from minqlora.data import IGNORE
from minqlora.lora import AdaptedProduct, TrainedTokens
from minqlora.loss import supervised_loss
from minqlora.model import Normalize

D, VOCAB = 24, 37


def problem(supervised: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (2, 11, D), targets with so many supervised in no order, and a head."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 11, D, generator=generator)
    targets = torch.randint(VOCAB, (2, 11), generator=generator)
    targets.view(-1)[torch.randperm(22, generator=generator)[supervised:]] = IGNORE
    return hidden, targets, torch.randn(VOCAB, D, generator=generator)


def head_of(weight: Tensor, scale: float = 1.0, cap: float | None = None) -> Any:
    """What the loss asks of an output head."""
    return SimpleNamespace(weight=weight, scale=scale, softcap=cap)


def loss_and_gradient(hidden: Tensor, targets: Tensor, head: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    hidden = hidden.clone().requires_grad_()
    total = supervised_loss(hidden, targets, head_of(head))
    (gradient,) = torch.autograd.grad(scale * total, hidden)
    return total.detach(), gradient


def dense(hidden: Tensor, targets: Tensor, head: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The oracle: all logits at once, in float32."""
    hidden = hidden.float().requires_grad_()
    logits = (hidden @ head.float().T).flatten(0, 1)
    total = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")
    (gradient,) = torch.autograd.grad(scale * total, hidden)
    return total.detach(), gradient


@pytest.mark.parametrize("chunk", [1, 3, 7, 256])
@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_those_of_cross_entropy_whatever_the_chunk(
    monkeypatch: pytest.MonkeyPatch, chunk: int, head_dtype: torch.dtype
) -> None:
    monkeypatch.setattr(loss, "CHUNK", chunk)
    hidden, targets, head = problem()
    arguments = hidden, targets, head.to(head_dtype), 0.7
    for ours, theirs in zip(loss_and_gradient(*arguments), dense(*arguments), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [3, 256])
@pytest.mark.parametrize(("scale", "cap"), [(0.125, None), (1.0, 2.0), (3.0, 1.5)])
@pytest.mark.parametrize("trained", [False, True])
def test_scale_and_cap_of_the_logits_and_a_trained_head(
    monkeypatch: pytest.MonkeyPatch, chunk: int, scale: float, cap: float | None, trained: bool
) -> None:
    monkeypatch.setattr(loss, "CHUNK", chunk)
    hidden, targets, weight = problem()
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    logits = scale * (hidden @ weight.T)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    total = supervised_loss(hidden, targets, head_of(weight, scale, cap))
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    inputs = (hidden, weight) if trained else (hidden,)
    theirs = torch.autograd.grad(0.7 * expected, inputs)
    for ours, other in zip(torch.autograd.grad(0.7 * total, inputs), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [3, 256])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_trained_rows_of_some_tokens_stand_in_for_the_heads(
    monkeypatch: pytest.MonkeyPatch, chunk: int, cap: float | None
) -> None:
    monkeypatch.setattr(loss, "CHUNK", chunk)
    hidden, targets, weight = problem()
    targets[targets == 1] = 5
    base = nn.Linear(D, VOCAB, bias=False)
    base.weight.data, base.scale, base.softcap = weight.clone(), 0.4, cap  # type: ignore[assignment]
    head = TrainedTokens(base, tokens := [5, 0, 36])
    nn.init.normal_(head.rows.weight)
    hidden.requires_grad_()
    rows = head.rows.weight.detach().clone().requires_grad_()
    logits = 0.4 * (hidden @ weight.index_copy(0, torch.tensor(tokens), rows).T)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    total = supervised_loss(hidden, targets, head)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(0.7 * total, (hidden, head.rows.weight))
    for a, b in zip(ours, torch.autograd.grad(0.7 * expected, (hidden, rows)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_in_bfloat16_only_the_products_are_bfloat16(head_dtype: torch.dtype) -> None:
    hidden, targets, head = problem()
    hidden, head = hidden.bfloat16(), head.to(head_dtype)
    total, gradient = loss_and_gradient(hidden, targets, head, 1.0)
    kept = targets != IGNORE
    logits = (hidden[kept] @ head.bfloat16().T).float().requires_grad_()  # rounded once, then all is float32
    expected = F.cross_entropy(logits, targets[kept], reduction="sum")
    assert total.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=0)  # a softmax in bfloat16 is 1e-3 off
    (grad_logits,) = torch.autograd.grad(expected, logits)
    grad_hidden = grad_logits.bfloat16() @ head.bfloat16()
    torch.testing.assert_close(gradient[kept], grad_hidden, rtol=2**-7, atol=2**-8)


def test_without_a_supervised_position_the_loss_is_zero_and_so_is_the_gradient() -> None:
    hidden, targets, head = problem(supervised=0)
    total, gradient = loss_and_gradient(hidden, targets, head, 1.0)
    assert total == 0 and total.dtype == torch.float32 and gradient.shape == hidden.shape
    assert (gradient == 0).all()


def test_positions_without_a_target_get_no_gradient() -> None:
    hidden, targets, head = problem()
    _, gradient = loss_and_gradient(hidden, targets, head, 1.0)
    assert (gradient[targets == IGNORE] == 0).all()
    assert (gradient[targets != IGNORE] != 0).any(dim=1).all()


def test_a_logit_of_a_thousand_does_not_overflow() -> None:
    hidden, targets, head = problem()
    arguments = 1000 * hidden, targets, head, 1.0
    for ours, theirs in zip(loss_and_gradient(*arguments), dense(*arguments), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-2)


def test_no_more_than_a_chunk_of_logits_exists_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    product = loss.cast_linear

    def watched(x: Tensor, weight: Tensor) -> Tensor:
        rows.append(len(x))
        return product(x, weight)

    monkeypatch.setattr(loss, "CHUNK", 4)
    monkeypatch.setattr(loss, "cast_linear", watched)
    loss_and_gradient(*problem(), 1.0)
    assert rows == [4, 4, 2]


def test_for_backward_only_a_gradient_as_large_as_the_answers_hidden_states_is_kept() -> None:
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    hidden, targets, head = problem()
    hidden.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        supervised_loss(hidden, targets, head_of(head))
    floats = [tuple(tensor.shape) for tensor in saved if tensor.is_floating_point()]
    assert floats == [(10, D)]


def test_without_gradient_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Tensor) -> Tensor:
        raise AssertionError("a gradient was made")

    monkeypatch.setattr(loss, "cast_linear_backward", refuse)
    hidden, targets, head = problem()
    with torch.no_grad():
        total = supervised_loss(hidden.requires_grad_(), targets, head_of(head))
    torch.testing.assert_close(total, dense(hidden.detach(), targets, head, 1.0)[0])


def adapted(x: Tensor) -> Tensor:
    A, B = torch.randn(2, 6, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    return AdaptedProduct.apply(x, None, torch.randn(5, 6), None, A, B, 0.5, True, None)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: supervised_loss(x[None], torch.tensor([[1, 2, 0, 3]]), head_of(torch.randn(4, 6))),
        lambda x: Normalize.apply(x, 1e-6, torch.float32),
        adapted,
    ],
    ids=["loss", "norm", "adapter"],
)
def test_a_second_derivative_is_refused_and_not_silently_wrong(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
