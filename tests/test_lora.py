"""Adapters: PEFT's layer and PEFT's rules, and a backward pass that keeps nothing of the frozen weight."""

import copy
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint

from minqlora import lora
from minqlora.lora import (
    LoRAConfig,
    LoRALinear,
    TrainedTokens,
    adapters_disabled,
    add_lora,
    find_modules_to_save,
    find_targets,
    leading_part,
    lora_layers,
    merge_lora,
    parameter_groups,
    set_adapter,
)
from minqlora.nf4 import Format, NF4Tensor

peft = pytest.importorskip("peft")

T, RANK = 2, 2
WIDTHS = (40, 48, 56)  # of a stack of two layers; the smaller weight has 40 * 48 numbers
SMALLEST = 40 * 48


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nf4_layer(
    k: int, n: int, bias: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Linear:
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    weight = NF4Tensor.from_float(randn(n, k, seed=seed, dtype=dtype) / k**0.5)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def lora_layer(k: int, n: int, *, dropout: float = 0.0, seed: int = 0, **options) -> LoRALinear:
    layer = LoRALinear(nf4_layer(k, n, seed=seed, **options), r=RANK, alpha=6, dropout=dropout)
    with torch.no_grad():
        layer.lora_A.copy_(randn(RANK, k, seed=seed + 1) / k**0.5)
        layer.lora_B.copy_(randn(n, RANK, seed=seed + 2))  # zeros would hide half of the gradients
    return layer


def stack(**options) -> nn.Sequential:
    """Two adapted layers in a row, over NF4 weights."""
    return nn.Sequential(lora_layer(*WIDTHS[:2], **options), lora_layer(*WIDTHS[1:], seed=7, **options))


class TinyModel(nn.Module):
    """Linear layers under names that rules could confuse: q_proj and mq_proj, in a layer and outside."""

    def __init__(self) -> None:
        super().__init__()
        attn = {name: nn.Linear(4, 4) for name in ("q_proj", "mq_proj", "o_proj")}
        mlp = dict(norm=nn.LayerNorm(4), up_proj=nn.Linear(4, 6), down_proj=nn.Linear(6, 4))
        layer = nn.ModuleDict(dict(attn=nn.ModuleDict(attn), mlp=nn.ModuleDict(mlp)))
        self.embed_tokens = nn.Embedding(8, 4)
        self.layers = nn.ModuleList([layer, copy.deepcopy(layer)])
        self.q_proj = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            attn, mlp = layer["attn"], layer["mlp"]
            x = x + attn["o_proj"](attn["q_proj"](x) * attn["mq_proj"](x))
            x = x + mlp["down_proj"](mlp["up_proj"](mlp["norm"](x)))
        return self.lm_head(self.q_proj(x))


@pytest.fixture(autouse=True)
def _seeded_and_nothing_compiled() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def run(
    model: nn.Module, f: Callable[[Tensor], Tensor], *shape: int, dtype=torch.float32
) -> tuple[Tensor, ...]:
    """The output of `f`, which applies `model`, and the gradients of its input and of the parameters."""
    model.zero_grad()
    x = randn(*shape, dtype=dtype).requires_grad_()
    torch.manual_seed(0)  # for dropout
    y = f(x)
    y.square().sum().backward()
    return y, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)


def assert_near(results: list[tuple[Tensor, ...]]) -> None:
    """Two runs gave the same tensors, but for the order of sums of fifty float32, or an ulp of bfloat16."""
    for a, b in zip(*results, strict=True):
        bound = 1e-5 if a.dtype == torch.float32 else 2**-8
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= bound * b.abs().max()


# -- one layer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", [True, False])
def test_a_new_adapter_leaves_the_base_as_it_is_to_the_bit(quantized: bool, dtype, lead):
    linear = nf4_layer(11, 6, bias=True, dtype=dtype) if quantized else nn.Linear(11, 6, dtype=dtype)
    x = randn(*lead, 11, dtype=dtype)
    expected = linear(x)
    y = LoRALinear(linear, r=3, alpha=16)(x)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("quantized", [True, False])
def test_it_takes_over_weight_and_bias_under_their_names_and_freezes_them(quantized: bool):
    linear = nf4_layer(11, 6, bias=True) if quantized else nn.Linear(11, 6)
    weight, bias = linear.weight, linear.bias
    layer = LoRALinear(linear, r=3, alpha=16)
    assert layer.weight is weight and layer.bias is bias
    trained = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
    assert trained == {"weight": False, "bias": False, "lora_A": True, "lora_B": True}


