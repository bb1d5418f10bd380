"""Chapter 7. PagedAdamW: the optimizer's memory lives where memory is cheap.

AdamW keeps two running means for every trained number, of its gradient and of the gradient's square: 8 bytes
in float32, touched once a step. On a GPU that is the right thing to put elsewhere. Here the moments live in
*pinned* host memory, which the GPU's copy engine can reach by itself, and visit the GPU a page at a time::

    side stream      in 0   in 1          out 0   in 2   out 1   in 3   out 2  ...
    compute stream          update 0   update 1          update 2        update 3

Two pages of staging are held: while one is being updated, the next arrives and the one before leaves. A page
is `page_bytes` of each moment, so the GPU holds 4 page_bytes however large the model.

On a CPU nothing is copied, and the class is AdamW. Either way the result is `torch.optim.AdamW`'s to the bit:
the update is the same operations in the same order, and as each number is updated by itself, pages cannot
change it.

Shapes and dtypes: parameters and gradients of any floating dtype; moments float32, flat pages of each
parameter. Cost: 8 bytes of host memory a trained parameter; on CUDA 16 bytes of traffic each over the bus a
step, behind the update.

Differences. The paper pages through CUDA's unified memory, where the driver moves pages when the GPU runs out
and nobody sees it; here the traffic is explicit, counted in `paged_bytes`, and works wherever there are
streams.

Paper: "Paged Optimizers". AdamW: "Decoupled Weight Decay Regularization", algorithm 2.

Before: lora. Next: architecture.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class PagedAdamW(torch.optim.Optimizer):
    """AdamW with float32 moments that can live in pinned host memory.

    params: parameters, or groups of them as dicts. lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
    paged: "auto" pages where the parameters are on a device with streams of its own; "always" runs the paging
    even on a CPU; "never" keeps the moments beside their parameters. page_bytes: size of one page of one
    moment, in bytes.

    `paged_bytes` counts the bytes moved between host and device since the start. Raises ValueError for a
    negative lr, eps or weight_decay, betas outside [0, 1), another `paged`, or page_bytes under 4.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        paged: str = "auto",
        page_bytes: int = 2**24,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if paged not in ("auto", "always", "never"):
            raise ValueError(f"paged must be 'auto', 'always' or 'never', not {paged!r}")
        if page_bytes < 4:
            raise ValueError(f"page_bytes must hold at least one float32, got {page_bytes}")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.paged = paged
        self.page_bytes = page_bytes
        self.paged_bytes = 0
        self._stagings: dict[torch.device, _Staging] = {}

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; return the closure's loss, if one was given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = [
            self._prepare(param, group)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        for device in {update.param.device for update in updates}:
            here = [update for update in updates if update.param.device == device]
            if self._pages_on(device):
                if device not in self._stagings:
                    self._stagings[device] = _Staging(device, self.page_bytes // 4)
                self.paged_bytes += self._stagings[device].run(here)
            else:
                for update in here:
                    adamw_(*update)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, its moments in float32 as they were, and where they belong."""
        super().load_state_dict(state_dict)  # casts moments to the parameters' dtype and device
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for param, index in zip(params, saved_ids, strict=True):
            for name in MOMENTS if index in state_dict["state"] else ():
                self.state[param][name] = self._new_moment(param).copy_(state_dict["state"][index][name])

    def _prepare(self, param: Tensor, group: dict) -> "_Update":
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            for name in MOMENTS:
                state[name] = self._new_moment(param)
        state["step"] += 1
        assert param.grad is not None
        return _Update(
            param=param.view(-1),
            grad=param.grad.reshape(-1),
            exp_avg=state["exp_avg"].view(-1),
            exp_avg_sq=state["exp_avg_sq"].view(-1),
            step=int(state["step"]),
            group=group,
        )

    def _new_moment(self, param: Tensor) -> Tensor:
        if not self._pages_on(param.device):
            return torch.zeros_like(param, dtype=torch.float32)
        # Pinned: the copy engine reads it without the CPU's help, and only so do copies overlap with updates.
        return torch.zeros(param.shape, dtype=torch.float32, pin_memory=param.device.type != "cpu")

    def _pages_on(self, device: torch.device) -> bool:
        if self.paged == "auto":
            return device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream")
        return self.paged == "always"


class _Update(NamedTuple):
    # The arguments of adamw_: flat tensors of equal length.
    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    group: dict

    def pages(self, numbers: int) -> "Iterator[_Update]":
        """Yield this update in pieces of at most `numbers` numbers."""
        for start in range(0, self.param.numel(), numbers):
            part = slice(start, start + numbers)
            yield self._replace(
                param=self.param[part],
                grad=self.grad[part],
                exp_avg=self.exp_avg[part],
                exp_avg_sq=self.exp_avg_sq[part],
            )


def adamw_(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, group: dict) -> None:
    """Apply one AdamW update in place to flat tensors of equal length: `torch.optim.AdamW`'s operations in
    its order.

    param, grad: any floating dtype. exp_avg, exp_avg_sq: float32. step: counts from 1. group: lr, betas, eps,
    weight_decay.
    """
    lr, (beta1, beta2) = group["lr"], group["betas"]
    grad = grad.float()
    if group["weight_decay"]:
        param.mul_(1 - lr * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step_size = lr / (1 - beta1**step)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    if param.dtype == torch.float32:
        param.addcdiv_(exp_avg, denominator, value=-step_size)
    else:  # the step is formed in float32 and rounded once
        param.copy_(param.float().addcdiv_(exp_avg, denominator, value=-step_size))


class _Staging:
    """Two slots of device memory through which the moments of all parameters stream, on a side stream.

    Everything on the side stream happens in order, so a slot is refilled only after it was copied back;
    between the streams two events a page keep the order. On a CPU torch's stand-ins for streams and events do
    nothing, and all happens in order anyway.
    """

    def __init__(self, device: torch.device, page_numbers: int):
        self.device = device
        self.page_numbers = page_numbers
        self.module = torch.get_device_module(device)
        self.side = self.module.Stream() if device.type == "cpu" else self.module.Stream(device)
        self.slots = [torch.empty(2, page_numbers, dtype=torch.float32, device=device) for _ in range(2)]
        # The allocator may hand out memory that the compute stream is still reading.
        self.side.wait_stream(self.module.current_stream(device))

    def run(self, updates: list[_Update]) -> int:
        """Apply the updates, whose moments are on the host, page by page; return the bytes copied."""
        pages = [page for update in updates for page in update.pages(self.page_numbers)]
        arriving = self._bring_in(pages[0], self.slots[0])
        for i, page in enumerate(pages):
            staged, arrived = arriving
            if i + 1 < len(pages):  # on its way while this one is updated
                arriving = self._bring_in(pages[i + 1], self.slots[(i + 1) % 2])
            compute = self.module.current_stream(self.device)
            compute.wait_event(arrived)
            adamw_(page.param, page.grad, staged[0], staged[1], page.step, page.group)
            self._send_back(page, staged, compute.record_event())
        # The host waits for the last copy: from here on the moments may be read, saved or changed.
        done = self.module.Event()
        done.record(self.side)
        done.synchronize()
        return sum(4 * page.exp_avg.nbytes for page in pages)  # two moments, there and back

    def _bring_in(self, page: _Update, slot: Tensor):
        staged = slot[:, : page.exp_avg.numel()]  # (2, numbers of this page)
        with self.module.stream(self.side):
            staged[0].copy_(page.exp_avg, non_blocking=True)
            staged[1].copy_(page.exp_avg_sq, non_blocking=True)
            return staged, self.side.record_event()

    def _send_back(self, page: _Update, staged: Tensor, updated) -> None:
        with self.module.stream(self.side):
            self.side.wait_event(updated)
            page.exp_avg.copy_(staged[0], non_blocking=True)
            page.exp_avg_sq.copy_(staged[1], non_blocking=True)
