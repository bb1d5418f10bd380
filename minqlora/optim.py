"""Chapter 7. PagedAdamW: the optimizer's memory lives where memory is cheap.

AdamW keeps two running means for every trained number, of its gradient and of the gradient's square: 8 bytes
in float32, touched once a step. On a GPU that is the right thing to put elsewhere. Here the moments can live
in *pinned* host memory, which the GPU's copy engine can reach by itself, and visit the GPU a page at a time::

    inward stream     in 0   in 1       in 2       in 3       ...
    compute stream           update 0   update 1   update 2   ...
    outward stream               out 0      out 1      out 2  ...

Two pages of staging are held: while one is being updated, the next arrives and the one before leaves. A page
has room for `page_bytes` of each moment, of a part of a large parameter or of several small ones, so the GPU
holds 4 page_bytes however large the model.

The moments can be narrow besides: 8 bits each, in blocks of 256 that share a scale, by the dynamic maps of
Chapter 1, signed for the mean and unsigned for the mean square. Four of the signed map's levels::

    m          0.004    -0.0001     0.9       1.2        scale 1.2
    m / scale  0.0033   -0.000083   0.75      1.0
    decoded    0.0040   -0.00010    0.904     1.2        2 % off, over six powers of ten

Each page is decoded to float32, updated, and encoded again. One thing decides whether that trains: a mean
square so small beside its block's largest that it would be rounded to zero makes a step of m / eps. Here a
positive one is never rounded below the smallest level.

On a CPU nothing is copied, and the class is AdamW. Wherever 32-bit moments live, the result is
`torch.optim.AdamW`'s to the bit: the update is the same operations in the same order, and as each number is
updated by itself, pages cannot change it.

Shapes and dtypes: parameters and gradients of any floating dtype; moments float32, or uint8 with float32
scales. Cost: 8 bytes a trained parameter, or 2.03; on CUDA twice that of traffic over the bus a step, behind
the update.

Differences. The paper pages through CUDA's unified memory, where the driver moves pages when the GPU runs out
and nobody sees it; here the traffic is explicit, counted in `paged_bytes`, and works wherever there are
streams. bitsandbytes rounds small mean squares to zero on a GPU.

Paper: "Paged Optimizers". AdamW: "Decoupled Weight Decay Regularization", algorithm 2. Narrow moments: "8-bit
Optimizers via Block-wise Quantization".

Before: lora. Next: architecture.
"""

import inspect
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minqlora.codebook import dynamic_map
from minqlora.quantize import dequantize_blockwise, quantize_blockwise

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK_SIZE = 256  # numbers of a narrow moment that share a scale
NARROW_FROM = 4096  # parameters with fewer numbers keep wide moments: they cost nothing and may matter
HEADROOM = 1 / 16  # of a device's memory: with less than that free, "auto" moves the moments to the host


