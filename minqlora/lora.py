"""Chapter 6. Low-rank adapters: what is trained when the weight is not.

The frozen weight W (N, K) gets a correction of rank r, the product of two thin matrices, and only those are
trained::

    Y = X @ W.T + scaling * (X @ lora_A.T) @ lora_B.T          scaling = alpha / r

    N = K = 4096, r = 64    W                     16.8 million numbers, frozen in 4 bits
                            lora_A and lora_B      0.5 million, trained in float32

lora_B starts at zero, so the first forward pass is the base model's own, to the bit. The paper's finding is
that *where* adapters stand matters more than their rank: on every linear layer of every block, and then r = 8
does as well as r = 256.

Variants. rsLoRA scales by alpha / sqrt(r), so that a larger rank does not learn more slowly. LoRA+ gives
lora_B a larger learning rate. DoRA trains the length of each row of W apart from its direction::

    W' = m * (W + scaling * B @ A) / |W + scaling * B @ A|          |.| a row's norm, a constant to autograd

and starts with m = |W|. That norm is wanted in every forward pass, and decoding W for it would cost the
memory that 4 bits save; but the square of a sum has three parts, of which the first never changes and the
others need nothing wider than r::

    |W + s B A|^2  =  |W|^2  +  2 s rowsum((W A.T) * B)  +  s^2 rowsum((B (A A.T)) * B)

W A.T is one more thin product with W, decoded tile by tile as every other.

Initialisation. Instead of zero, lora_B lora_A may start as the part of the full-precision weight that matters
most, while W becomes the rest: PiSSA takes the largest singular values, OLoRA the first columns of a QR
decomposition. LoftQ starts as the largest part of what rounding to 4 bits has lost, and leaves W alone. The
full-precision weights are read a second time for it, one at a time.

Besides linear layers, embeddings, head and norms can be trained whole (`modules_to_save`, a float32 copy
each; the frozen original stays aside), or of embeddings and head some tokens' rows
(`trainable_token_indices`).

An adapter is the set of modules that stand in the base's places. They hold the base's weights by reference,
so a model can have several adapters, and to switch is to put modules back.

Shapes and dtypes: lora_A (r, K) and lora_B (N, r), stored in float32 whatever the compute dtype, because
steps of 2e-4 vanish in bfloat16 (`store_adapters` halves them all the same); both products run in the dtype
of X. Cost: r (N + K) parameters and 2 T r (N + K) FLOPs forward, a few percent of the base product. Saved for
backward: X @ lora_A.T, and X or what X can be made from again if others save that anyway (`made_by`: the two
factors of SwiGLU, say); a dropout's mask, both matrices cast if X is of another dtype; nothing of the base.
DoRA adds N parameters, a second decoding of W with 2 r N K FLOPs in float32, and saves Y.

Differences. The paper and PEFT keep the base layer as a child of the adapter layer; here `LoRALinear` takes
the layer's place and keeps its weight under the same name, so that a checkpoint's names stay valid. PEFT runs
the adapter in float32. Under DoRA with dropout PEFT drops inputs of the base's product too; here only the
adapter's are dropped. PEFT's LoftQ forgets that its product will be scaled.

Paper: "Low-rank Adapters", "QLoRA Finetuning"; LoRA: "Our Method"; rsLoRA, LoRA+, DoRA, PiSSA, OLoRA, LoftQ:
papers of those names.

Before: nf4. Next: optim.
"""

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minqlora.matmul import cast_linear, returned
from minqlora.nf4 import NF4Tensor

