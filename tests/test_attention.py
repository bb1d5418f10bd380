"""One kernel for all documents of a row is a kernel for each, where it is there, right and faster."""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from minqlora import attention, load_model
from minqlora.attention import Documents, attend_to_documents, is_one_kernel_better, try_one_kernel

CPU = torch.device("cpu")
HEADS = (6, 2, 8)  # of queries, of keys and values; width


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What PyTorch's documentation says of its kernel for GPUs, in plain operations: (tokens, heads, Hd)."""
    assert torch.equal(cu_seq_q, cu_seq_k) and cu_seq_q.dtype == torch.int32
    assert max_q == max_k == max(cu_seq_q.diff()) and enable_gqa == (query.shape[1] != key.shape[1])
    behind, ahead = window_size
    place = torch.arange(len(query))
    document = torch.bucketize(place, cu_seq_q[1:], right=True)
    distance = place[:, None] - place[None, :]
    seen = (document[:, None] == document[None, :]) & (distance >= -ahead)
    seen &= (distance <= behind) | (behind == -1)
    times = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(times, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * (scale or 1 / math.sqrt(query.shape[2]))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), value)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let a CPU have the kernel; what it was called with."""
    calls = []

    @functools.wraps(plain_varlen)
    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return plain_varlen(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    return calls


def test_the_stand_in_takes_what_the_kernel_takes() -> None:
    ours, theirs = (dict(inspect.signature(one).parameters) for one in (plain_varlen, varlen.varlen_attn))
    theirs.setdefault("enable_gqa", ours["enable_gqa"])  # torch 2.11 has no such option
    assert all(name in theirs and theirs[name].kind == ours[name].kind for name in ours)


def test_a_release_that_shares_heads_unasked_is_not_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(*args: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
        return plain_varlen(*args, scale=scale, window_size=window_size, enable_gqa=True)

    monkeypatch.setattr(varlen, "varlen_attn", older)
    H, n_kv_heads, Hd = HEADS
    q, k, v = (torch.randn(1, heads, 9, Hd) for heads in (H, n_kv_heads, n_kv_heads))
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    expected = attend_to_documents(q, k, v, Documents([4, 5]))
    torch.testing.assert_close(attend_to_documents(q, k, v, Documents([4, 5], ends)), expected)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_all_documents_at_once_are_each_by_itself(
    window: int | None, scale: float | None, stand_in: list[Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 23, HEADS[2], generator=generator, requires_grad=True)
        for heads in (HEADS[0], HEADS[1], HEADS[1])
    )
    lengths, ends = [7, 1, 15], torch.tensor([0, 7, 8, 23, 30, 31, 46], dtype=torch.int32)
    grad = torch.randn(2, 23, HEADS[0] * HEADS[2], generator=generator)
    found = []
    for documents in (Documents(lengths, ends), Documents(lengths)):
        y = attend_to_documents(q, k, v, documents, scale=scale, window=window)
        found.append([y, *torch.autograd.grad(y, (q, k, v), grad)])
    assert len(stand_in) == 1
    torch.testing.assert_close(*found)


def test_a_model_attends_at_once_where_that_is_better(
    tiny_model: Path, stand_in: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = load_model(tiny_model, dtype=torch.float32), torch.arange(46).view(2, 23)
    expected = model(ids, [20, 3])
    monkeypatch.setattr(attention, "is_one_kernel_better", lambda *what: what[1] == torch.float32)
    torch.testing.assert_close(model(ids, [20, 3]), expected)
    assert len(stand_in) == len(model.model.layers)
    model(ids)  # one document, for which nothing is gained
    assert len(stand_in) == len(model.model.layers)
    assert Documents.of([20, 3], torch.zeros(2, 23, 64), model.arch).ends is not None


@pytest.mark.parametrize("special", ["attention_softcap", "attention_dropout"])
def test_what_the_kernel_has_not_is_left_to_others(
    special: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = replace(load_model(tiny_model).arch, **{special: 0.5})
    monkeypatch.setattr(attention, "is_one_kernel_better", lambda *_: True)
    assert Documents.of([20, 3], torch.zeros(2, 23, 64), arch).ends is None


def test_a_run_to_the_same_bits_does_not_choose_by_the_clock(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = load_model(tiny_model).arch
    monkeypatch.setattr(attention, "is_one_kernel_better", lambda *_: True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert Documents.of([20, 3], torch.zeros(2, 23, 64), arch).ends is None


def test_a_cpu_and_float32_have_a_kernel_for_each() -> None:
    assert not is_one_kernel_better(CPU, torch.bfloat16, *HEADS, False)
    assert not is_one_kernel_better(torch.device("cuda"), torch.float32, *HEADS, False)


@pytest.mark.parametrize("windowed", [False, True])
def test_a_kernel_is_used_where_it_is_there_right_and_faster(
    windowed: bool, stand_in: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tried() -> bool:
        return try_one_kernel(CPU, torch.float32, *HEADS, windowed, n_documents=3, length=5)

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(attention, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def taking(seconds: float, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Tensor:
            clock.now += seconds
            return function(*args, **kwargs)

        return timed

    right = varlen.varlen_attn
    monkeypatch.setattr(attention, "attend", taking(1, attention.attend))
    monkeypatch.setattr(varlen, "varlen_attn", taking(4, right))
    assert not tried()  # slower than three
    monkeypatch.setattr(varlen, "varlen_attn", taking(2, right))
    assert tried()

    @functools.wraps(right)
    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        return right(*args, **kwargs) * 1.1

    monkeypatch.setattr(varlen, "varlen_attn", wrong)
    assert not tried()

    @functools.wraps(right)
    def without_window(*args: Any, window_size: tuple[int, int], **kwargs: Any) -> Tensor:
        return right(*args, window_size=(-1, 0), **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", without_window)
    assert tried() != windowed

    def missing(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(varlen, "varlen_attn", missing)
    assert not tried()