class PagedAdamW(torch.optim.Optimizer):
    """AdamW with moments of 32 or 8 bits that can live in pinned host memory.

    params: parameters, or groups of them as dicts. lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
    bits: 32, or 8 for parameters of at least 4096 numbers. paged: "always" keeps the moments on the host (on
    a CPU too, where that means nothing but the copies); "never" beside their parameters; "auto" beside them
    while a sixteenth of the device's memory is free, then on the host, which changes no bit of the result.
    page_bytes: size of one page of one moment, in bytes. scale_rule: how 8-bit moments are rounded, as in
    `quantize_blockwise`. floor: a positive mean square is never rounded to zero; False is bitsandbytes' way.

    `paged_bytes` counts the bytes moved between host and device since the start, `stalled_seconds` the time
    that updates waited for them. Raises ValueError for a negative lr, eps or weight_decay, betas outside
    [0, 1), other bits, another `paged`, or page_bytes under 4.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bits: int = 32,
        paged: str = "auto",
        page_bytes: int = 2**24,
        scale_rule: str = "midpoint",
        floor: bool = True,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if bits not in (8, 32):
            raise ValueError(f"bits must be 8 or 32, got {bits}")
        if paged not in ("auto", "always", "never"):
            raise ValueError(f"paged must be 'auto', 'always' or 'never', not {paged!r}")
        if page_bytes < 4:
            raise ValueError(f"page_bytes must hold at least one float32, got {page_bytes}")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.bits, self.paged, self.page_bytes = bits, paged, page_bytes
        self.scale_rule, self.floor = scale_rule, floor
        self.paged_bytes, self.stalled_seconds = 0, 0.0
        self._crowded: set[torch.device] = set()  # devices whose moments "auto" has moved to the host
        self._stagings: dict[torch.device, _Staging] = {}

    # torch's own, less a wrapper for torch.compile that loads the compiler: half a second and 30 MB.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs; staging memory and streams are made anew."""
        return {**self.__dict__, "_stagings": {}}

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; return the closure's loss, if one was given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [
            (param, group)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        for device in {param.device for param, _ in params}:
            here = [(param, group) for param, group in params if param.device == device]
            self._make_room(device, [param for param, _ in here])
            updates = [self._prepare(param, group) for param, group in here]
            pieces = [piece for update in updates for piece in update.pieces(self.page_bytes)]
            if self._pages_on(device):
                if device not in self._stagings:
                    self._stagings[device] = _Staging(device, self.page_bytes, self.bits == 8)
                staging = self._stagings[device]
                self.paged_bytes += sum(2 * piece.nbytes for piece in pieces)  # there and back
                self.stalled_seconds += staging.run(list(_in_pages(pieces, staging.room)))
            else:
                # On a CPU one by one, as the cache holds them; elsewhere a launch may cost more than a piece.
                for page in _in_pages(pieces, 0 if device.type == "cpu" else 2 * self.page_bytes):
                    _apply(page)
            for (param, _), update in zip(here, updates, strict=True):
                if not param.is_contiguous():  # a copy was updated
                    param.copy_(update.param.view(param.shape))
        return loss

    def page_out(self, device: torch.device) -> None:
        """Move the moments of the device's parameters to the host, for good; they are paged from then on.

        What "auto" does by itself before a step. A training loop may call it where memory ran out elsewhere.
        """
        self._crowded.add(device)
        for param, state in self.state.items():
            if param.device == device:
                for name in state.keys() - {"step"}:
                    state[name] = _on_host(state[name], device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, its moments bit for bit, and where they belong.

        Raises ValueError for moments that are not as wide as this optimizer's.
        """
        # This one casts moments to the parameters' dtype and device.
        inspect.unwrap(torch.optim.Optimizer.load_state_dict)(self, state_dict)
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for param, index in zip(params, saved_ids, strict=True):
            saved = state_dict["state"].get(index)
            if saved is None:
                continue
            state = {"step": self.state[param]["step"], **self._new_moments(param)}
            for name in state.keys() - {"step"}:
                if name not in saved or saved[name].dtype != state[name].dtype:
                    held = saved["exp_avg"].element_size() * 8 if "exp_avg" in saved else 0
                    raise ValueError(f"the saved moments have {held} bits; this optimizer is of other bits")
                state[name].copy_(saved[name])
            self.state[param] = state

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as plain tensors by name, `INDEX.exp_avg` and so on, for safetensors to write."""
        return {
            f"{index}.{name}": tensor
            for index, state in self.state_dict()["state"].items()
            for name, tensor in state.items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave; raises as `load_state_dict` does."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = tensor
        self.load_state_dict({"state": state, "param_groups": self.state_dict()["param_groups"]})

    def _prepare(self, param: Tensor, group: dict) -> "_Update":
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state |= self._new_moments(param)
        state["step"] += 1
        assert param.grad is not None
        return _Update(
            param=param.reshape(-1),
            grad=param.grad.reshape(-1),
            moments=tuple(
                Moment(state[name].view(-1), state.get(f"{name}_absmax"), name == "exp_avg")
                for name in MOMENTS
            ),
            step=int(state["step"]),
            group=group,
            rounding=(self.scale_rule, self.floor),
        )

    def _new_moments(self, param: Tensor) -> dict[str, Tensor]:
        narrow = self.bits == 8 and param.numel() >= NARROW_FROM
        dtype = torch.uint8 if narrow else torch.float32
        moments = {name: torch.zeros(param.shape, dtype=dtype, device="meta") for name in MOMENTS}
        if narrow:
            n_blocks = -(-param.numel() // BLOCK_SIZE)
            scales = torch.zeros(n_blocks, dtype=torch.float32, device="meta")
            moments |= {f"{name}_absmax": scales for name in MOMENTS}
        device = torch.device("cpu") if self._pages_on(param.device) else param.device
        # Pinned: the copy engine reads it without the CPU's help, and only so do copies overlap with updates.
        pin = device != param.device
        return {
            name: torch.zeros(like.shape, dtype=like.dtype, device=device, pin_memory=pin)
            for name, like in moments.items()
        }

    def _pages_on(self, device: torch.device) -> bool:
        return self.paged == "always" or (self.paged == "auto" and device in self._crowded)

    def _make_room(self, device: torch.device, params: list[Tensor]) -> None:
        if self.paged != "auto" or device in self._crowded:
            return
        memory = device_memory(device)
        if memory is None:
            return
        free, total = memory
        width = 2 if self.bits == 8 else 8
        if free - sum(width * p.numel() for p in params if p not in self.state) < HEADROOM * total:
            self.page_out(device)


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """Return the bytes free on an accelerator and in all, None for the host and where nobody says.

    What PyTorch's allocator holds without using it is free to us.
    """
    module: Any = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(module, "mem_get_info"):
        return None
    free, total = module.mem_get_info(device)
    return free + module.memory_reserved(device) - module.memory_allocated(device), total


def _on_host(tensor: Tensor, device: torch.device) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=device.type != "cpu")
    return host.copy_(tensor)


class Moment(NamedTuple):
    """One moment of a run of numbers, as it is stored.

    values: float32 (n,), or uint8 codes (n,) with absmax, float32 (ceil(n / 256),). signed: which map the
    codes are of.
    """

    values: Tensor
    absmax: Tensor | None
    signed: bool

    @property
    def stored(self) -> list[Tensor]:
        """The tensors that hold it."""
        return [self.values] if self.absmax is None else [self.values, self.absmax]

    def part(self, start: int, stop: int) -> "Moment":
        """Return the moment of numbers start to stop, sharing memory; start is a multiple of 256."""
        blocks = slice(start // BLOCK_SIZE, -(-stop // BLOCK_SIZE))
        absmax = None if self.absmax is None else self.absmax[blocks]
        return self._replace(values=self.values[start:stop], absmax=absmax)

    def load(self) -> Tensor:
        """Return the numbers in float32 (n,): the stored ones themselves if they are that wide."""
        if self.absmax is None:
            return self.values
        codebook = dynamic_map(self.values.device, signed=self.signed)
        return dequantize_blockwise(self.values, self.absmax, codebook, BLOCK_SIZE)

    def save(self, numbers: Tensor, scale_rule: str, floor: bool) -> None:
        """Store the numbers that `load` returned, once they are updated."""
        if self.absmax is None:
            return
        codebook = dynamic_map(self.values.device, signed=self.signed)
        codes, absmax = quantize_blockwise(numbers, codebook, BLOCK_SIZE, scale_rule)
        if floor and not self.signed:  # code 0 is zero, code 1 the smallest level
            codes += (codes == 0) & (numbers > 0)
        self.values.copy_(codes)
        self.absmax.copy_(absmax)


class _Update(NamedTuple):
    # One AdamW update: flat tensors of equal length, moments as stored.
    param: Tensor
    grad: Tensor
    moments: tuple[Moment, ...]
    step: int
    group: dict
    rounding: tuple[str, bool]

    @property
    def nbytes(self) -> int:
        """The bytes of both moments."""
        return sum(tensor.nbytes for moment in self.moments for tensor in moment.stored)

    @property
    def room(self) -> int:
        """The bytes that they take in a slot."""
        return sum(_aligned(tensor.nbytes) for moment in self.moments for tensor in moment.stored)

    def pieces(self, page_bytes: int) -> "Iterator[_Update]":
        """Yield this update in pieces whose moments take at most `page_bytes` each, scales not counted."""
        numbers = page_bytes // 4
        if self.moments[0].absmax is not None:
            numbers = max(page_bytes // BLOCK_SIZE, 1) * BLOCK_SIZE
        n = self.param.numel()
        for start in range(0, n, numbers):
            stop = min(start + numbers, n)
            yield self._replace(
                param=self.param[start:stop],
                grad=self.grad[start:stop],
                moments=tuple(moment.part(start, stop) for moment in self.moments),
            )


def _in_pages(pieces: list[_Update], room: int) -> Iterator[list[_Update]]:
    # In their order, as many together as have so much room and are updated alike; at least one.
    page: list[_Update] = []
    taken = 0
    for piece in pieces:
        is_alike = page and piece.step == page[0].step and piece.group is page[0].group
        if page and not (is_alike and taken + piece.room <= room):
            yield page
            page, taken = [], 0
        page.append(piece)
        taken += piece.room
    if page:
        yield page


def _apply(page: list[_Update]) -> None:
    # Parameters and moments, in place.
    loaded = [[moment.load() for moment in piece.moments] for piece in page]
    exp_avgs, exp_avg_sqs = map(list, zip(*loaded, strict=True))
    params, grads = [piece.param for piece in page], [piece.grad for piece in page]
    adamw_(params, grads, exp_avgs, exp_avg_sqs, page[0].step, page[0].group)
    for piece, numbers in zip(page, loaded, strict=True):
        for moment, updated in zip(piece.moments, numbers, strict=True):
            moment.save(updated, *piece.rounding)


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    group: dict,
) -> None:
    """Apply one AdamW update in place to lists of flat tensors, each as long as its fellows in the other
    lists: `torch.optim.AdamW`'s operations in its order, each on a whole list at once.

    params, grads: any floating dtype. exp_avgs, exp_avg_sqs: float32. step: counts from 1. group: lr, betas,
    eps, weight_decay.
    """
    lr, (beta1, beta2) = group["lr"], group["betas"]
    grads = [grad.float() for grad in grads]
    wide = [param.float() for param in params]  # itself if it is float32; else rounded once, at the end
    if group["weight_decay"]:
        torch._foreach_mul_(wide, 1 - lr * group["weight_decay"])
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)
    step_size = lr / (1 - beta1**step)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(denominators, group["eps"])
    torch._foreach_addcdiv_(wide, exp_avgs, denominators, value=-step_size)
    for param, numbers in zip(params, wide, strict=True):
        if numbers is not param:
            param.copy_(numbers)


class _Staging:
    """Two slots of device memory through which the moments of all parameters stream, in on one side stream
    and out on another, because a bus carries both ways at once.

    Events keep the order: an update waits for its page, the page's way home for the update, and the next page
    in the slot for that. On a CPU torch's stand-ins for streams and events do nothing, and all happens in
    order anyway.
    """

    def __init__(self, device: torch.device, page_bytes: int, narrow: bool):
        self.device = device
        self.module = torch.get_device_module(device)
        self.inward, self.outward = (
            self.module.Stream() if device.type == "cpu" else self.module.Stream(device) for _ in range(2)
        )
        blocks = -(-page_bytes // BLOCK_SIZE)  # of codes, each with a scale
        room = max(_aligned(page_bytes), blocks * BLOCK_SIZE + _aligned(4 * blocks) if narrow else 0)
        self.room = 2 * room  # of a slot, for both moments
        self.slots = [torch.empty(self.room, dtype=torch.uint8, device=device) for _ in range(2)]
        # The allocator may hand out memory that the compute stream is still reading.
        self.inward.wait_stream(self.module.current_stream(device))

    def run(self, pages: list[list[_Update]]) -> float:
        """Apply the pages, whose moments are on the host; return the seconds they waited for copies."""
        compute = self.module.current_stream(self.device)
        waits = []
        homeward: list[Any] = []  # an event for each page, after which its slot is free
        arriving = self._bring_in(pages[0], 0)
        for i, page in enumerate(pages):
            staged, arrived = arriving
            if i + 1 < len(pages):  # on its way while this one is updated
                if i > 0:
                    self.inward.wait_event(homeward[i - 1])  # of the slot's last page
                arriving = self._bring_in(pages[i + 1], i + 1)
            began = self._now(compute)
            compute.wait_event(arrived)
            waits.append((began, self._now(compute)))
            _apply(staged)
            homeward.append(self._send_back(page, staged, compute.record_event()))
        # The host waits for the last copy: from here on the moments may be read, saved or changed.
        done = self.module.Event()
        done.record(self.outward)
        done.synchronize()
        return sum(self._seconds(*wait) for wait in waits)

    def _now(self, compute) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = self.module.Event(enable_timing=True)
        event.record(compute)
        return event

    def _seconds(self, began, ended) -> float:
        return ended - began if self.device.type == "cpu" else began.elapsed_time(ended) / 1000

    def _bring_in(self, page: list[_Update], index: int) -> tuple[list[_Update], Any]:
        slot, used = self.slots[index % 2], 0

        def staged(tensor: Tensor) -> Tensor:
            nonlocal used
            room = slot[used : used + tensor.nbytes].view(tensor.dtype)
            used += _aligned(tensor.nbytes)
            return room.copy_(tensor, non_blocking=True)

        def moved(moment: Moment) -> Moment:
            absmax = None if moment.absmax is None else staged(moment.absmax)
            return moment._replace(values=staged(moment.values), absmax=absmax)

        with self.module.stream(self.inward):
            arriving = [piece._replace(moments=tuple(map(moved, piece.moments))) for piece in page]
            return arriving, self.inward.record_event()

    def _send_back(self, page: list[_Update], staged: list[_Update], updated: Any) -> Any:
        with self.module.stream(self.outward):
            self.outward.wait_event(updated)
            for piece, there in zip(page, staged, strict=True):
                for home, away in zip(piece.moments, there.moments, strict=True):
                    for target, source in zip(home.stored, away.stored, strict=True):
                        target.copy_(source, non_blocking=True)
            return self.outward.record_event()


def _aligned(n_bytes: int) -> int:
    # Views of another dtype begin at multiples of its size.
    return -(-n_bytes // 16) * 16
