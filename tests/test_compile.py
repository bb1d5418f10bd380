"""Under torch.compile: one graph whatever the batch, and the weight stays packed until each product."""

import logging
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint

from minqlora import add_lora, generate, load_model
from minqlora.attention import Documents, KVCache
from minqlora.generate import RecordedStep
from minqlora.lora import LoRALinear, lora_layers
from minqlora.model import (
    HostInputs,
    compile_blocks,
    compile_steps,
    leave_steps_eager,
    missing_compiler,
    recomputed,
)
from minqlora.nf4 import NF4Tensor

N, K = 24, 32
SMALLEST = 8 * K  # numbers of the smallest part that is multiplied by here
FORMAT = dict(block_size=8, nested_block_size=6)  # a row is four blocks

inductor = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++"))
    or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="no C++ compiler, or no Python.h",
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nf4_weight(n: int = N, k: int = K, seed: int = 0, **options) -> nn.Parameter:
    weight = NF4Tensor.from_float(randn(n, k, seed=seed), **(FORMAT | options))
    return nn.Parameter(weight, requires_grad=False)


def lora_layer(k: int, n: int, seed: int = 0) -> LoRALinear:
    linear = nn.Linear(k, n, bias=False)
    linear.weight = nf4_weight(n, k, seed)
    layer = LoRALinear(linear, r=2, alpha=4)
    with torch.no_grad():
        layer.lora_A.copy_(randn(2, k, seed=seed + 1))
        layer.lora_B.copy_(randn(n, 2, seed=seed + 2))
    return layer


