"""PagedAdamW: `torch.optim.AdamW` to the bit, whatever the pages, and the traffic counted to the byte."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from minqlora import optim
from minqlora.optim import PagedAdamW

SHAPES = [(3, 5), (7,), (1,), (2, 3, 4), (33, 3), ()]
NUMBERS = 15 + 7 + 1 + 24 + 99 + 1
# Pages of a number, of odd sizes that split every parameter, of exactly one parameter, and larger than all.
PAGE_BYTES = [4, 4 * 5, 4 * 7, 4 * 33 + 3, 2**24]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
    return [nn.Parameter(randn(*shape, seed=i, dtype=dtype, device=device)) for i, shape in enumerate(SHAPES)]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    """Gradients that differ by parameter and step, over several powers of ten; some are None, by turns."""
    for i, param in enumerate(params):
        if (step + i) % 5 == 0:
            param.grad = None
        else:
            scale = 10.0 ** ((step + i) % 7 - 4)
            param.grad = scale * randn(*param.shape, seed=100 * step + i).to(param.device, param.dtype)


def train(make: Callable, params: list[nn.Parameter], steps: range, **scheduled) -> torch.optim.Optimizer:
    """Train with groups, weight decay, a schedule and clipping: all that a training script does."""
    groups = [dict(params=params[:2], weight_decay=0.1), dict(params=params[2:4], lr=3e-3, betas=(0.8, 0.95))]
    groups.append(dict(params=params[4:], eps=1e-3))
    optimizer = make(groups, lr=1e-2, weight_decay=0.0)
    scheduler = LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1 - step / 300))
    for step in steps:
        give_gradients(params, step)
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return optimizer


def assert_equal_state(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    a, b = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert a.keys() == b.keys()
    for index in a:
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(a[index][name], b[index][name])


# -- the same as torch.optim.AdamW ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    params = parameters()
    return params, train(torch.optim.AdamW, params, range(200))


@pytest.mark.parametrize(
    "options", [{"paged": "never"}, {}, *({"paged": "always", "page_bytes": n} for n in PAGE_BYTES)]
)
def test_two_hundred_steps_are_bitwise_those_of_torch(options: dict, theirs: tuple):
    params = parameters()
    ours = train(lambda *args, **kwargs: PagedAdamW(*args, **kwargs, **options), params, range(200))
    assert all(torch.equal(a, b) for a, b in zip(params, theirs[0], strict=True))
    assert_equal_state(ours, theirs[1])


@pytest.mark.parametrize("options", [{}, {"paged": "always", "page_bytes": 20}])
def test_a_parameter_without_a_gradient_is_left_alone(options: dict):
    params = parameters()
    before = [param.detach().clone() for param in params]
    optimizer = PagedAdamW(params, weight_decay=0.1, **options)
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(params, before, strict=True)]
    assert changed == [False, True, False, False, False, False]
    assert list(optimizer.state) == [params[1]]


@pytest.mark.parametrize("paged", ["never", "always"])
def test_a_step_without_any_gradient_is_none(paged: str):
    optimizer = PagedAdamW(parameters(), paged=paged)
    optimizer.step()
    assert not optimizer.state
    assert optimizer.paged_bytes == 0


def test_a_gradient_that_is_not_contiguous():
    ours, other = nn.Parameter(randn(4, 6)), nn.Parameter(randn(4, 6))
    for param, make in ((ours, PagedAdamW), (other, torch.optim.AdamW)):
        param.grad = randn(6, 4, seed=1).T
        make([param], lr=1e-2, weight_decay=0.0).step()
    assert torch.equal(ours, other)


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned():
    param = nn.Parameter(randn(3))
    optimizer = PagedAdamW([param])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    expected = param.detach().square().sum()
    assert torch.equal(optimizer.step(closure), expected)
    assert param.detach().square().sum() < expected


# -- 16-bit parameters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"paged": "always", "page_bytes": 4 * 7}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_have_float32_moments_and_updates_rounded_once(dtype: torch.dtype, options: dict):
    params, shadows = parameters(dtype), parameters(dtype)
    for shadow in shadows:
        shadow.data = shadow.data.float()
    ours, theirs = (
        PagedAdamW(params, lr=1e-2, **options),
        torch.optim.AdamW(shadows, lr=1e-2, weight_decay=0.0),
    )
    for step in range(30):
        give_gradients(params, step)
        for param, shadow in zip(params, shadows, strict=True):
            shadow.grad = None if param.grad is None else param.grad.float()
        ours.step()
        theirs.step()
        for shadow in shadows:  # AdamW in float32, whose result is rounded once
            shadow.data = shadow.data.to(dtype).float()
    assert all(torch.equal(a.float(), b) for a, b in zip(params, shadows, strict=True))
    assert {state["exp_avg"].dtype for state in ours.state.values()} == {torch.float32}
    assert_equal_state(ours, theirs)


# -- pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_bytes", PAGE_BYTES)
def test_paged_bytes_are_16_a_parameter_and_step(page_bytes: int):
    params = parameters()
    optimizer = PagedAdamW(params, paged="always", page_bytes=page_bytes)
    assert optimizer.paged_bytes == 0
    for step in range(1, 4):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert optimizer.paged_bytes == 16 * NUMBERS * step
    for param in params[1:]:
        param.grad = None
    optimizer.step()
    assert optimizer.paged_bytes == 16 * NUMBERS * 3 + 16 * 15


@pytest.mark.parametrize("paged", ["auto", "never"])
def test_nothing_is_paged_on_a_cpu_unless_asked(paged: str):
    params = parameters()
    optimizer = PagedAdamW(params, paged=paged)
    give_gradients(params, 1)
    optimizer.step()
    assert optimizer.paged_bytes == 0


def test_staging_is_four_pages_however_large_the_model():
    params = parameters()
    optimizer = PagedAdamW(params, paged="always", page_bytes=28)
    give_gradients(params, 1)
    optimizer.step()
    (staging,) = optimizer._stagings.values()
    assert sum(slot.untyped_storage().nbytes() for slot in staging.slots) == 4 * 28
    give_gradients(params, 2)
    optimizer.step()
    assert list(optimizer._stagings.values()) == [staging]


def test_two_pages_in_a_row_use_different_slots(monkeypatch):
    # On a GPU the next page arrives while this one is updated: it must not land in the same memory.
    addresses = []
    update = optim.adamw_

    def spy(param, grad, exp_avg, exp_avg_sq, step, group):
        addresses.append(exp_avg.data_ptr())
        update(param, grad, exp_avg, exp_avg_sq, step, group)

    monkeypatch.setattr(optim, "adamw_", spy)
    params = parameters()
    optimizer = PagedAdamW(params, paged="always", page_bytes=28)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert len(addresses) == 3 + 1 + 1 + 4 + 15 + 1
    assert all(a != b for a, b in zip(addresses, addresses[1:], strict=False))
    assert len(set(addresses)) == 2


# -- saved and loaded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"paged": "always", "page_bytes": 28}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_from_a_state_dict_it_goes_on_bitwise(dtype: torch.dtype, options: dict, tmp_path):
    def steps(optimizer: PagedAdamW, params: list[nn.Parameter], numbers: range) -> None:
        for step in numbers:
            give_gradients(params, step)
            optimizer.step()

    def fresh() -> tuple[list[nn.Parameter], PagedAdamW]:
        params = parameters(dtype)
        groups = [dict(params=params[:3], weight_decay=0.1), dict(params=params[3:], lr=1e-2)]
        return params, PagedAdamW(groups, lr=1e-3, **options)

    params, optimizer = fresh()
    steps(optimizer, params, range(10))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed_params, resumed = fresh()
    for param, saved in zip(resumed_params, params, strict=True):
        param.data.copy_(saved.data)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert {state["exp_avg"].dtype for state in resumed.state.values()} == {torch.float32}
    assert_equal_state(resumed, optimizer)
    steps(optimizer, params, range(10, 20))
    steps(resumed, resumed_params, range(10, 20))
    assert all(torch.equal(a, b) for a, b in zip(params, resumed_params, strict=True))
    assert_equal_state(resumed, optimizer)


def test_a_state_of_torch_optim_adamw_can_be_taken_over():
    params = parameters()
    theirs = train(torch.optim.AdamW, params, range(10))
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    groups = [dict(params=copies[:2]), dict(params=copies[2:4]), dict(params=copies[4:])]
    ours = PagedAdamW(groups)
    # A copy, because torch hands on the tensor that counts the steps, and both would count in it.
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for step in range(10, 20):
        give_gradients(params, step)
        give_gradients(copies, step)
        theirs.step()
        ours.step()
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


def test_steps_are_counted_whatever_the_default_dtype():
    param = nn.Parameter(torch.zeros(1))
    param.grad = torch.ones(1)
    torch.set_default_dtype(torch.bfloat16)  # in which 256 + 1 is 256
    try:
        optimizer = PagedAdamW([param])
        for _ in range(300):
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[param]["step"] == 300


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1e-3}, "lr must not be negative, got -0.001"),
        ({"eps": -1.0}, "eps must not be negative, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"betas": (1.0, 0.999)}, r"betas must be in \[0, 1\), got \(1.0, 0.999\)"),
        ({"betas": (0.9, -0.1)}, r"betas must be in \[0, 1\), got \(0.9, -0.1\)"),
        ({"paged": "sometimes"}, "paged must be 'auto', 'always' or 'never', not 'sometimes'"),
        ({"page_bytes": 3}, "page_bytes must hold at least one float32, got 3"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PagedAdamW(parameters(), **options)


def test_no_parameters_are_refused():
    with pytest.raises(ValueError, match="empty parameter list"):
        PagedAdamW([])


# -- where there is something to page ------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("page_bytes", [4 * 7, 2**24])
def test_paged_on_a_gpu_it_equals_torch(page_bytes: int):
    mine, others = parameters(device="cuda"), parameters(device="cuda")
    ours = train(lambda *args, **kwargs: PagedAdamW(*args, **kwargs, page_bytes=page_bytes), mine, range(50))
    # One tensor at a time, as here; the default there, many at a time, orders its operations otherwise.
    theirs = train(
        lambda *args, **kwargs: torch.optim.AdamW(*args, **kwargs, foreach=False), others, range(50)
    )
    assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))
    assert ours.paged_bytes > 0
    for param, other in zip(mine, others, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert ours.state[param][name].is_pinned()
            assert torch.equal(ours.state[param][name], theirs.state[other][name].cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_loaded_on_a_gpu_the_moments_are_back_in_pinned_memory():
    params = parameters(torch.bfloat16, "cuda")
    optimizer = train(PagedAdamW, params, range(3))
    resumed = PagedAdamW([dict(params=params[:2]), dict(params=params[2:4]), dict(params=params[4:])])
    resumed.load_state_dict(optimizer.state_dict())
    assert_equal_state(resumed, optimizer)
    assert all(state["exp_avg"].is_pinned() for state in resumed.state.values())