# Initialisations. The residual ones take out of the base what the adapter starts with.
PLAIN_INITS = ("default", "gaussian", "orthogonal")
_RESIDUAL = ("pissa", "olora")


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is, in PEFT's terms and by its rules of matching. Patterns are keyed by regular
    expressions for the end of a layer's path.

    Raises ValueError for what cannot be, naming the field.
    """

    r: int = 64
    alpha: float = 16
    dropout: float = 0.0  # probability with which an input of the adapter is zeroed in training
    # "all-linear" for every linear layer but lm_head and the experts of a mixture; names, each matching a
    # layer of that name or path ending ("q_proj", "self_attn.q_proj"); or a regular expression that must
    # match a whole path.
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None  # likewise
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # ranks of some layers
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)  # alphas of some layers
    use_rslora: bool = False
    use_dora: bool = False
    layers_to_transform: int | list[int] | None = None  # only these blocks, by number
    layers_pattern: str | list[str] | None = None  # what the list of blocks is called; None: anything
    modules_to_save: list[str] = field(default_factory=list)  # ends of paths of modules to train whole
    # Tokens whose rows of the embedding are trained, of a tied head too; or such lists by a module's name.
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init: str = "default"  # gaussian, orthogonal, pissa, pissa_niter_N (a faster PiSSA), olora, loftq

    def __post_init__(self) -> None:
        for key, rank in {"the rank r": self.r, **self.rank_pattern}.items():
            if not isinstance(rank, int) or rank < 1:
                raise ValueError(f"{key} must be at least 1, not {rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if not re.fullmatch(r"default|gaussian|orthogonal|pissa(_niter_\d+)?|olora|loftq", self.init):
            known = "default, gaussian, orthogonal, pissa, pissa_niter_N, olora, loftq"
            raise ValueError(f"init must be one of {known}, not {self.init!r}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "layers_pattern says where to find the numbers in layers_to_transform; give both"
            )
        is_regex = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if is_regex and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform and a regular expression of targets contradict each other")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            _compile(pattern, "pattern")

    @property
    def is_residual(self) -> bool:
        """Whether the base loses what the adapter starts with."""
        return self.init.startswith(_RESIDUAL)

    def size(self, path: str) -> tuple[int, float]:
        """Return r and alpha of the layer at `path`."""
        sizes = []
        for pattern, default in ((self.rank_pattern, self.r), (self.alpha_pattern, self.alpha)):
            keys = (key for key in pattern if re.match(rf"(.*\.)?({key})$", path))
            sizes.append(pattern.get(next(keys, path), default))
        return int(sizes[0]), sizes[1]

    def scaling(self, path: str) -> float:
        """Return what the product of the layer at `path` is multiplied by."""
        r, alpha = self.size(path)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


def _compile(pattern: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what} {pattern!r} is not a regular expression: {error}") from None


# ---- what stands in the base's places ----------------------------------------------------------------------


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained correction of rank r. Takes over `linear`'s weight and bias, and
    freezes them.

    linear: any nn.Linear, (K -> N), its weight a plain tensor or an NF4Tensor. r: the rank. alpha: the
    correction's size; it is scaled by alpha / r, by alpha / sqrt(r) with use_rslora. dropout: probability
    with which an input of the adapter is zeroed in training. use_dora: train the rows' lengths apart.

    Maps (..., K) to (..., N) in the dtype of the input. Source: LoRA, "Low-Rank-Parametrized Update
    Matrices"; DoRA, "Weight-Decomposed Low-Rank Adaptation".
    """

    # What a residual initialisation has taken out of the base, fixed: while the adapter is off, it is added.
    initial_A: Tensor | None
    initial_B: Tensor | None
    squared_norm: Tensor  # DoRA's |W|^2, (N,) float32

    def __init__(
        self,
        linear: nn.Linear,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
    ):
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.bias = linear.bias if linear.bias is None else linear.bias.requires_grad_(False)
        self.r, self.alpha = r, alpha
        self.scaling = alpha / math.sqrt(r) if use_rslora else alpha / r
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.enabled = True
        # Where it is not (`model.recomputed`), forward only saves what backward needs, and returns zeros.
        self.result_is_wanted = True
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, linear.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, dtype=torch.float32, device=device))
        # Uniform within 1 / sqrt(K), as in the LoRA paper's code.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.register_buffer("initial_A", None, persistent=False)
        self.register_buffer("initial_B", None, persistent=False)
        self.lora_magnitude_vector: nn.Parameter | None = None
        self._norm_of: tuple[tuple[int, int], Tensor] | None = None
        if use_dora:
            self.reset_magnitude()

    def reset_magnitude(self) -> None:
        """Set DoRA's rows to the lengths that they have; called again when the weight was replaced."""
        # Once in the life of a layer the whole weight is decoded, and dropped.
        norm = torch.linalg.vector_norm(decoded(self.weight), dim=1)  # (N,) float32
        self.register_buffer("squared_norm", norm.square(), persistent=False)
        self._norm_of = None
        self.lora_magnitude_vector = nn.Parameter(self.row_norm())

    def forward(self, x: Tensor) -> Tensor:
        """Return the base layer's output plus the adapter's. x: (..., K) -> (..., N)."""
        flat = x.reshape(-1, x.shape[-1])  # (T, K)
        if not self.enabled and self.initial_A is None:
            y = F.linear(flat, self.weight, self.bias)
        elif not self.enabled or self.lora_magnitude_vector is None:
            y = self._adapted(x, flat, self.bias)
        else:
            y = self._adapted(x, flat, None)
            # m / |.| is close to 1, and bfloat16 has no number between 1 and 1.0078: what is rounded is
            # the distance from 1.
            stretch = (self.lora_magnitude_vector / self.row_norm() - 1).to(y.dtype)  # (N,)
            y = torch.addcmul(y, y, stretch)
            y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _adapted(self, x: Tensor, flat: Tensor, bias: Tensor | None) -> Tensor:
        A, B = (self.lora_A, self.lora_B) if self.enabled else (self.initial_A, self.initial_B)
        assert A is not None and B is not None
        A, B = A.to(x.dtype), B.to(x.dtype)
        z = self.dropout(flat) if self.enabled else flat
        is_wanted = self.result_is_wanted or self.lora_magnitude_vector is not None  # which saves it
        how = self.scaling, is_wanted
        if z is not flat:
            return AdaptedProduct.apply(flat, z, self.weight, bias, A, B, *how, None)
        return AdaptedProduct.apply(flat, None, self.weight, bias, A, B, *how, *made_from(x))

    def row_norm(self) -> Tensor:
        """Return the norms (N,) float32 of the rows of W + scaling B A, by the three parts of their squares.

        In eval mode they are kept until lora_A or lora_B changes: for a single token they would cost r times
        what the layer does.
        """
        if self.training or torch.compiler.is_compiling():
            return self._row_norm()
        version = (self.lora_A._version, self.lora_B._version)
        if self._norm_of is None or self._norm_of[0] != version:
            self._norm_of = version, self._row_norm()
        return self._norm_of[1]

    @torch.no_grad()
    def _row_norm(self) -> Tensor:
        A, B = self.lora_A.float(), self.lora_B.float()
        product = F.linear if isinstance(self.weight, NF4Tensor) else cast_linear
        cross = (product(A, self.weight).T * B).sum(1)  # (r, K) @ (K, N) -> (r, N), in float32
        own = ((B @ (A @ A.T)) * B).sum(1)
        squared = self.squared_norm + 2 * self.scaling * cross + self.scaling**2 * own
        return squared.clamp(min=torch.finfo(torch.float32).tiny).sqrt()  # rounding can leave less than zero

    def train(self, mode: bool = True) -> "LoRALinear":
        """As nn.Module's; norms kept for eval mode are dropped."""
        self._norm_of = None
        return super().train(mode)

    @torch.no_grad()
    def merged(self, weight: Tensor | None = None) -> Tensor:
        """Return the weight (N, K) float32 that does alone what base and adapter do together.

        weight: of the base; None is the layer's own.
        """
        total = decoded(self.weight if weight is None else weight)
        total.addmm_(self.lora_B.to(total), self.lora_A.to(total), alpha=self.scaling)
        if self.lora_magnitude_vector is None:
            return total
        norm = torch.linalg.vector_norm(total, dim=1)
        return total.mul_((self.lora_magnitude_vector.to(total.device) / norm)[:, None])

    def extra_repr(self) -> str:
        """Describe the layer in one line for print(model)."""
        n, k = self.weight.shape
        variant = "" if self.lora_magnitude_vector is None else ", use_dora=True"
        return f"in_features={k}, out_features={n}, r={self.r}, alpha={self.alpha:g}{variant}"


