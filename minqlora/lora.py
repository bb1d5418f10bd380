"""Chapter 6. Low-rank adapters: what is trained when the weight is not.

The frozen weight W (N, K) gets a correction of rank r, the product of two thin matrices, and only those are
trained::

    Y = X @ W.T + scaling * (X @ lora_A.T) @ lora_B.T          scaling = alpha / r

    N = K = 4096, r = 64    W                     16.8 million numbers, frozen in 4 bits
                            lora_A and lora_B      0.5 million, trained in float32

lora_B starts at zero, so the first forward pass is the base model's own, to the bit. The paper's finding is
that *where* adapters stand matters more than their rank: on every linear layer of every block, and then r = 8
does as well as r = 256.

Shapes and dtypes: lora_A (r, K) and lora_B (N, r), stored in float32 whatever the compute dtype, because
steps of 2e-4 vanish in bfloat16; both products run in the dtype of X. Cost: r (N + K) parameters and
2 T r (N + K) FLOPs forward, a few percent of the base product. Saved for backward: X and X @ lora_A.T, a
dropout's mask, both matrices cast if X is not float32; nothing of the base.

Differences. The paper and PEFT keep the base layer as a child of the adapter layer; here `LoRALinear` takes
the layer's place and keeps its weight under the same name, so that a checkpoint's names stay valid. PEFT runs
the adapter in float32.

Paper: "Low-rank Adapters", "QLoRA Finetuning"; LoRA: "Our Method".

Before: nf4. Next: optim.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained correction of rank r. Takes over `linear`'s weight and bias, and
    freezes them.

    linear: any nn.Linear, (K -> N), its weight a plain tensor or an NF4Tensor. r: the rank. alpha: the
    correction's size; it is scaled by alpha / r. dropout: probability with which an input of the adapter is
    zeroed in training.

    Maps (..., K) to (..., N) in the dtype of the input. Source: LoRA, "Low-Rank-Parametrized Update
    Matrices".
    """

    def __init__(self, linear: nn.Linear, *, r: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.bias = linear.bias if linear.bias is None else linear.bias.requires_grad_(False)
        self.r, self.alpha, self.scaling = r, alpha, alpha / r
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.enabled = True
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(
            self.lora_A, a=math.sqrt(5)
        )  # uniform within 1 / sqrt(K), as in the LoRA paper's code

    def forward(self, x: Tensor) -> Tensor:
        """Return the base layer's output plus the adapter's. x: (..., K) -> (..., N)."""
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        flat = x.reshape(-1, x.shape[-1])  # (T, K)
        y = F.linear(flat, self.weight, self.bias)  # (T, N)
        a = F.linear(self.dropout(flat), self.lora_A.to(x.dtype))  # (T, K) @ (K, r) -> (T, r)
        # Added into the base's fresh output: a second (T, N) for the correction would double what the layer
        # touches.
        y.addmm_(a, self.lora_B.to(x.dtype).T, alpha=self.scaling)  # (T, r) @ (r, N) -> (T, N)
        return y.view(*x.shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        """Describe the layer in one line for print(model)."""
        n, k = self.weight.shape
        return f"in_features={k}, out_features={n}, r={self.r}, alpha={self.alpha:g}"


def add_lora(
    model: nn.Module,
    *,
    r: int = 64,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: str | list[str] = "all-linear",
) -> list[str]:
    """Put adapters on a model's linear layers, in place, and freeze everything else.

    target_modules: "all-linear" for every linear layer but `lm_head`; a list of names, each matching a module
    of that name or path ending ("q_proj", "self_attn.q_proj"); or a regular expression that must match a
    whole path. PEFT's rules.

    Returns the paths of the adapted layers. Raises ValueError if nothing matches, if a name in the list
    matches nothing or lm_head, if the model has adapters already, or for an impossible r or dropout. Draws
    from torch's global random generator: seed first.
    """
    if r < 1:
        raise ValueError(f"the rank r must be at least 1, not {r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {dropout}")
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has adapters already")
    chosen = find_targets(model, target_modules)
    model.requires_grad_(False)
    for name in chosen:
        parent_name, _, child_name = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(
            model.get_submodule(parent_name),
            child_name,
            LoRALinear(linear, r=r, alpha=alpha, dropout=dropout),
        )
    return chosen


def find_targets(model: nn.Module, target_modules: str | list[str]) -> list[str]:
    """Return the paths of the linear layers that `target_modules` means, by the rules of `add_lora`."""
    if isinstance(model, nn.Linear):
        raise ValueError("the model is itself a linear layer; wrap it in a LoRALinear")
    linear_names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in linear_names}))
    if not target_modules:
        raise ValueError("target_modules is empty, and so matches no linear layer")
    for target in [target_modules] if isinstance(target_modules, str) else target_modules:
        rule = target_modules if isinstance(target_modules, str) else [target]
        if not any(_is_target(name, rule) for name in linear_names):
            raise ValueError(f"target module {target!r} matches no linear layer; the model has {kinds}")
    chosen = [name for name in linear_names if _is_target(name, target_modules)]
    if any(name.rpartition(".")[2] == "lm_head" for name in chosen):
        raise ValueError("target_modules names lm_head, but the output head takes no adapter")
    return chosen


def _is_target(name: str, target_modules: str | list[str]) -> bool:
    if target_modules == "all-linear":
        return name.rpartition(".")[2] != "lm_head"
    if isinstance(target_modules, str):
        try:
            return re.fullmatch(target_modules, name) is not None
        except re.error as error:
            message = f"target_modules {target_modules!r} is not a regular expression: {error}"
            raise ValueError(message) from None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapted layers of a model by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model is its base: adapters are skipped, nothing is copied."""
    layers = lora_layers(model).values()
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