def test_a_layer_adapted_after_a_deepcopy_keeps_its_weight_as_a_parameter():
    layer = LoRALinear(copy.deepcopy(nf4_layer(11, 6)), r=3, alpha=16)
    assert "weight" in dict(layer.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_float32_whatever_the_base(dtype: torch.dtype):
    layer = LoRALinear(nn.Linear(11, 6, dtype=dtype), r=3, alpha=16)
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((3, 11), (6, 3))
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert not layer.lora_B.any()


def test_a_new_lora_A_is_drawn_as_peft_draws_it():
    linear = nn.Linear(11, 6)
    theirs = peft.tuners.lora.Linear(linear, "default", peft.LoraConfig(), r=3, lora_alpha=16)
    torch.manual_seed(0)
    theirs.reset_lora_parameters("default", init_lora_weights=True)
    torch.manual_seed(0)
    assert torch.equal(LoRALinear(linear, r=3, alpha=16).lora_A, theirs.lora_A["default"].weight)


def peft_layer(kind: type, base: nn.Linear, ours: LoRALinear) -> nn.Module:
    """PEFT's adapter layer over `base`, with the adapter of ours."""
    options = dict(r=ours.r, lora_alpha=ours.alpha, lora_dropout=getattr(ours.dropout, "p", 0.0))
    theirs = kind(base.requires_grad_(False), "default", config=peft.LoraConfig(**options), **options)
    theirs.lora_A["default"].weight.data.copy_(ours.lora_A.data)
    theirs.lora_B["default"].weight.data.copy_(ours.lora_B.data)
    return theirs


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_output_and_gradients_are_those_of_peft(dropout: float, bias: bool, lead: tuple[int, ...]):
    ours, base = lora_layer(11, 6, dropout=dropout, bias=bias), nn.Linear(11, 6)
    base.weight.data, base.bias = ours.weight.dequantize(), ours.bias
    theirs = peft_layer(peft.tuners.lora.Linear, base, ours)
    # Both draw one mask of the input's size from one seed.
    assert_near([run(layer, layer, *lead, 11) for layer in (ours, theirs)])


def test_output_and_gradients_are_those_of_peft_over_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    # K is a multiple of 64, because bitsandbytes' AVX-512 kernel finds the wrong scales for others.
    base = bnb.nn.Linear4bit(64, 6, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    base.to("cpu")  # which quantizes
    state = base.weight.quant_state
    parts = dict(packed=base.weight.data[:, 0], codebook=state.code, offset=state.offset)
    parts |= dict(
        absmax_codes=state.absmax, nested_absmax=state.state2.absmax, nested_codebook=state.state2.code
    )
    ours = lora_layer(64, 6)
    ours.weight = nn.Parameter(NF4Tensor(parts, torch.float32, Format((6, 64))), requires_grad=False)
    theirs = peft_layer(peft.tuners.lora.Linear4bit, base, ours)
    assert_near([run(layer, layer, 3, 64) for layer in (ours, theirs)])


@pytest.mark.parametrize("alpha, r", [(16, 4), (1, 8)])
def test_the_correction_is_scaled_by_alpha_over_r(alpha: float, r: int):
    layer = LoRALinear(nn.Linear(5, 3, bias=False), r=r, alpha=alpha)
    nn.init.normal_(layer.lora_B)
    merged = layer.weight.double() + alpha / r * layer.lora_B.double() @ layer.lora_A.double()
    x = randn(2, 5)
    torch.testing.assert_close(layer(x), (x.double() @ merged.T).float())


def test_gradients_go_to_the_adapter_and_to_the_input_alone():
    layer, x = lora_layer(11, 6, bias=True), randn(2, 11).requires_grad_()
    layer(x).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    assert x.grad.any() and layer.lora_A.grad.any() and layer.lora_B.grad.any()


def test_a_layer_whose_input_needs_no_gradient_trains_too():
    layer, x = lora_layer(11, 6), randn(2, 11)
    layer(x).sum().backward()
    assert layer.lora_A.grad.any() and layer.lora_B.grad.any()


def test_the_input_is_not_changed():
    layer, x = lora_layer(11, 11, dropout=0.5), randn(2, 11)
    before = x.clone()
    layer(x)
    assert torch.equal(x, before)


def test_dropout_touches_the_adapter_in_training_alone():
    layer, x = lora_layer(11, 6, dropout=0.5), randn(2, 11)
    plain = lora_layer(11, 6)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), plain(x))
    nn.init.zeros_(layer.train().lora_B)
    assert torch.equal(layer(x), F.linear(x, layer.weight))


def test_print_describes_a_layer_in_one_line():
    assert "in_features=11, out_features=6, r=2, alpha=6" in repr(lora_layer(11, 6))


# -- variants ------------------------------------------------------------------------------------------------


def dora_layer(k: int, n: int, **options) -> LoRALinear:
    layer = LoRALinear(nf4_layer(k, n, **options), r=RANK, alpha=6, use_dora=True)
    with torch.no_grad():
        layer.lora_A.copy_(randn(RANK, k, seed=1) / k**0.5)
        layer.lora_B.copy_(randn(n, RANK, seed=2))
        layer.lora_magnitude_vector.mul_(1 + 0.1 * randn(n, seed=3))
    return layer


def test_rslora_scales_by_alpha_over_the_root_of_r():
    assert LoRALinear(nn.Linear(5, 3), r=16, alpha=8, use_rslora=True).scaling == 2.0


