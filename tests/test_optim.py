"""PagedAdamW: `torch.optim.AdamW` to the bit, whatever the pages, and the traffic counted to the byte."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    # 28 bytes of each, begun at multiples of 16
    assert sum(slot.untyped_storage().nbytes() for slot in staging.slots) == 4 * 32
    give_gradients(params, 2)
    optimizer.step()
    assert list(optimizer._stagings.values()) == [staging]


def test_two_pages_in_a_row_use_different_slots(monkeypatch):
    # On a GPU the next page arrives while this one is updated: it must not land in the same memory.
    addresses = []
    update = optim.adamw_

    def spy(params, grads, exp_avgs, *others):
        addresses.append(exp_avgs[0].data_ptr())
        update(params, grads, exp_avgs, *others)

    monkeypatch.setattr(optim, "adamw_", spy)
    params = parameters()
    optimizer = PagedAdamW(params, paged="always", page_bytes=28)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert len(addresses) == 3 + 1 + 1 + 4 + 15 + 1 - 1  # two small parameters share a page
    assert all(a != b for a, b in zip(addresses, addresses[1:], strict=False))
    assert len(set(addresses)) == 2


# -- streams -------------------------------------------------------------------------------------------------

Clock = dict[str, int]  # of each stream, how many of its operations are known to be over


class Streams(TorchDispatchMode):
    """A device's streams without the device: notes which bytes each operation reads and writes on which
    stream, and what is known to be over by then, and finds operations that nothing keeps in order.
    """

    def __init__(self, heeds_events: bool = True):
        super().__init__()
        self.heeds_events = heeds_events
        self.host: Clock = {}
        self.names = count()
        self.current = self.Stream()
        self.accesses: list[tuple[int, int, bool, str, int, Clock]] = []

    def Stream(self) -> "Stream":  # noqa: N802
        return Stream(self, str(next(self.names)))

    def Event(self) -> "Event":  # noqa: N802
        return Event(self)

    def current_stream(self, device: torch.device) -> "Stream":
        return self.current

    @contextmanager
    def stream(self, stream: "Stream") -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        arguments = func._schema.arguments
        named = dict(zip((argument.name for argument in arguments), args, strict=False)) | (kwargs or {})
        is_view = any(out.alias_info and not out.alias_info.is_write for out in func._schema.returns)
        if not is_view:
            now = merged(self.host, self.current.clock)
            now[self.current.name] = now.get(self.current.name, 0) + 1
            self.current.clock = now
            for argument in arguments:
                writes = argument.alias_info is not None and argument.alias_info.is_write
                for tensor in tree_leaves(named.get(argument.name)):
                    if isinstance(tensor, Tensor):
                        self._note(tensor, writes)
        return result

    def _note(self, tensor: Tensor, writes: bool) -> None:
        name, clock, first = self.current.name, self.current.clock, tensor.data_ptr()
        reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        last = first + (reach * tensor.itemsize if tensor.numel() else 0)
        self.accesses.append((first, last, writes, name, clock[name], clock))

    def races(self) -> int:
        """How many pairs of operations touch the same bytes, one of them writing, in no order."""
        return sum(
            first < other_last
            and other_first < last
            and (writes or other_writes)
            and stream != other_stream
            and clock.get(other_stream, 0) < other_count
            for i, (first, last, writes, stream, _, clock) in enumerate(self.accesses)
            for other_first, other_last, other_writes, other_stream, other_count, _ in self.accesses[:i]
        )


@dataclass
class Stream:
    """A stream of `Streams`; what it records is itself as it then was."""

    device: Streams
    name: str
    clock: Clock = field(default_factory=dict)

    def record_event(self) -> "Stream":
        return replace(self, clock=dict(self.clock))

    def wait_event(self, event: "Stream") -> None:
        if self.device.heeds_events:
            self.clock = merged(self.clock, event.clock)

    wait_stream = wait_event


@dataclass
class Event:
    """An event of `Streams` that the host waits for."""

    device: Streams
    clock: Clock = field(default_factory=dict)

    def record(self, stream: Stream) -> None:
        self.clock = stream.clock

    def synchronize(self) -> None:
        if self.device.heeds_events:
            self.device.host = merged(self.device.host, self.clock)


def merged(*clocks: Clock) -> Clock:
    return {name: max(clock.get(name, 0) for clock in clocks) for clock in clocks for name in clock}


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("heeds_events", [True, False])
def test_streams_never_touch_the_same_bytes_out_of_order(
    heeds_events: bool, bits: int, monkeypatch: pytest.MonkeyPatch
):
    params = [nn.Parameter(randn(*shape)) for shape in ((64, 65), (7,), (3, 5))]
    optimizer = PagedAdamW(params, bits=bits, paged="always", page_bytes=1024 * bits // 8)
    streams = Streams(heeds_events)
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    give_gradients(params, 1)
    optimizer.step()  # which makes the moments, on the host alone
    optimizer._stagings.clear()
    with streams:
        for _ in range(2):
            optimizer.step()
    assert len({stream for _, _, _, stream, _, _ in streams.accesses}) == 3
    assert (streams.races() == 0) == heeds_events


# -- moments of 8 bits ---------------------------------------------------------------------------------------


def train_wide(optimizer: torch.optim.Optimizer, param: nn.Parameter, steps: range) -> None:
    """Gradients of one large parameter, whose columns differ in size as those of a real layer do."""
    columns = 10.0 ** randn(param.shape[1], seed=7)
    for step in steps:
        param.grad = columns * randn(*param.shape, seed=step)
        optimizer.step()


def test_the_golden_trajectory_of_bitsandbytes_is_reproduced(shared_data: Path):
    with safe_open(shared_data / "golden_bnb.safetensors", "pt") as file:
        golden = {key: file.get_tensor(f"adam.{key}") for key in ("p0", "grads", "p5", "state1", "state2")}
    param = nn.Parameter(golden["p0"].clone())
    optimizer = PagedAdamW([param], lr=2e-4, weight_decay=1e-2, bits=8, scale_rule="table", floor=False)
    for grad in golden["grads"]:
        param.grad = grad
        optimizer.step()
    state = optimizer.state[param]
    # Its C++ code fuses a multiplication and an addition where ours rounds twice: a number on the border
    # between two codes may take either.
    for ours, theirs in ((state["exp_avg"], golden["state1"]), (state["exp_avg_sq"], golden["state2"])):
        differ = (ours != theirs).float().mean()
        assert differ <= 0.005
        assert (ours.int() - theirs.int()).abs().max() <= 1
    torch.testing.assert_close(param.data, golden["p5"], rtol=0, atol=1e-7)


def test_thirty_steps_are_those_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    ours, theirs = nn.Parameter(randn(96, 64)), nn.Parameter(randn(96, 64))
    options = dict(lr=1e-3, weight_decay=0.1)
    train_wide(PagedAdamW([ours], bits=8, scale_rule="table", floor=False, **options), ours, range(30))
    train_wide(bitsandbytes.optim.AdamW8bit([theirs], **options), theirs, range(30))
    torch.testing.assert_close(ours.data, theirs.data, rtol=0, atol=1e-3)
    assert (ours.data - theirs.data).abs().mean() <= 1e-6


@pytest.mark.parametrize("page_bytes", [4, 256, 256 * 5 + 3, 2**24])
def test_narrow_moments_are_the_same_bits_in_any_page(page_bytes: int):
    results = []
    for options in ({}, {"paged": "always"}):
        param, small = nn.Parameter(randn(67, 64)), nn.Parameter(randn(40, 3))
        optimizer = PagedAdamW([param, small], lr=1e-2, bits=8, page_bytes=page_bytes, **options)
        for step in range(5):
            small.grad = randn(40, 3, seed=step)
            train_wide(optimizer, param, range(step, step + 1))
        results.append([param.data, small.data, *optimizer.state[param].values()])
    for alone, paged in zip(*results, strict=True):
        assert torch.equal(alone, paged)


def test_narrow_moments_take_a_quarter_and_small_parameters_stay_wide():
    large, small = nn.Parameter(randn(64, 64)), nn.Parameter(randn(64, 63))
    optimizer = PagedAdamW([large, small], bits=8, paged="always")
    large.grad, small.grad = randn(64, 64, seed=1), randn(64, 63, seed=2)
    optimizer.step()
    moments = {name: tensor for name, tensor in optimizer.state[large].items() if name != "step"}
    assert {name: tuple(tensor.shape) for name, tensor in moments.items()} == {
        "exp_avg": (64, 64),
        "exp_avg_sq": (64, 64),
        "exp_avg_absmax": (16,),
        "exp_avg_sq_absmax": (16,),
    }
    assert sum(tensor.nbytes for tensor in moments.values()) == 2 * (4096 + 4 * 16)
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32
    assert optimizer.paged_bytes == 2 * (2 * (4096 + 64) + 2 * 4 * 64 * 63)
    assert optimizer.stalled_seconds > 0


def test_a_positive_mean_square_is_never_rounded_to_zero():
    grad = torch.full((64, 64), 3e-4)
    grad[::4] = 1.0  # in every block of 256; squares seven orders of magnitude apart
    after = {}
    for floor in (True, False):
        param = nn.Parameter(torch.zeros(64, 64))
        optimizer = PagedAdamW([param], lr=1e-3, bits=8, floor=floor)
        for _ in range(200):
            param.grad = grad.clone()
            optimizer.step()
        assert (optimizer.state[param]["exp_avg_sq"] == 0).any().item() is not floor
        after[floor] = param.detach().abs()
    assert after[True].max() <= 200 * 1.01e-3  # a step of AdamW is at most lr
    assert after[False].max() > 5 * after[True].max()  # a mean over the square of one gradient


def test_narrow_moments_train_as_well_as_wide_ones():
    x = randn(256, 64)
    y = torch.tanh(x @ randn(64, 64, seed=1) / 8) @ randn(64, 8, seed=2)
    losses = {}
    for bits in (32, 8):
        first, second = nn.Parameter(randn(64, 64, seed=3) / 8), nn.Parameter(randn(64, 8, seed=4) / 8)
        optimizer = PagedAdamW([first, second], lr=3e-3, bits=bits)
        for _ in range(300):
            loss = (torch.tanh(x @ first) @ second - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[bits] = loss.item()
    assert losses[32] < 0.2 * y.square().mean()
    assert losses[8] == pytest.approx(losses[32], rel=0.01 + 0.04)  # 300 steps, and a loss near its floor


def test_wide_moments_do_not_load_into_narrow_ones_nor_the_other_way():
    states = {}
    for bits in (32, 8):
        param = nn.Parameter(randn(64, 64))
        param.grad = torch.ones(64, 64)
        optimizer = PagedAdamW([param], bits=bits)
        optimizer.step()
        states[bits] = optimizer.state_dict()
    for bits, other in ((32, 8), (8, 32)):
        with pytest.raises(ValueError, match=f"the saved moments have {other} bits"):
            PagedAdamW([nn.Parameter(randn(64, 64))], bits=bits).load_state_dict(states[other])


def test_narrow_moments_resume_bitwise():
    param, optimizer = nn.Parameter(randn(64, 80)), None
    optimizer = PagedAdamW([param], bits=8)
    train_wide(optimizer, param, range(5))
    again = nn.Parameter(param.detach().clone())
    resumed = PagedAdamW([again], bits=8)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_wide(optimizer, param, range(5, 10))
    train_wide(resumed, again, range(5, 10))
    assert torch.equal(param, again)
    for name, tensor in optimizer.state[param].items():
        assert torch.equal(tensor, resumed.state[again][name])


# -- where moments live when memory runs short ---------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 8])
def test_auto_moves_moments_out_when_memory_runs_short_and_changes_no_bit(bits: int, monkeypatch):
    free = [1000.0]
    monkeypatch.setattr(optim, "device_memory", lambda device: (free[0], 1000.0))
    mine, other = nn.Parameter(randn(64, 80)), nn.Parameter(randn(64, 80))
    ours, never = PagedAdamW([mine], bits=bits), PagedAdamW([other], bits=bits, paged="never")
    free[0] = 1e6
    train_wide(ours, mine, range(3))
    assert ours.paged_bytes == 0
    free[0] = 50  # less than a sixteenth
    train_wide(ours, mine, range(3, 6))
    assert ours.paged_bytes > 0
    free[0] = 1e6  # once out, they stay out
    train_wide(ours, mine, range(6, 8))
    train_wide(never, other, range(8))
    assert torch.equal(mine, other)
    for name, tensor in never.state[other].items():
        assert torch.equal(tensor, ours.state[mine][name])
    assert never.paged_bytes == 0


def test_auto_begins_on_the_host_where_the_moments_would_not_fit(monkeypatch):
    monkeypatch.setattr(optim, "device_memory", lambda device: (8 * 5120 + 60.0, 1000.0))
    param = nn.Parameter(randn(64, 80))
    optimizer = PagedAdamW([param])
    train_wide(optimizer, param, range(1))
    assert optimizer.paged_bytes == 16 * 5120


# -- shapes and copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("paged", ["never", "always"])
def test_a_parameter_that_is_not_contiguous_is_updated_all_the_same(paged: str):
    ours, theirs = nn.Parameter(randn(6, 4).T), nn.Parameter(randn(6, 4).T)
    optimizers = (
        PagedAdamW([ours], lr=1e-2, paged=paged),
        torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0),
    )
    for step in range(3):
        ours.grad = theirs.grad = randn(4, 6, seed=step)
        for optimizer in optimizers:
            optimizer.step()
    assert not ours.is_contiguous() and torch.equal(ours, theirs)


def test_a_copy_of_the_optimizer_pages_as_the_first_does():
    param = nn.Parameter(randn(64, 80))
    optimizer = PagedAdamW([param], bits=8, paged="always")
    train_wide(optimizer, param, range(2))
    other = copy.deepcopy(optimizer)
    (twin,) = other.param_groups[0]["params"]
    train_wide(optimizer, param, range(2, 4))
    train_wide(other, twin, range(2, 4))
    assert torch.equal(param, twin) and other.paged_bytes == optimizer.paged_bytes


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
        ({"bits": 16}, "bits must be 8 or 32, got 16"),
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