class AdaptedProduct(torch.autograd.Function):
    """X @ W.T + bias + scaling (Z @ A.T) @ B.T as one operation.

    Both ways the correction is added into what the base has made, where plain operations would make a second
    (T, N) in forward, a second (T, K) in backward, and copies of both around adding in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        is_wanted: bool,
        make: Callable[..., Tensor] | None,
        *sources: Tensor,
    ) -> Tensor:
        """Return (T, N); zeros if it is not wanted, and only what is saved is.

        x: (T, K). z: the adapter's input (T, K), None where it is x. weight: (N, K) and bias: (N,), frozen.
        A: (r, K) and B: (N, r), in the dtype of x. make, sources: as of `made_from`; None: x is saved.
        """
        a = F.linear(x if z is None else z, A)  # (T, K) @ (K, r) -> (T, r)
        y = x.new_zeros(()).expand(len(x), len(B))
        if is_wanted:
            y = F.linear(x, weight, bias)  # (T, K) @ (K, N) -> (T, N)
            add_product_(y, a, B.T, scaling)  # (T, r) @ (r, N) -> (T, N)
        saved = sources if make is not None else (x if z is None else z,)
        ctx.save_for_backward(weight, A, B, a, *saved)
        ctx.make, ctx.scaling, ctx.is_shared = make, scaling, z is None
        return returned(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, z, A and B for that of the result, (T, N)."""
        weight, A, B, a, *saved = ctx.saved_tensors
        of_x, of_z, _, _, of_A, of_B = ctx.needs_input_grad[:6]
        grad_a = (grad_y @ B).mul_(ctx.scaling)  # (T, N) @ (N, r) -> (T, r)
        grad_x = grad_y @ weight if of_x else None  # (T, N) @ (N, K) -> (T, K)
        grad_z = grad_a @ A if of_z else None  # (T, r) @ (r, K) -> (T, K)
        if grad_x is not None and ctx.is_shared:
            add_product_(grad_x, grad_a, A)
        grad_A = grad_B = None
        if of_A:
            z = saved[0] if ctx.make is None else ctx.make(*saved).reshape(-1, A.shape[1])
            grad_A = grad_a.T @ z  # (r, T) @ (T, K) -> (r, K)
        if of_B:
            # Turned round: a product of so few columns takes twice the time of one of so few rows.
            grad_B = (a.T @ grad_y).T.mul(ctx.scaling)  # (r, T) @ (T, N) -> (r, N), and its transpose
        return grad_x, grad_z, None, None, grad_A, grad_B, None, None, None, *[None] * len(saved)