def test_new_dora_leaves_the_base_as_it_is():
    linear = nf4_layer(11, 6, bias=True)
    x = randn(3, 11)
    torch.testing.assert_close(LoRALinear(linear, r=2, alpha=6, use_dora=True)(x), linear(x))


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_doras_norm_in_three_parts_is_the_norm(size: float):
    layer = dora_layer(96, 40)
    with torch.no_grad():
        layer.lora_B.mul_(size)
    weight = layer.weight.dequantize(torch.float64)
    direct = (weight + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()).norm(dim=1)
    torch.testing.assert_close(layer.row_norm().double(), direct, rtol=1e-6, atol=0)


def test_doras_norm_survives_an_adapter_that_takes_the_weight_away():
    linear = nn.Linear(8, 6, bias=False)
    layer = LoRALinear(linear, r=6, alpha=6, use_dora=True)
    with torch.no_grad():
        layer.lora_B.copy_(torch.eye(6))
        layer.lora_A.copy_(-linear.weight)
    assert layer(randn(2, 8)).isfinite().all()
    assert (layer.row_norm() < 1e-3).all()  # the root of a float32's rounding


def test_doras_output_and_gradients_are_those_of_peft():
    ours, base = dora_layer(11, 6, bias=True), nn.Linear(11, 6)
    base.weight.data, base.bias = ours.weight.dequantize(), ours.bias
    options = dict(r=RANK, lora_alpha=6)
    theirs = peft.tuners.lora.Linear(
        base.requires_grad_(False), "default", config=peft.LoraConfig(use_dora=True, **options), **options
    )
    theirs.lora_A["default"].weight.data.copy_(ours.lora_A.data)
    theirs.lora_B["default"].weight.data.copy_(ours.lora_B.data)
    theirs.lora_magnitude_vector["default"].weight.data.copy_(ours.lora_magnitude_vector.data)
    assert_near([run(layer, layer, 2, 3, 11) for layer in (ours, theirs)])


def test_doras_stretch_is_not_rounded_to_bfloat16():
    layer, x = dora_layer(64, 6, dtype=torch.bfloat16), randn(200, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.lora_magnitude_vector.copy_(layer.row_norm() * 1.005)  # between bfloat16's 1 and 1.0078
        stretched = layer(x).float()
        layer.lora_magnitude_vector.copy_(layer.row_norm())
        plain = layer(x).float()
    ratio = (stretched * plain).sum(0) / plain.square().sum(0)
    assert (ratio - 1.005).abs().max() < 1.5e-3  # a factor rounded to bfloat16 would be 2.8e-3 off


def test_dora_saves_its_output_for_backward_and_nothing_dequantized():
    layer = dora_layer(*WIDTHS[:2])
    y, kept = saved_tensors(layer, randn(T, WIDTHS[0]).requires_grad_())
    assert all(t.numel() < SMALLEST for t in kept if t.is_floating_point())
    inputs, projections, outputs, vectors = T * WIDTHS[0], T * RANK, T * WIDTHS[1], 2 * WIDTHS[1]
    assert saved_bytes(layer, kept) == 4 * (inputs + projections + outputs + vectors)


def test_dora_compiles():
    layer = dora_layer(*WIDTHS[:2], bias=True)
    compiled = torch.compile(layer, backend=compiled_by(default_partition), fullgraph=True)
    assert_near([run(layer, f, T, WIDTHS[0]) for f in (layer, compiled)])


def test_in_eval_mode_doras_norm_is_kept_until_something_changes(monkeypatch: pytest.MonkeyPatch):
    layer, calls, norm = dora_layer(11, 6).eval(), [], LoRALinear._row_norm
    monkeypatch.setattr(LoRALinear, "_row_norm", lambda self: calls.append(1) or norm(self))
    x = randn(2, 11)
    first = layer(x)
    assert torch.equal(layer(x), first) and len(calls) == 1
    with torch.no_grad():
        layer.lora_B.mul_(2)
    assert not torch.equal(layer(x), first) and len(calls) == 2
    layer.train()(x), layer(x)
    assert len(calls) == 4


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "pissa_niter_3", "olora"])
def test_a_start_is_drawn_as_peft_draws_it(init: str):
    model = nn.ModuleDict(dict(q_proj=nn.Linear(11, 7)))
    base = copy.deepcopy(model.q_proj)
    before = base.weight.clone()
    config = peft.LoraConfig(init_lora_weights=init)
    theirs = peft.tuners.lora.Linear(base, "default", config=peft.LoraConfig(), r=4, lora_alpha=6)
    torch.manual_seed(0)
    if init.startswith("pissa"):
        theirs.pissa_init("default", init)
    elif init == "olora":
        theirs.olora_init("default")
    elif init == "orthogonal":
        theirs.orthogonal_init("default")
    else:
        theirs.reset_lora_parameters("default", config.init_lora_weights)
    model.q_proj.weight.data.copy_(before)
    add_lora(model, r=4, alpha=6)
    torch.manual_seed(0)
    lora.start(model, "q_proj", init)
    layer = model.q_proj
    torch.testing.assert_close(layer.lora_A, theirs.lora_A["default"].weight)
    torch.testing.assert_close(layer.lora_B, theirs.lora_B["default"].weight)
    torch.testing.assert_close(layer.weight, theirs.base_layer.weight, rtol=1e-5, atol=1e-6)