class Backend:
    """All of torch.compile but the kernels: counts the graphs, and what each backward takes."""

    def __init__(self, partition: Callable = default_partition):
        self.graphs = 0
        self.saved: list[Tensor] = []
        self.compile = aot_autograd(
            fw_compiler=self.forward, bw_compiler=self.backward, partition_fn=partition
        )

    def forward(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        self.graphs += 1
        return boxed(graph)

    def backward(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        self.saved += [t for t in inputs if isinstance(t, Tensor)]
        return boxed(graph)

    @property
    def saved_floats(self) -> int:
        """How many floating-point numbers the backward passes take, gradients of outputs included."""
        return sum(t.numel() for t in self.saved if t.is_floating_point())


def boxed(graph: torch.fx.GraphModule) -> Callable:
    def run(inputs: list) -> list:
        return graph.forward(*inputs)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


@pytest.fixture(autouse=True)
def _seeded_and_nothing_compiled() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


# -- products ------------------------------------------------------------------------------------------------

# Name: a product of a weight (N, K), and the shape of the other operand.
PRODUCTS: dict[str, tuple[Callable, tuple[int, ...]]] = {
    "F.linear": (lambda w, x: F.linear(x, w), (2, K)),
    "F.linear with bias": (lambda w, x: F.linear(x, w, torch.ones(N)), (2, 1, K)),
    "F.linear of w.t()": (lambda w, x: F.linear(x, w.t()), (2, N)),
    "x @ w.t()": (lambda w, x: x @ w.t(), (2, K)),
    "3-D @ w.T": (lambda w, x: x @ w.T, (2, 1, K)),
    "transposed 3-D @ w.T": (lambda w, x: x.mT @ w.T, (1, K, 2)),
    "x @ w": (lambda w, x: x @ w, (2, N)),
    "w @ x": (lambda w, x: w @ x, (K, 2)),
    "w @ vector": (lambda w, x: w @ x, (K,)),
    "addmm": (lambda w, x: torch.addmm(torch.ones(N), x, w.t(), beta=0.5, alpha=2), (2, K)),
    "rows": (lambda w, x: F.linear(x, w[1:9]), (2, K)),
    "rows of rows": (lambda w, x: x @ w[1:][2:10].t(), (2, K)),
    "narrow": (lambda w, x: F.linear(x, w.narrow(0, 16, 8)), (2, K)),
    "chunk": (lambda w, x: F.linear(x, w.chunk(3)[1]), (2, K)),
    "split": (lambda w, x: F.linear(x, w.split([11, 8, 5])[1]), (2, K)),
    "flat and back": (lambda w, x: F.linear(x, w.view(-1).view(N, K)), (2, K)),
    "permute": (lambda w, x: x @ w.permute(1, 0), (2, K)),
}


def output_and_gradient(f: Callable, w: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    x = randn(*shape, seed=1, dtype=dtype).requires_grad_()
    y = f(w, x)
    return [y.detach(), *torch.autograd.grad(y, x, randn(*y.shape, seed=2, dtype=dtype))]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", PRODUCTS)
def test_compiled_products_equal_eager_and_save_nothing_decoded(name: str, double_quant: bool):
    f, shape = PRODUCTS[name]
    weight, backend = nf4_weight(double_quant=double_quant), Backend()
    compiled = torch.compile(f, backend=backend.compile, fullgraph=True)
    ours = output_and_gradient(compiled, weight, shape, torch.float32)
    theirs = output_and_gradient(f, weight.dequantize(), shape, torch.float32)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)  # sums of 32 numbers up to 9
    assert backend.graphs == 1
    # Besides the map of 256 levels for scales, all of it is fewer numbers than the rows multiplied by have.
    assert 0 < backend.saved_floats - (256 if double_quant else 0) < SMALLEST


@pytest.mark.parametrize("partition", [default_partition, min_cut_rematerialization_partition])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["F.linear", "x @ w.t()"])
def test_neither_partition_nor_dtype_saves_a_decoded_weight(
    name: str, dtype: torch.dtype, partition: Callable
):
    f, shape = PRODUCTS[name]
    weight, backend = nf4_weight(), Backend(partition)
    compiled = torch.compile(f, backend=backend.compile, fullgraph=True)
    ours = output_and_gradient(compiled, weight, shape, dtype)
    for a, b in zip(ours, output_and_gradient(f, weight, shape, dtype), strict=True):
        assert torch.equal(a, b)
    assert 0 < backend.saved_floats < N * K


def test_a_decoded_weight_would_have_been_seen():
    backend = Backend()
    weight = nf4_weight()
    compiled = torch.compile(lambda w, x: x @ w.dequantize().t(), backend=backend.compile, fullgraph=True)
    output_and_gradient(compiled, weight, (2, K), torch.float32)
    assert backend.saved_floats >= N * K


VIEWED = {
    "part": lambda t: t[1:],
    "transposed": lambda t: t.t(),
    "transposed part": lambda t: t[1:9].t(),
    "flat": lambda t: t.view(-1),
}


@pytest.mark.parametrize("name", VIEWED)
def test_a_view_goes_into_a_graph_as_a_whole_weight_does(name: str):
    weight = nn.Parameter(VIEWED[name](nf4_weight().data), requires_grad=False)
    w, backend = weight.dequantize(), Backend()

    def f(weight: Tensor, x: Tensor) -> Tensor:
        return x @ weight if weight.dim() == 2 else x @ weight.view(N, K)

    compiled = torch.compile(f, backend=backend.compile, fullgraph=True)
    shape = (2, N if weight.dim() == 1 else weight.shape[0])
    ours = output_and_gradient(compiled, weight, shape, torch.float32)
    for a, b in zip(ours, output_and_gradient(f, w, shape, torch.float32), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert backend.graphs == 1


@pytest.mark.parametrize("view", [lambda t: t, lambda t: t.t(), lambda t: t[1:]])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_compiled_decoding_gives_the_same_bits(dtype: torch.dtype | None, view: Callable):
    weight, backend = nf4_weight(), Backend()
    compiled = torch.compile(lambda w: view(w).dequantize(dtype), backend=backend.compile, fullgraph=True)
    assert torch.equal(compiled(weight), view(weight).dequantize(dtype))
    assert backend.graphs == 1


# -- recompilations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "cast"])
@pytest.mark.parametrize("backward", [False, True])
def test_one_compilation_of_an_operator_serves_any_number_of_rows(kind: str, backward: bool):
    weight, ops = nf4_weight(), torch.ops.minqlora
    if kind == "nf4":
        operator = ops.nf4_linear_backward if backward else ops.nf4_linear
        rest = (weight.packed, weight.scales, weight.codebook, N, K, *weight.format.sizes[1:])
    else:
        operator = ops.cast_linear_backward if backward else ops.cast_linear
        rest = (randn(N, K, dtype=torch.float16),)
    backend = Backend()
    compiled = torch.compile(
        lambda x: operator(x, *rest), backend=backend.compile, fullgraph=True, dynamic=True
    )
    for n_rows in (3, 4, 7):
        x = randn(n_rows, N if backward else K)
        assert torch.equal(compiled(x), operator(x, *rest))
    assert backend.graphs == 1


@pytest.mark.parametrize("name", ["F.linear", "x @ w.t()", "x @ w", "addmm", "rows"])
def test_batches_of_any_size_take_two_compilations(name: str):
    # The first for its own size, the second for all others: torch's rule, for dense weights too.
    f, (_, width) = PRODUCTS[name]
    weight, backend = nf4_weight(), Backend()
    compiled = torch.compile(f, backend=backend.compile, fullgraph=True)
    for batch in range(2, 14):  # of which torch would compile no more than eight
        x = randn(batch, width).requires_grad_()
        y = compiled(weight, x)
        y.sum().backward()
        torch.testing.assert_close(y, f(weight, x))
    assert backend.graphs == 2


def test_a_batch_marked_dynamic_takes_one_compilation():
    layer, backend = lora_layer(K, N), Backend()
    compiled = torch.compile(layer, backend=backend.compile, fullgraph=True)
    for batch, length in ((2, 5), (3, 7), (4, 6)):
        x = randn(batch, length, K).requires_grad_()
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(x, dim)
        y = compiled(x)
        y.sum().backward()
        torch.testing.assert_close(y, layer(x))
    assert backend.graphs == 1


def test_layers_of_one_shape_compiled_one_by_one_share_a_graph():
    # As a model's blocks do: after eight compilations of one piece of code torch gives up.
    backend = Backend()
    layers = [lora_layer(K, K, seed=10 * i) for i in range(10)]
    compiled = [torch.compile(layer, backend=backend.compile, fullgraph=True) for layer in layers]
    x = randn(2, K).requires_grad_()
    for layer, fast in zip(layers, compiled, strict=True):
        assert torch.equal(fast(x), layer(x))
    assert backend.graphs == 1


def test_layers_of_several_shapes_and_batches_take_two_compilations():
    shapes = [(K, N), (N, 40), (40, 8), (8, 16), (16, K)]
    net = nn.Sequential(*(lora_layer(k, n, seed=k) for k, n in shapes))
    backend = Backend()
    compiled = torch.compile(net, backend=backend.compile, fullgraph=True)
    for batch in (4, 4, 6, 3, 9):
        x = randn(batch, K).requires_grad_()
        compiled(x).sum().backward()
    assert backend.graphs == 2


def train(folder: Path, lengths: tuple[int, ...], backend: Backend | None) -> list[float]:
    """The losses of a step of training for each length, with adapters and dropout."""
    torch.manual_seed(0)
    model = load_model(folder, dtype=torch.float32)
    add_lora(model, r=2, dropout=0.5)
    model.train()
    f = torch.compile(model, backend=backend.compile, fullgraph=True) if backend else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    vocabulary = model.lm_head.weight.shape[0]
    losses = []
    for i, length in enumerate(lengths):
        torch.manual_seed(i)  # for dropout
        ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(i))
        logits = f(ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_training_loop_is_compiled_once_and_equals_eager(tiny_model: Path):
    lengths, backend = (16, 16, 16, 16), Backend()
    losses = train(tiny_model, lengths, backend)
    torch.testing.assert_close(losses, train(tiny_model, lengths, None), rtol=1e-4, atol=0)
    assert backend.graphs == 1
    assert len(set(losses)) == 4


def test_a_training_loop_over_lengths_is_not_compiled_after_its_second_step(make_llama: Callable[..., Path]):
    folder = make_llama(num_hidden_layers=1)
    lengths, backend = (16, 17, 12, 23), Backend()
    losses = train(folder, lengths, backend)
    torch.testing.assert_close(losses, train(folder, lengths, None), rtol=1e-4, atol=0)
    assert backend.graphs == 2


# -- checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["F.linear", "x @ w.t()", "w @ x", "addmm", "rows", "F.linear of w.t()"])
def test_checkpointing_gives_the_same_gradients(name: str, compiled: bool):
    f, shape = PRODUCTS[name]
    weight, backend = nf4_weight(), Backend()

    def recomputed(w: Tensor, x: Tensor) -> Tensor:
        return checkpoint(lambda x: f(w, x.sin()).sin(), x, use_reentrant=False)

    g = torch.compile(recomputed, backend=backend.compile, fullgraph=True) if compiled else recomputed
    ours = output_and_gradient(g, weight, shape, torch.float32)
    theirs = output_and_gradient(lambda w, x: f(w, x.sin()).sin(), weight, shape, torch.float32)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert backend.saved_floats < N * K


# -- blocks --------------------------------------------------------------------------------------------------

# What stands in a packed row changes from batch to batch, and so does its length.
DOCUMENTS = [[20, 13], [30, 5], [7, 9, 11], [31], [21, 13]]


def gradients(folder: Path, compiled: bool, checkpointing: bool, **options) -> tuple[list[Tensor], Backend]:
    """What the model makes of a few packed batches, and the gradients of its adapters."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    backend, model, found = Backend(), load_model(folder, dtype=torch.float32), []
    add_lora(model, r=2, dropout=0.5, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    for i, parameter in enumerate(trained):
        parameter.data = randn(*parameter.shape, seed=i)
    model.train().model.gradient_checkpointing = checkpointing
    if compiled:
        compile_blocks(model, backend.compile)
    for i, lengths in enumerate(DOCUMENTS):
        torch.manual_seed(i)  # for dropout
        hidden = model.model(torch.randint(97, (1, sum(lengths))), lengths)
        hidden.square().sum().backward()
        found += [hidden.detach(), *(p.grad for p in trained)]
        model.zero_grad()
        if i == 1:
            backend.graphs_of_two = backend.graphs  # type: ignore[attr-defined]
    return found, backend


@pytest.mark.parametrize(("checkpointing", "use_dora"), [(False, True), (True, False)])
def test_compiled_blocks_train_to_the_bits_of_eager_ones_with_dropout(
    checkpointing: bool, use_dora: bool, tiny_model: Path
):
    ours, _ = gradients(tiny_model, True, checkpointing, use_dora=use_dora)
    theirs, _ = gradients(tiny_model, False, checkpointing, use_dora=use_dora)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(gradient.any() for gradient in ours)


def test_blocks_are_not_compiled_for_other_documents(make_llama: Callable[..., Path]):
    # Two parts, each for a first block, whose input needs no gradient, and for all others.
    _, backend = gradients(make_llama(num_hidden_layers=4), True, True)
    assert backend.graphs_of_two == backend.graphs == 4  # type: ignore[attr-defined]


def test_compiled_blocks_save_no_decoded_weight(tiny_model: Path):
    weights = load_model(tiny_model).model.layers[0].parameters()
    shapes = {tuple(weight.shape) for weight in weights if weight.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    _, backend = gradients(tiny_model, True, False)
    floats = [t for t in backend.saved if t.is_floating_point()]
    assert len(floats) > 20 and not any(tuple(map(int, t.shape)) in shapes for t in floats)


def test_compiled_blocks_work_with_inputs_in_host_memory(tiny_model: Path):
    found, host = [], HostInputs(torch.device("cpu"))
    for compiled in (False, True):
        torch.manual_seed(0)
        model = load_model(tiny_model, dtype=torch.float32)
        add_lora(model, r=2)
        model.train()
        if compiled:
            compile_blocks(model, Backend().compile)
        x = model.model.embed(torch.arange(23)[None])
        rotary = model.model.rotary_tables([11, 12], None, like=x)
        for block in model.model.layers:
            x = recomputed(block, x, rotary, Documents([11, 12]), host)
        x.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        host.kept.clear()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_evaluation_and_generation_compile_nothing(tiny_model: Path):
    backend, model = Backend(), load_model(tiny_model, dtype=torch.float32)
    compile_blocks(model, backend.compile)
    expected = load_model(tiny_model, dtype=torch.float32)(torch.arange(9)[None])
    assert torch.equal(model.eval()(torch.arange(9)[None]), expected)
    assert len(list(generate(model, [1, 2, 3], max_new_tokens=3))) == 3
    assert backend.graphs == 0


def steps_of(folder: Path, backend: str | Callable | None, dtype: torch.dtype) -> Tensor:
    """The logits of five steps of one token, (5, vocab), of a model with an adapter."""
    torch.manual_seed(0)
    model = load_model(folder, dtype=dtype)
    add_lora(model, r=2)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    if backend is not None:
        compile_steps(model.eval(), backend)
    cache = KVCache(model.arch, 1, 16, dtype, model.device)
    with torch.inference_mode():
        model.eval()(torch.arange(3)[None], cache=cache)
        step = RecordedStep(model, cache)
        return torch.cat([step(torch.tensor([[token]])).clone() for token in range(5)])


def test_compiled_steps_are_two_graphs_and_equal_eager_ones(tiny_model: Path):
    backend = Backend()
    found = steps_of(tiny_model, backend.compile, torch.float32)
    assert torch.equal(found, steps_of(tiny_model, None, torch.float32))
    assert backend.graphs == 2


def test_steps_left_eager_are_not_compiled_again(tiny_model: Path):
    backend, model = Backend(), load_model(tiny_model, dtype=torch.float32)
    leave_steps_eager(model)
    compile_steps(model, backend.compile)
    with torch.inference_mode():
        RecordedStep(model.eval(), KVCache(model.arch, 1, 4, torch.float32, model.device))(
            torch.tensor([[5]])
        )
    assert backend.graphs == 0


def test_a_device_without_a_compiler_is_told_apart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_compiler(torch.device("cpu")) == "no C++ compiler"
    assert missing_compiler(torch.device("cuda")) == "no Triton"
    assert missing_compiler(torch.device("mps")) is None


# -- with kernels --------------------------------------------------------------------------------------------


@inductor
def test_kernels_of_compiled_steps_are_right(tiny_model: Path):
    found = steps_of(tiny_model, "inductor", torch.float32)
    torch.testing.assert_close(found, steps_of(tiny_model, None, torch.float32), rtol=0, atol=1e-4)


@inductor
@pytest.mark.skipif(torch.__version__ < (2, 13), reason="Inductor's C++ did not round as told to")
def test_kernels_of_compiled_steps_round_as_eager_ones_do(tiny_model: Path):
    found = steps_of(tiny_model, "inductor", torch.bfloat16)
    assert torch.equal(found, steps_of(tiny_model, None, torch.bfloat16))


@inductor
def test_inductor_multiplies_by_views_and_its_cache_has_no_complaints(caplog):
    weight = nf4_weight()

    def f(w: Tensor, x: Tensor) -> Tensor:  # in one function, because compiling takes seconds
        return (x @ w.t()).sin() @ w + F.linear(x, w[1:9]).mean()

    kept: list[Tensor] = []
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        compiled = torch.compile(f, fullgraph=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            ours = output_and_gradient(compiled, weight, (2, K), torch.float32)
    for a, b in zip(ours, output_and_gradient(f, weight, (2, K), torch.float32), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert "_stable_hash_for_caching" not in caplog.text + " ".join(str(w.message) for w in warned)
    assert 0 < sum(t.numel() for t in kept if t.is_floating_point()) < N * K