def add_product_(y: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """Add alpha a @ b, (T, r) @ (r, N), to y (T, N) in place."""
    if torch.compiler.is_compiling():
        _add_product(y, a, b, alpha)
    else:
        y.addmm_(a, b, alpha=alpha)


# An operator to the compiler, which else makes of it a new tensor, into which y is copied first: with some
# eighty thousand numbers a token and layer, a twentieth of a step of an 8B model.
@torch.library.custom_op("minqlora::add_product", mutates_args={"y"})
def _add_product(y: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    y.addmm_(a, b, alpha=alpha)


def store_adapters(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep lora_A and lora_B of a model's layers, and so their gradients, in `dtype` from here on.

    Half of float32's bytes in bfloat16, at the price of updates that are rounded to 8 bits of mantissa.
    """
    for layer in lora_layers(model).values():
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.data = parameter.data.to(dtype)


def made_by(x: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """Return x, which `make(*sources)` makes again for next to nothing, having noted that.

    An adapter that is given x then saves for its backward not x but `sources`, which others save anyway.
    """
    if not torch.compiler.is_compiling():  # what is saved is the compiler's to decide
        x.made_by = make, *sources  # type: ignore[attr-defined]
    return x


def made_from(x: Tensor) -> tuple[Any, ...]:
    """Return what `made_by` has noted of x: how it can be made again, and each source; None if nothing."""
    return (None,) if torch.compiler.is_compiling() else getattr(x, "made_by", (None,))


class TrainedTokens(nn.Module):
    """An embedding or an output head of which the rows of some tokens are trained and all others frozen.

    base: the module. tokens: whose rows. rows: a parameter (n, D) to share, as a head tied to an embedding
    does; None makes one, which starts as the base's rows, in float32.

    `rows` is a module of the base's own kind with so many rows, so that what a kind does besides (a head may
    scale and cap its logits) is done to them as well.
    """

    tokens: Tensor  # (n,) int64
    row_of: Tensor  # (vocab,) int64: a token's place among the rows, or -1

    def __init__(self, base: nn.Module, tokens: list[int], rows: nn.Parameter | None = None):
        super().__init__()
        self.base, self.token_ids = base.requires_grad_(False), list(tokens)
        self.is_tied = rows is not None
        weight = self.weight
        ids = torch.tensor(tokens, device=weight.device)
        if rows is None:
            rows = nn.Parameter(F.embedding(ids, weight).to(torch.float32))
        self.rows = _twin(base, {"weight": rows})
        self.register_buffer("tokens", ids, persistent=False)
        row_of = torch.full((weight.shape[0],), -1, device=weight.device)
        row_of[ids] = torch.arange(len(tokens), device=weight.device)
        self.register_buffer("row_of", row_of, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The frozen weight (vocab, D), with the trained tokens' rows as they were."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Map token ids (...) to (..., D), or hidden states (..., D) to logits (..., vocab)."""
        if isinstance(self.base, nn.Embedding):
            row = self.row_of[x]  # (...)
            return torch.where((row >= 0)[..., None], self.rows(row.clamp(min=0)), self.base(x))
        logits = self.base(x)
        return logits.index_copy(-1, self.tokens, self.rows(x).to(logits.dtype))

    @torch.no_grad()
    def merged(self, weight: Tensor | None = None) -> Tensor:
        """Return the weight (vocab, D) with the trained rows in it.

        weight: of the base; None is the module's own.
        """
        weight = self.weight if weight is None else weight
        weight = weight.dequantize() if isinstance(weight, NF4Tensor) else weight.clone()
        trained = self.rows.weight
        assert isinstance(trained, Tensor)
        return weight.index_copy_(0, torch.tensor(self.token_ids, device=weight.device), trained.to(weight))


def decoded(weight: Tensor) -> Tensor:
    """Return a copy of a weight in float32, whatever it was."""
    if isinstance(weight, NF4Tensor):
        return weight.dequantize(torch.float32)
    return weight.detach().to(torch.float32, copy=True)


def _twin(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    # A module of the same kind with other parameters, copying none of its own.
    twin = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
    for name, parameter in parameters.items():
        twin.register_parameter(name, parameter)
    return twin


# ---- which modules -----------------------------------------------------------------------------------------


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model by path, as they are without an adapter."""
    replaced = adapters(model).base
    return {
        path: replaced.get(path, module)
        for path, module in model.named_modules()
        if path.rpartition(".")[0] not in replaced
    }


def find_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the paths of the linear layers that get an adapter.

    Experts of a mixture get none, whatever matches them. Raises ValueError if a target matches nothing else,
    or matches lm_head.
    """
    if isinstance(model, nn.Linear):
        raise ValueError("the model is itself a linear layer; wrap it in a LoRALinear")
    linear = [path for path, module in base_modules(model).items() if isinstance(module, nn.Linear)]
    experts = [path for path in linear if ".experts." in path]
    others = [path for path in linear if ".experts." not in path]
    targets = config.target_modules
    if not targets:
        raise ValueError("target_modules is empty, and so matches no linear layer")
    for target in [targets] if isinstance(targets, str) else targets:
        rule = targets if isinstance(targets, str) else [target]
        if any(_matches(path, rule) for path in others):
            continue
        if any(_matches(path, rule) for path in experts):
            raise ValueError(f"target module {target!r} matches only experts, which take no adapter")
        kinds = ", ".join(sorted({path.rpartition(".")[2] for path in others}))
        raise ValueError(f"target module {target!r} matches no linear layer; the model has {kinds}")
    chosen = [path for path in others if _is_target(path, config)]
    if any(path.rpartition(".")[2] == "lm_head" for path in chosen):
        raise ValueError("target_modules names lm_head, but the output head takes no adapter")
    if not chosen:
        raise ValueError("exclude_modules and layers_to_transform leave no linear layer to adapt")
    return chosen


def _matches(path: str, rule: str | list[str], what: str = "target_modules") -> bool:
    if rule == "all-linear":
        return path.rpartition(".")[2] != "lm_head"
    if isinstance(rule, str):
        return _compile(rule, what).fullmatch(path) is not None
    return any(path == name or path.endswith(f".{name}") for name in rule)


def _is_target(path: str, config: LoRAConfig) -> bool:
    if config.exclude_modules and _matches(path, config.exclude_modules, "exclude_modules"):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.modules_to_save):
        return False
    if not _matches(path, config.target_modules):
        return False
    wanted, is_all = config.layers_to_transform, config.target_modules == "all-linear"
    if wanted is None or wanted == [] or (path in config.target_modules and not is_all):
        return True
    # The first number in the path is the block's; a second one would be an expert's.
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    prefixes = [rf"(?:^|.*?\.){pattern}" for pattern in patterns] if patterns else [r".*?\.[^.]*"]
    found = (re.match(rf"{prefix}\.(\d+)\.", path) for prefix in prefixes)
    number = next((int(match[1]) for match in found if match), None)
    return number in ([wanted] if isinstance(wanted, int) else wanted)


def find_modules_to_save(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the paths of the modules that are trained whole: those that end in a name of `modules_to_save`.

    As in PEFT, any ending counts: "norm" is every norm. Raises ValueError for a name that matches nothing, or
    something else than embeddings, the head and norms.
    """
    modules = base_modules(model)
    for name in config.modules_to_save:
        if not any(path.endswith(name) for path in modules if path):
            raise ValueError(f"modules_to_save: no module's path ends in {name!r}")
    chosen = [path for path in modules if path and path.endswith(tuple(config.modules_to_save))]
    for path in chosen:
        module, parameters = modules[path], list(modules[path].parameters())
        is_head = isinstance(module, nn.Linear) and path.rpartition(".")[2] == "lm_head"
        is_norm = bool(parameters) and all(parameter.dim() == 1 for parameter in parameters)
        is_leaf = not any(True for _ in module.children())
        if not is_leaf or not (is_head or is_norm or isinstance(module, nn.Embedding)):
            raise ValueError(
                f"modules_to_save trains embeddings, the head and norms, not {path}; "
                "name a linear layer in target_modules"
            )
    return chosen


def find_token_modules(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[list[int], str | None]]:
    """Return by path the modules of which some tokens' rows are trained: the tokens, and the path of the
    embedding whose rows are shared, as a tied head does, else None.

    Raises ValueError for a module that is not there or trained whole, and for tokens that are not.
    """
    given = config.trainable_token_indices
    if not given:
        return {}
    modules = {
        path: module
        for path, module in base_modules(model).items()
        if isinstance(module, nn.Embedding) or path.rpartition(".")[2] == "lm_head"
    }
    by_path: dict[str, list[int]] = {}
    for name, tokens in (given if isinstance(given, dict) else {"embed_tokens": given}).items():
        paths = [path for path in modules if path.endswith(name)]
        if not paths:
            raise ValueError(f"trainable_token_indices: {name!r} is no embedding and no head of the model")
        by_path |= dict.fromkeys(paths, tokens)
    whole = find_modules_to_save(model, config)
    for path, tokens in by_path.items():
        weight = modules[path].weight
        assert isinstance(weight, Tensor)
        if path in whole:
            raise ValueError(f"{path} is in modules_to_save and so trained whole; its tokens need no naming")
        if not tokens or len(set(tokens)) < len(tokens):
            raise ValueError(f"trainable_token_indices of {path}: none, or one twice")
        for token in tokens:
            if not isinstance(token, int) or not 0 <= token < weight.shape[0]:
                raise ValueError(f"trainable_token_indices: {token!r} is none of {weight.shape[0]} tokens")
    found: dict[str, tuple[list[int], str | None]] = {
        path: (tokens, None) for path, tokens in by_path.items()
    }
    for source in [path for path in by_path if isinstance(modules[path], nn.Embedding)]:
        for path, module in modules.items():
            tied = path != source and module.weight is modules[source].weight
            if tied and path not in whole and by_path.get(path, by_path[source]) == by_path[source]:
                found[path] = (by_path[source], source)
    return found


# ---- adapters of a model -----------------------------------------------------------------------------------


@dataclass
class Adapter:
    """What it is, and the modules that stand in the base's places, by path."""

    config: LoRAConfig
    modules: dict[str, nn.Module]


@dataclass
class Adapters:
    """The adapters of a model by name, which of them is in its place, and what is there without."""

    by_name: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    base: dict[str, nn.Module] = field(default_factory=dict)


def adapters(model: nn.Module) -> Adapters:
    """Return the adapters of a model."""
    # In the model's dictionary and not a submodule: what is not in its place is no part of the model.
    return vars(model).setdefault("_adapters", Adapters())


def active_adapter(model: nn.Module) -> Adapter | None:
    """Return the adapter that is in its place, None if there is none."""
    held = adapters(model)
    return None if held.active is None else held.by_name[held.active]


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapted layers of a model by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_lora(model: nn.Module, *, base: Any = None, name: str = "default", **options: Any) -> list[str]:
    """Put an adapter on a model, in place, and freeze everything else.

    base: full-precision weights by the names of the model's parameters, `base[name]` or `base.read(name)`,
    for an init that starts from them; they are read one at a time. A model that is not quantized has them
    itself. name: the adapter's, to switch to it. options: fields of `LoRAConfig`.

    pissa and olora replace the base's weights, quantized ones by the residual quantized in the same format,
    and so allow no other adapter beside theirs.

    Returns the paths of the adapted layers. Raises ValueError, the model untouched, for what `LoRAConfig` and
    the rules of matching refuse, for a pattern or name that matches nothing, a name that is taken, and a base
    that is missing or in 4 bits. Draws from torch's global random generator: seed first.
    """
    config = LoRAConfig(**options)
    targets = find_targets(model, config)
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in targets):
            raise ValueError(f"pattern {pattern!r} matches no adapted layer")
    _require_possible(model, config, targets, base)
    attach(model, config, name)
    for path in targets:
        start(model, path, config.init, base)
    return targets


def attach(model: nn.Module, config: LoRAConfig, name: str = "default") -> Adapter:
    """Put an adapter that does nothing yet on a model, freeze everything else, and return it.

    Raises as `add_lora` does.
    """
    held = adapters(model)
    if name in held.by_name:
        raise ValueError(f"the model has adapters already, one of them named {name!r}; give another name")
    if held.by_name and any(a.config.is_residual for a in (*held.by_name.values(), Adapter(config, {}))):
        raise ValueError(
            "pissa and olora replace the base's weights, and allow no other adapter beside theirs"
        )
    modules = base_modules(model)
    targets, whole = find_targets(model, config), find_modules_to_save(model, config)
    tokens = find_token_modules(model, config)
    set_adapter(model, None)
    model.requires_grad_(False)
    added = Adapter(config, {})
    for path in targets:
        linear = modules[path]
        assert isinstance(linear, nn.Linear)
        r, alpha = config.size(path)
        variant = dict(use_rslora=config.use_rslora, use_dora=config.use_dora)
        added.modules[path] = LoRALinear(linear, r=r, alpha=alpha, dropout=config.dropout, **variant)
    for path in whole:
        parameters = modules[path].named_parameters()
        copies = {child: nn.Parameter(decoded(parameter)) for child, parameter in parameters}
        added.modules[path] = _twin(modules[path], copies)
    for path, (ids, shared) in sorted(tokens.items(), key=lambda item: item[1][1] is not None):
        source = None if shared is None else added.modules[shared]
        rows = source.rows.weight if isinstance(source, TrainedTokens) else None
        added.modules[path] = TrainedTokens(modules[path], ids, rows)  # type: ignore[arg-type]
    held.base |= {path: modules[path] for path in added.modules}
    held.by_name[name] = added
    set_adapter(model, name)
    return added


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Switch to another adapter of a model, None to the base alone. Nothing is copied.

    Raises ValueError for a name that no adapter has, and for None where the base alone is no model, because a
    residual initialisation has taken a part out of it.
    """
    held = adapters(model)
    if name is not None and name not in held.by_name:
        known = ", ".join(map(repr, held.by_name)) or "none"
        raise ValueError(f"the model has no adapter {name!r}; it has {known}")
    if name is None and any(adapter.config.is_residual for adapter in held.by_name.values()):
        raise ValueError("the base alone lacks what the adapter started with; use adapters_disabled(model)")
    placed = held.base if name is None else held.base | held.by_name[name].modules
    for path, module in placed.items():
        _place(model, path, module)
    held.active = name


def _place(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module.train(model.training))


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model is its base: adapters are skipped, nothing is copied."""
    layers = lora_layers(model).values()
    before = [layer.enabled for layer in layers]
    held, active = adapters(model), active_adapter(model)
    others = [path for path in held.base if not isinstance(active and active.modules.get(path), LoRALinear)]
    try:
        for layer in layers:
            layer.enabled = False
        for path in others:
            _place(model, path, held.base[path])
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
        for path in others:
            _place(model, path, active.modules.get(path, held.base[path]) if active else held.base[path])


# ---- where training starts ---------------------------------------------------------------------------------


def _require_possible(model: nn.Module, config: LoRAConfig, targets: Iterable[str], base: Any) -> None:
    # Before anything is changed: what the init asks of the weights.
    if config.init in PLAIN_INITS:
        if config.init == "orthogonal" and any(config.size(path)[0] % 2 for path in targets):
            raise ValueError("init orthogonal needs even ranks")
        return
    modules = base_modules(model)
    weights = {path: modules[path].weight for path in targets}
    quantized = [isinstance(weight, NF4Tensor) for weight in weights.values()]
    if any(quantized) and base is None:
        raise ValueError(f"init {config.init} starts from full-precision weights: give their folder as base")
    if config.init == "loftq" and not all(quantized):
        raise ValueError("init loftq makes up for what 4 bits have lost, and the model is not in 4 bits")
    for path, weight in weights.items():
        assert isinstance(weight, Tensor)
        if config.size(path)[0] > min(weight.shape):
            n, k = weight.shape
            raise ValueError(
                f"init {config.init}: {path} is {n} x {k}, too small for rank {config.size(path)[0]}"
            )


@torch.no_grad()
def start(model: nn.Module, path: str, init: str, base: Any = None) -> None:
    """Give lora_A and lora_B of a new layer the numbers that `init` starts with.

    base: read where `init` asks for the full-precision weight; None: the layer's own is that.
    """
    layer = lora_layers(model)[path]
    if init == "gaussian":
        nn.init.normal_(layer.lora_A, std=1 / layer.r)
    elif init == "orthogonal":
        _draw_orthogonal(layer)
    elif init != "default":
        weight = read_full(base, f"{path}.weight", layer.weight)
        if init == "loftq":
            weight -= decoded(layer.weight)
        A, B = leading_part(weight, init, layer.r, layer.scaling)
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
        if init != "loftq":
            take_out(model, path, base, A, B)
        elif layer.lora_magnitude_vector is not None:
            layer.reset_magnitude()


def leading_part(weight: Tensor, init: str, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A (r, K) and B (N, r): for olora the first r columns of Q and rows of R, else the best
    approximation of rank r, scaling B A, of weight (N, K) float32.

    Source: PiSSA, "PiSSA: Principal Singular Values and Singular Vectors Adaptation"; OLoRA, algorithm 1;
    LoftQ, "SVD" of its algorithm 1, there of what quantization has lost.
    """
    if init == "olora":
        Q, R = torch.linalg.qr(weight)
        return R[:r].contiguous(), Q[:, :r].contiguous()
    if init.startswith("pissa_niter_"):
        U, S, V = torch.svd_lowrank(weight, r, niter=int(init.removeprefix("pissa_niter_")))
        Vh = V.T
    else:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = (S[:r] / scaling).sqrt()  # one half of each singular value to A, the other to B
    return root[:, None] * Vh[:r], U[:, :r] * root


@torch.no_grad()
def take_out(model: nn.Module, path: str, base: Any, A: Tensor, B: Tensor) -> None:
    """Replace a layer's weight W by W - scaling B A, quantized as it was, and remember A and B.

    base: has the full-precision W; None: the layer itself.
    """
    layer = lora_layers(model)[path]
    if layer.weight.is_meta:
        layer.initial_A, layer.initial_B = A, B
        return
    layer.initial_A, layer.initial_B = A.to(layer.weight.device), B.to(layer.weight.device)
    full = read_full(base, f"{path}.weight", layer.weight)
    residual = full.addmm_(layer.initial_B, layer.initial_A, alpha=-layer.scaling)
    layer.weight = nn.Parameter(_like(layer.weight, residual), requires_grad=False)
    adapters(model).base[path].register_parameter("weight", layer.weight)  # or the old one would stay
    if layer.lora_magnitude_vector is not None:
        layer.reset_magnitude()


def _like(old: Tensor, weight: Tensor) -> Tensor:
    # A float32 weight in the dtype, or the 4-bit format, of another.
    if not isinstance(old, NF4Tensor):
        return weight.to(old.dtype)
    new = NF4Tensor.from_float(
        weight,
        quant_type=old.format.quant_type,
        block_size=old.format.block_size,
        nested_block_size=old.format.nested_block_size,
        double_quant=old.absmax is None,
    )
    return NF4Tensor(new.parts, old.dtype, new.format)


def _draw_orthogonal(layer: LoRALinear) -> None:
    # B A is zero though neither is: even and odd rows of an orthogonal matrix keep them apart.
    half, (n, k) = layer.r // 2, layer.weight.shape
    rows = torch.linalg.qr(torch.randn(layer.r, layer.r))[0]
    layer.lora_A.copy_((torch.randn(k, half) @ rows[0::2]).T / 10)
    layer.lora_B.copy_(torch.randn(half, n).T @ rows[1::2] / 10)


def read_full(base: Any, name: str, weight: Tensor) -> Tensor:
    """Return a weight of `base` in float32, on the device of the model's own; without a base the model's own.

    Raises ValueError if it is in 4 bits, or cannot be what the model's was made from.
    """
    if base is None:
        return decoded(weight)
    full = base.read(name) if hasattr(base, "read") else base[name]
    if isinstance(full, NF4Tensor):
        raise ValueError(f"base has {name} in 4 bits; give the full-precision model that it was made from")
    if full.shape != weight.shape:
        raise ValueError(
            f"base has {name} of shape {tuple(full.shape)}, the model of {tuple(weight.shape)}; "
            "give the model that this one was made from"
        )
    full = full.to(weight.device, torch.float32, copy=True)
    if weight.is_meta:
        return full
    # Rounding to 4 bits moves a weight by a tenth of its size, and to 16 bits by nothing to speak of.
    if (full - decoded(weight)).norm() > 0.5 * full.norm():
        raise ValueError(
            f"base has another {name} than the model; give the model that this one was made from"
        )
    return full


# ---- training and merging ----------------------------------------------------------------------------------


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, loraplus_lr_ratio: float | None = None
) -> list[dict[str, Any]]:
    """Return a model's trained parameters in groups for an optimizer, by LoRA+.

    loraplus_lr_ratio: the learning rate of lora_B, and of all vectors, against `lr`, and vectors other than
    DoRA's then do not decay; None is one group. Source: LoRA+; the groups are those of PEFT.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if loraplus_lr_ratio is None:
        return [{"params": [p for _, p in trained], "lr": lr, "weight_decay": weight_decay}]
    slow, fast, undecayed = [], [], []
    for name, parameter in trained:
        if parameter.dim() > 1 and not name.endswith("lora_B"):
            slow.append(parameter)
        elif parameter.dim() > 1 or name.endswith("lora_magnitude_vector"):
            fast.append(parameter)
        else:
            undecayed.append(parameter)
    groups = [
        {"params": slow, "lr": lr, "weight_decay": weight_decay},
        {"params": fast, "lr": lr * loraplus_lr_ratio, "weight_decay": weight_decay},
        {"params": undecayed, "lr": lr * loraplus_lr_ratio, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def merge_lora(model: nn.Module, *, dtype: torch.dtype | None = None) -> list[str]:
    """Merge the active adapter into a model's weights, in place; other adapters are forgotten.

    dtype: of the merged weights; None keeps each weight's own. Returns the paths of what was merged. Raises
    ValueError, the model untouched, if there is no active adapter, and for weights in 4 bits without a dtype:
    rounding the sum to 4 bits again would change what was learned.
    """
    held, active = adapters(model), active_adapter(model)
    if active is None:
        raise ValueError("the model has no active adapter to merge")
    packed = [path for path, layer in lora_layers(model).items() if isinstance(layer.weight, NF4Tensor)]
    if packed and dtype is None:
        raise ValueError(f"{packed[0]} is in 4 bits: give a dtype to decode to, such as torch.bfloat16")
    tied: dict[int, nn.Parameter] = {}  # by the rows that an embedding and a head share, their one weight
    for path, module in active.modules.items():
        base = held.base[path]
        for name, parameter in base.named_parameters():
            if isinstance(module, LoRALinear | TrainedTokens):
                merged = module.merged() if name == "weight" else parameter
            else:
                merged = module.get_parameter(name)
            new = nn.Parameter(merged.detach().to(dtype or parameter.dtype), requires_grad=False)
            if isinstance(module, TrainedTokens):
                new = tied.setdefault(id(module.rows.weight), new)
            base.register_parameter(name, new)
        _place(model, path, base)
    vars(model).pop("_adapters")
    return list(active.modules)