# -- what is saved for backward ------------------------------------------------------------------------------


def live(model: nn.Module) -> set[int]:
    """Addresses of the memory that the model holds anyway."""
    parameters = [p for p in model.parameters() if not isinstance(p, NF4Tensor)]
    parts = [part for p in model.parameters() if isinstance(p, NF4Tensor) for part in p.parts.values()]
    return {tensor.untyped_storage().data_ptr() for tensor in parameters + parts}


def saved_tensors(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.extend(tensor.parts.values() if isinstance(tensor, NF4Tensor) else [tensor])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        return f(x), kept


def saved_bytes(model: nn.Module, kept: list[Tensor]) -> int:
    """Bytes that the tensors kept hold beyond the model's own, each piece of memory counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in kept}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in live(model))


def test_backward_saves_inputs_and_their_projections_and_nothing_else():
    model = stack()
    y, kept = saved_tensors(model, randn(T, WIDTHS[0]).requires_grad_())
    inputs, projections = T * (WIDTHS[0] + WIDTHS[1]), 2 * T * RANK
    assert saved_bytes(model, kept) == 4 * (inputs + projections)
    assert all(t.numel() < SMALLEST for t in kept if t.is_floating_point())


def test_backward_in_bfloat16_saves_the_rounded_adapters_too():
    model = stack(dtype=torch.bfloat16)
    y, kept = saved_tensors(model, randn(T, WIDTHS[0], dtype=torch.bfloat16).requires_grad_())
    inputs, projections = T * (WIDTHS[0] + WIDTHS[1]), 2 * T * RANK
    adapters = RANK * (WIDTHS[0] + 2 * WIDTHS[1] + WIDTHS[2])
    assert saved_bytes(model, kept) == 2 * (inputs + projections + adapters)


def test_backward_with_dropout_saves_its_mask_too():
    model = stack(dropout=0.5)
    y, kept = saved_tensors(model, randn(T, WIDTHS[0]).requires_grad_())
    inputs, projections = T * (WIDTHS[0] + WIDTHS[1]), 2 * T * RANK
    assert saved_bytes(model, kept) == 4 * (2 * inputs + projections)  # the mask is as large as the input
    assert all(t.numel() < SMALLEST for t in kept if t.is_floating_point())


def decoded_in_plain_operations(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The same layer as one would write it first: what it saves is what this package exists to avoid."""
    w = NF4Tensor.from_float(linear.weight.dequantize(), double_quant=False)
    codes = torch.stack([w.packed >> 4, w.packed & 15], 1).view(-1, 64)

    def f(x: Tensor) -> Tensor:
        return x @ (w.codebook[codes.int()] * w.absmax[:, None]).view(w.shape).T

    return f


def test_a_dequantized_weight_would_have_been_seen():
    linear = nf4_layer(64, 48)
    x = randn(T, 64).requires_grad_()
    _, kept = saved_tensors(lambda x: F.linear(x, linear.weight.dequantize()), x)
    assert saved_bytes(linear, kept) == 4 * 64 * 48
    assert sum(saved_by_the_compiler(decoded_in_plain_operations(linear), x, default_partition)) >= 64 * 48


# -- under torch.compile -------------------------------------------------------------------------------------


def boxed(graph: torch.fx.GraphModule, _) -> Callable:
    """Run the compiler's graph as it is: all of torch.compile but the kernels, and so no C++ compiler."""

    def run(inputs: list) -> list:
        return graph.forward(*inputs)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def compiled_by(partition: Callable, on_backward: Callable = boxed) -> Callable:
    """A backend for torch.compile that splits forward from backward by `partition`."""
    return aot_autograd(fw_compiler=boxed, bw_compiler=on_backward, partition_fn=partition)


def saved_by_the_compiler(f: Callable[[Tensor], Tensor], x: Tensor, partition: Callable) -> list[int]:
    """Sizes of the floating-point tensors that the compiled backward of `f` takes, y's gradient included."""
    sizes: list[int] = []

    def record(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        sizes.extend(t.numel() for t in inputs if isinstance(t, Tensor) and t.is_floating_point())
        return boxed(graph, inputs)

    torch.compile(f, backend=compiled_by(partition, record), fullgraph=True)(x).sum().backward()
    assert sizes
    return sizes


PARTITIONS = pytest.mark.parametrize("partition", [default_partition, min_cut_rematerialization_partition])


@PARTITIONS
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_backward_saves_nothing_dequantized(dtype: torch.dtype, dropout: float, partition: Callable):
    x = randn(T, WIDTHS[0], dtype=dtype).requires_grad_()
    sizes = saved_by_the_compiler(stack(dropout=dropout, dtype=dtype), x, partition)
    # All of them together, inputs, adapters and codebooks, are fewer numbers than the smaller weight has.
    assert sum(sizes) < SMALLEST


@PARTITIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_output_and_gradients_equal_eager(dtype: torch.dtype, partition: Callable):
    model = stack(bias=True, dtype=dtype)
    compiled = torch.compile(model, backend=compiled_by(partition), fullgraph=True)
    assert_near([run(model, f, T, 3, WIDTHS[0], dtype=dtype) for f in (model, compiled)])


def transparent(dropout: float) -> LoRALinear:
    """A layer that shows its dropout mask: no base, and an adapter that is the identity."""
    linear = nn.Linear(6, 6, bias=False)
    linear.weight = nn.Parameter(NF4Tensor.from_float(torch.zeros(6, 6)), requires_grad=False)
    layer = LoRALinear(linear, r=6, alpha=6, dropout=dropout)
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(6))
        layer.lora_B.copy_(torch.eye(6))
    return layer


def assert_backward_uses_the_mask_of_forward(layer: LoRALinear, f: Callable[[Tensor], Tensor]) -> Tensor:
    x, grad_y = (randn(50, 6).abs() + 0.1).requires_grad_(), randn(50, 6, seed=1)
    layer.zero_grad()
    y = f(x)
    y.backward(grad_y)
    mask = (y != 0).float()
    keep = 1 - layer.dropout.p
    assert 0.6 < mask.mean() < 0.9  # of 300 draws at 0.75
    torch.testing.assert_close(y, x * mask / keep)
    torch.testing.assert_close(x.grad, grad_y * mask / keep)
    torch.testing.assert_close(layer.lora_A.grad, grad_y.T @ (x * mask / keep))
    torch.testing.assert_close(layer.lora_B.grad, grad_y.T @ (x * mask / keep))
    return mask


@pytest.mark.parametrize("partition", [None, default_partition, min_cut_rematerialization_partition])
def test_backward_uses_the_dropout_mask_of_forward(partition: Callable | None):
    layer = transparent(dropout=0.25)
    f = torch.compile(layer, backend=compiled_by(partition), fullgraph=True) if partition else layer
    first = assert_backward_uses_the_mask_of_forward(layer, f)
    assert not torch.equal(assert_backward_uses_the_mask_of_forward(layer, f), first)


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler")
@pytest.mark.skipif(not Path(sysconfig.get_path("include"), "Python.h").is_file(), reason="no Python.h")
def test_inductor_equals_eager_and_saves_nothing_dequantized():
    class Both(nn.Module):  # in one module and no larger, because compiling it takes seconds
        def __init__(self):
            super().__init__()
            self.net, self.mask = lora_layer(*WIDTHS[:2], bias=True), transparent(dropout=0.25)

        def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x), self.mask(z)

    both = Both()
    compiled = torch.compile(both, fullgraph=True)
    some_x, some_z = randn(T, WIDTHS[0]).requires_grad_(), randn(50, 6).requires_grad_()
    net, mask = (lambda x: compiled(x, some_z)[0]), (lambda z: compiled(some_x, z)[1])
    assert_near([run(both.net, f, T, WIDTHS[0]) for f in (both.net, net)])
    assert_backward_uses_the_mask_of_forward(both.mask, mask)
    _, kept = saved_tensors(net, some_x)
    assert 0 < sum(t.numel() for t in kept if t.is_floating_point()) < SMALLEST


# -- checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_gives_the_same_gradients(dropout: float):
    model = stack(dropout=dropout, bias=True)
    eager = run(model, model, T, WIDTHS[0])
    recomputed = run(model, lambda x: checkpoint(model, x, use_reentrant=False), T, WIDTHS[0])
    assert len(eager) == 6
    assert all(torch.equal(a, b) for a, b in zip(eager, recomputed, strict=True))


# -- a whole model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target_modules",
    [
        ["q_proj"],
        ["q_proj", "up_proj"],
        ["attn.q_proj"],
        ["layers.1.mlp.up_proj"],
        r".*\.q_proj",
        r"q_proj",
        r"layers\.\d\.mlp\.(up|down)_proj",
        r".*(q|o)_proj",
    ],
)
def test_rules_for_targets_are_those_of_peft(target_modules: str | list[str]):
    theirs = peft.get_peft_model(TinyModel(), peft.LoraConfig(target_modules=target_modules))
    assert add_lora(TinyModel(), target_modules=target_modules) == theirs.base_model.targeted_module_names


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["q_proj"], exclude_modules=["layers.0.attn.q_proj"]),
        dict(target_modules=r".*proj", exclude_modules=r".*attn.*"),
        dict(target_modules=["q_proj", "up_proj"], layers_to_transform=1),
        dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 1], layers_pattern="layers"),
        dict(target_modules=["attn.q_proj"], layers_to_transform=[1], layers_pattern=["h", "layers"]),
        dict(target_modules=["layers.0.attn.q_proj", "o_proj"], layers_to_transform=[1]),
        dict(target_modules=["q_proj", "o_proj"], layers_to_transform=[]),
        dict(target_modules=["q_proj"], rank_pattern={"q_proj": 3, "layers.0.attn.q_proj": 5}),
        dict(target_modules=["q_proj"], rank_pattern={"layers.0.attn.q_proj": 5, "q_proj": 3}),
        dict(target_modules=["q_proj"], rank_pattern={r"layers\.\d": 3, "proj": 4, r".*\.1\..*": 6}),
        dict(target_modules=["q_proj", "mq_proj"], alpha_pattern={"q_proj": 3}, use_rslora=True),
    ],
    ids=str,
)
def test_layers_ranks_and_scalings_are_those_of_peft(options: dict):
    theirs = peft.get_peft_model(TinyModel(), peft.LoraConfig(r=2, lora_alpha=5, **options)).base_model.model
    expected = {
        name: (module.r["default"], module.scaling["default"])
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    config = LoRAConfig(r=2, alpha=5, **options)
    targets = find_targets(TinyModel(), config)
    found = {name: (config.size(name)[0], config.scaling(name)) for name in targets}
    assert found == expected


def test_layers_to_transform_narrow_all_linear_too():
    config = LoRAConfig(layers_to_transform=[1], layers_pattern="layers")
    names = find_targets(TinyModel(), config)
    assert names == [f"layers.1.{name}" for name in EVERY_LINEAR]


EVERY_LINEAR = [f"attn.{name}_proj" for name in ("q", "mq", "o")] + ["mlp.up_proj", "mlp.down_proj"]


class Mixture(nn.Module):
    """A layer of experts beside an ordinary one of the same name."""

    def __init__(self) -> None:
        super().__init__()
        expert = nn.ModuleDict(dict(w1=nn.Linear(4, 4), up_proj=nn.Linear(4, 4)))
        self.sparse = nn.ModuleDict(dict(experts=nn.ModuleList([expert])))
        self.dense = nn.ModuleDict(dict(up_proj=nn.Linear(4, 4)))


def test_experts_take_no_adapter():
    model = Mixture()
    for targets in ("all-linear", ["up_proj"], ".*up_proj"):
        assert find_targets(model, LoRAConfig(target_modules=targets)) == ["dense.up_proj"]
    for targets in (["up_proj", "w1"], ".*w1"):
        with pytest.raises(ValueError, match="w1' matches only experts, which take no adapter"):
            add_lora(model, target_modules=targets)


def test_all_linear_means_what_peft_means_by_it():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_attention_heads=2)
    with torch.device("meta"):
        ours, theirs = (LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)) for _ in range(2))
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    names = peft.get_peft_model(theirs, config).base_model.targeted_module_names
    assert add_lora(ours) == names
    assert len(names) == 2 * 7


def test_add_lora_freezes_all_but_the_adapters():
    model = TinyModel()
    names = add_lora(model, r=2, target_modules=["q_proj"])
    assert names == ["layers.0.attn.q_proj", "layers.1.attn.q_proj", "q_proj"]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{letter}" for name in names for letter in "AB"}
    assert list(lora_layers(model)) == names


def test_add_lora_keeps_the_names_of_the_base():
    model = TinyModel()
    before = set(model.state_dict())
    add_lora(model)
    assert {name for name in model.state_dict() if "lora_" not in name} == before


def test_add_lora_passes_its_options_on():
    model = TinyModel()
    add_lora(model, r=3, alpha=12, dropout=0.25, target_modules=["q_proj"])
    layer = model.q_proj
    assert (layer.r, layer.alpha, layer.scaling, layer.dropout.p) == (3, 12, 4.0, 0.25)


def test_same_seed_same_adapters():
    models = [TinyModel() for _ in range(2)]
    for model in models:
        torch.manual_seed(7)
        add_lora(model)
    for name, layer in lora_layers(models[0]).items():
        assert torch.equal(layer.lora_A, lora_layers(models[1])[name].lora_A)
    assert not torch.equal(models[0].layers[0].attn.q_proj.lora_A, models[0].q_proj.lora_A)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "rank r must be at least 1, not 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), not -0.1"),
        (
            {"target_modules": ["q_proj", "k_proj"]},
            "target module 'k_proj' matches no linear layer; the model has",
        ),
        ({"target_modules": ["proj"]}, "'proj' matches no linear layer"),
        ({"target_modules": "layers"}, "has down_proj, lm_head, mq_proj, o_proj, q_proj, up_proj"),
        ({"target_modules": ["embed_tokens"]}, "'embed_tokens' matches no linear layer"),
        ({"target_modules": []}, "target_modules is empty, and so matches no linear layer"),
        ({"target_modules": "("}, r"target_modules '\(' is not a regular expression: missing \)"),
        ({"rank_pattern": {"(": 2}}, r"pattern '\(' is not a regular expression: missing \)"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj must be at least 1, not 0"),
        ({"rank_pattern": {"k_proj": 4}}, "pattern 'k_proj' matches no adapted layer"),
        ({"alpha_pattern": {"lm_head": 4}}, "pattern 'lm_head' matches no adapted layer"),
        ({"layers_pattern": "layers"}, "layers_pattern says where to find the numbers"),
        ({"target_modules": ".*q_proj", "layers_to_transform": 1}, "layers_to_transform and a regular expr"),
        ({"layers_to_transform": [7]}, "leave no linear layer to adapt"),
        ({"exclude_modules": "("}, r"exclude_modules '\(' is not a regular expression"),
        ({"init": "magic"}, "init must be one of default, gaussian, .*, not 'magic'"),
        ({"init": "orthogonal", "r": 3}, "orthogonal needs even ranks"),
        ({"init": "pissa", "r": 5}, "init pissa: layers.0.attn.q_proj is 4 x 4, too small for rank 5"),
        ({"init": "loftq", "r": 2}, "the model is not in 4 bits"),
        ({"modules_to_save": ["score"]}, "no module's path ends in 'score'"),
        ({"modules_to_save": ["o_proj"]}, "trains embeddings, the head and norms, not layers.0.attn.o_proj"),
        ({"modules_to_save": ["mlp"]}, "trains embeddings, the head and norms, not layers.0.mlp"),
        ({"trainable_token_indices": [8]}, "8 is none of 8 tokens"),
        ({"trainable_token_indices": [1, 1]}, "embed_tokens: none, or one twice"),
        ({"trainable_token_indices": {"norm": [1]}}, "'norm' is no embedding and no head"),
        (
            {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
            "embed_tokens is in modules_to_save and so trained whole",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_the_model_left_alone(options: dict, message: str):
    model = TinyModel()
    with pytest.raises(ValueError, match=message):
        add_lora(model, **options)
    assert not lora_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_all_linear_needs_more_than_a_head():
    model = nn.ModuleDict(dict(lm_head=nn.Linear(4, 8)))
    with pytest.raises(ValueError, match="'all-linear' matches no linear layer"):
        find_targets(model, LoRAConfig())


def test_adapters_are_not_added_twice():
    model = TinyModel()
    add_lora(model, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model, target_modules=["o_proj"])


# -- switched off --------------------------------------------------------------------------------------------


def test_disabled_adapters_leave_the_base():
    model, x = TinyModel(), torch.tensor([1, 5, 2])
    base = model(x)
    add_lora(model)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    tuned = model(x)
    assert not torch.equal(tuned, base)
    with adapters_disabled(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), tuned)


def test_adapters_come_back_after_an_exception():
    model = TinyModel()
    add_lora(model)
    with pytest.raises(KeyError), adapters_disabled(model):
        assert not any(layer.enabled for layer in lora_layers(model).values())
        raise KeyError
    assert all(layer.enabled for layer in lora_layers(model).values())


def test_an_adapter_that_was_off_before_stays_off():
    model = TinyModel()
    add_lora(model)
    model.q_proj.enabled = False
    with adapters_disabled(model), adapters_disabled(model):
        pass
    assert [name for name, layer in lora_layers(model).items() if not layer.enabled] == ["q_proj"]


# -- several, whole modules, tokens --------------------------------------------------------------------------


def shake(model: nn.Module, seed: int = 5) -> None:
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += 0.1 * randn(*parameter.shape, seed=seed + i)


IDS = torch.tensor([1, 5, 2, 2])


def test_adapters_are_switched_and_none_changes_another():
    model = TinyModel()
    base, outputs = model(IDS), {}
    for seed, (name, options) in enumerate({"a": {}, "b": {"modules_to_save": ["norm", "lm_head"]}}.items()):
        add_lora(model, r=2, name=name, **options)
        shake(model, seed=100 * seed)
        outputs[name] = model(IDS)
    for name in "abab":
        set_adapter(model, name)
        assert torch.equal(model(IDS), outputs[name])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"lm_head.weight", "layers.1.mlp.norm.bias"} < trained and "embed_tokens.weight" not in trained
    set_adapter(model, None)
    assert torch.equal(model(IDS), base)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_comes_back_in_the_models_mode():
    model = TinyModel()
    add_lora(model, r=2, dropout=0.5, name="a")
    set_adapter(model, None)
    model.eval()
    set_adapter(model, "a")
    assert not model.q_proj.training and not model.q_proj.dropout.training


def test_a_copied_model_switches_by_itself():
    model = TinyModel()
    add_lora(model, r=2)
    shake(model)
    twin = copy.deepcopy(model)
    tuned = model(IDS)
    set_adapter(twin, None)
    assert not torch.equal(twin(IDS), tuned) and torch.equal(model(IDS), tuned)


def test_any_ending_counts_for_modules_to_save():
    config = LoRAConfig(modules_to_save=["norm", "tokens"])
    assert find_modules_to_save(TinyModel(), config) == ["embed_tokens"] + [
        f"layers.{i}.mlp.norm" for i in "01"
    ]


def test_whole_modules_are_trained_in_float32_whatever_they_were():
    model = TinyModel().bfloat16()
    model.embed_tokens.weight = nn.Parameter(
        NF4Tensor.from_float(model.embed_tokens.weight.detach()), requires_grad=False
    )
    original = model.embed_tokens
    add_lora(model, r=2, modules_to_save=["embed_tokens"])
    assert model.embed_tokens.weight.dtype == torch.float32 and model.embed_tokens.weight.requires_grad
    assert torch.equal(model.embed_tokens.weight, original.weight.dequantize(torch.float32))


@pytest.mark.parametrize("quantized", [False, True])
def test_only_the_rows_of_some_tokens_are_trained(quantized: bool):
    embedding = nn.Embedding(8, 4)
    if quantized:
        embedding.weight = nn.Parameter(NF4Tensor.from_float(embedding.weight.detach()), requires_grad=False)
    before = embedding(torch.arange(8)).detach()
    module = TrainedTokens(embedding, [5, 2])
    assert torch.equal(module(torch.arange(8)), before)
    y = module(torch.tensor([[5, 1], [5, 2]]))
    y.sum().backward()
    assert [p.shape for p in module.parameters() if p.grad is not None] == [(2, 4)]
    assert torch.equal(module.rows.weight.grad, torch.tensor([[2.0], [1.0]]).expand(2, 4))
    shake(module)
    changed = (module(torch.arange(8)) != before).any(1)
    assert changed.nonzero().flatten().tolist() == [2, 5]
    assert torch.equal(F.embedding(torch.arange(8), module.merged()), module(torch.arange(8)))


def test_a_tied_head_follows_its_embeddings_tokens():
    model = TinyModel()
    model.lm_head = nn.Linear(4, 8, bias=False)
    model.lm_head.weight = model.embed_tokens.weight
    add_lora(model, r=2, trainable_token_indices=[3])
    assert model.lm_head.rows.weight is model.embed_tokens.rows.weight
    shake(model)
    hidden = randn(2, 4)
    expected = model.lm_head(hidden)
    torch.testing.assert_close(expected, F.linear(hidden, model.embed_tokens.merged()))
    merge_lora(model)
    assert model.lm_head.weight is model.embed_tokens.weight
    torch.testing.assert_close(model.lm_head(hidden), expected)


# -- the optimizer, and merging ------------------------------------------------------------------------------


def test_learning_rates_are_those_of_peft_by_loraplus():
    from peft.optimizers import create_loraplus_optimizer

    options = dict(
        use_dora=True, modules_to_save=["norm", "embed_tokens"], target_modules=["q_proj", "up_proj"]
    )
    theirs = peft.get_peft_model(TinyModel(), peft.LoraConfig(r=2, **options))
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    rules = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    expected = {
        name.removeprefix("base_model.model.")
        .replace(".modules_to_save.default", "")
        .replace(".default.weight", "")
        .removesuffix(".default"): rules[id(p)]
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    model = TinyModel()
    add_lora(model, r=2, **options)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1e-3, 0.1, loraplus_lr_ratio=16)
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found == expected
    assert set(found.values()) == {(1e-3, 0.1), (1.6e-2, 0.1), (1.6e-2, 0.0)}


def test_without_a_ratio_all_parameters_are_one_group():
    model = TinyModel()
    add_lora(model, r=2, modules_to_save=["norm"])
    (group,) = parameter_groups(model, 1e-3, 0.1)
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.1)
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True, "use_rslora": True},
        {"modules_to_save": ["norm", "lm_head"]},
        {"trainable_token_indices": [5, 1]},
        {"init": "pissa"},
    ],
    ids=str,
)
def test_a_merged_model_computes_what_base_and_adapter_did(options: dict):
    model = TinyModel()
    names = [name for name, _ in model.named_parameters()]
    add_lora(model, r=2, **options)
    shake(model)
    expected = model(IDS)
    assert set(lora_layers(model)) <= set(merge_lora(model))
    assert not lora_layers(model) and [name for name, _ in model.named_parameters()] == names
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no active adapter to merge"):
        merge_lora(model)


def test_merging_leaves_4_bits_and_says_so():
    model = nn.ModuleDict(dict(q_proj=nf4_layer(64, 6, dtype=torch.bfloat16)))
    add_lora(model, r=2)
    shake(model)
    x = randn(3, 64)
    expected = model.q_proj(x)
    with pytest.raises(ValueError, match="q_proj is in 4 bits: give a dtype"):
        merge_lora(model)
    assert torch.equal(model.q_proj(x), expected)
    merge_lora(model, dtype=torch.float32)
    assert type(model.q_proj) is nn.Linear and model.q_proj.weight.dtype == torch.float32
    torch.testing.assert_close(model.q_proj(x), expected, rtol=1e-4, atol=1e-5)


def test_any_mapping_of_full_precision_weights_is_a_base():
    linear = nf4_layer(16, 12)
    full = {"q_proj.weight": randn(12, 16) / 4}
    model = nn.ModuleDict(dict(q_proj=linear))
    add_lora(model, r=4, alpha=2, init="pissa", base=full)
    layer = model.q_proj
    A, B = leading_part(full["q_proj.weight"], "pissa", 4, 0.5)
    assert torch.equal(layer.lora_A, A) and torch.equal(layer.lora_B, B)
    residual = NF4Tensor.from_float(full["q_proj.weight"] - 0.5 * B @ A)
    assert (
        layer.weight.packed != residual.packed
    ).float().mean() < 0.05  # sums of r numbers, otherwise rounded
    packed = {"q_proj.weight": NF4Tensor.from_float(full["q_proj.weight"])}
    model = nn.ModuleDict(dict(q_proj=nf4_layer(16, 12)))
    with pytest.raises(ValueError, match="base has q_proj.weight in 4 bits"):
        add_lora(model, r=4, init="olora", base=packed)
