"""What only an accelerator can show; MINQLORA_GPU_TESTS_ON=cpu runs all that a CPU can have of it there."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_finetune import adapter_bytes
from test_finetune import run as run
from torch import Tensor
from torch._dynamo.utils import counters

from minqlora import NF4Tensor, add_lora, load_model
from minqlora.attention import Documents, KVCache, attend_to_documents
from minqlora.generate import RecordedStep, generate_batch
from minqlora.matmul import LOOK_UPS, compiled_decode, fastest_look_up, levels_for
from minqlora.model import Block, compile_blocks

DOCUMENTS = [[20, 13], [30, 5], [7, 9, 11], [31], [21, 13]]  # of packed rows
WHERE = os.environ.get("MINQLORA_GPU_TESTS_ON", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(WHERE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]
on_cuda = pytest.mark.skipif(WHERE != "cuda", reason="a CPU has no such memory, or no such kernels")


@pytest.fixture
def device() -> torch.device:
    return torch.device(WHERE, 0) if WHERE != "cpu" else torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model_on(device: torch.device, folder: Path, **options: Any) -> Any:
    """The tiny model with adapters that do something, ready to train."""
    torch.manual_seed(0)
    model = load_model(folder, dtype=torch.float32, device=device)
    add_lora(model, r=2, **options)
    for i, parameter in enumerate(trained(model)):
        # Small: of scores in the hundreds, gradients are what rounding leaves of zero.
        parameter.data = 0.1 * randn(*parameter.shape, seed=i).to(device)
    return model.train()


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(model: Any, lengths: list[int], seed: int = 0) -> list[Tensor]:
    """The gradients of a packed batch."""
    torch.manual_seed(seed)  # for dropout
    ids = torch.randint(97, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    model.model(ids.to(model.device), lengths).square().sum().backward()
    found = [parameter.grad for parameter in trained(model)]
    model.zero_grad()
    return found


# -- bits ----------------------------------------------------------------------------------------------------


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_decoded_weights_are_those_of_bitsandbytes(device: torch.device, dtype: torch.dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = randn(192, 256).to(device, dtype)
    ours = NF4Tensor.from_float(w, double_quant=False)
    packed, state = functional.quantize_4bit(w, quant_type="nf4", blocksize=64)
    assert torch.equal(ours.packed, packed.view(-1)) and torch.equal(ours.absmax, state.absmax.view(-1))
    assert torch.equal(ours.dequantize(), functional.dequantize_4bit(packed, state))


@on_cuda
def test_scales_of_scales_decode_to_the_bits_of_bitsandbytes(device: torch.device):
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        randn(192, 256).to(device), quant_type="nf4", blocksize=64, compress_statistics=True
    )
    parts = {"packed": packed.view(-1), "codebook": state.code, "absmax_codes": state.absmax.view(-1)}
    parts |= {"nested_absmax": state.state2.absmax, "nested_codebook": state.state2.code}
    parts |= {"offset": state.offset}
    format = NF4Tensor.from_float(randn(192, 256)).format
    ours = NF4Tensor(parts, torch.float32, format)
    assert torch.equal(ours.dequantize(), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("look_up", LOOK_UPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_look_up_decodes_to_the_bits_of_a_cpu(device, dtype: torch.dtype, look_up: str):
    here = NF4Tensor.from_float(randn(128, 512))
    there = here.to(device)
    decode = compiled_decode(len(there.packed), 64, 256, 0, dtype, look_up)
    found = decode(there.packed, there.scales, levels_for(look_up, there.codebook)).view(dtype)
    assert torch.equal(found.cpu(), here.dequantize(dtype).view(-1))


def test_one_token_is_multiplied_as_many_are(device: torch.device):
    w, x = NF4Tensor.from_float(randn(128, 512)).to(device), randn(1, 512).to(device)
    assert fastest_look_up(device) in LOOK_UPS
    expected = x.double() @ w.dequantize(torch.float32).double().T
    # 512 terms of some 1, each rounded to 24 bits.
    torch.testing.assert_close(torch.nn.functional.linear(x, w).double(), expected, rtol=0, atol=512 * 2**-20)


# -- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_is_the_same_when_a_block_is_computed_again(device, compiled: bool, tiny_model: Path):
    model = model_on(device, tiny_model, dropout=0.5)
    if compiled:
        compile_blocks(model)
    expected = step(model, [17, 23])
    model.model.gradient_checkpointing = True
    for ours, theirs in zip(step(model, [17, 23]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_training_saves_no_decoded_weight(device: torch.device, tiny_model: Path):
    model, kept = model_on(device, tiny_model), []
    shapes = {tuple(weight.shape) for weight in model.model.layers[0].parameters() if weight.dim() == 2}
    shapes -= {tuple(parameter.shape) for parameter in trained(model)}
    compile_blocks(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        step(model, [17, 24])
    floats = [t for t in kept if t.is_floating_point() and not isinstance(t, NF4Tensor)]
    assert floats and not any(tuple(t.shape) in shapes | {s[::-1] for s in shapes} for t in floats)


def test_compiled_blocks_have_eager_gradients_and_compile_nothing_anew(device, tiny_model: Path):
    eager, model = model_on(device, tiny_model), model_on(device, tiny_model)
    compile_blocks(model)
    graphs = []
    for lengths in DOCUMENTS:
        for ours, theirs in zip(step(model, lengths), step(eager, lengths), strict=True):
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1] and not counters["graph_break"]


@on_cuda
@pytest.mark.parametrize("window", [None, 5])
def test_one_kernel_attends_to_all_documents_as_a_kernel_for_each(device: torch.device, window: int | None):
    # Whether or not it is faster; a release that has none, or takes other arguments, fails here.
    q, k, v = (randn(2, heads, 23, 64, seed=heads).to(device, torch.bfloat16) for heads in (6, 2, 3))
    v, lengths = v[:, :2], [7, 1, 15]
    ends = torch.tensor([0, 7, 8, 23, 30, 31, 46], dtype=torch.int32, device=device)
    inputs = [tensor.contiguous().requires_grad_() for tensor in (q, k, v)]
    found = []
    for documents in (Documents(lengths, ends), Documents(lengths)):
        y = attend_to_documents(*inputs, documents, window=window)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    for at_once, each in zip(*found, strict=True):
        assert (at_once - each).norm() <= 0.02 * each.norm()


@on_cuda
def test_memory_is_back_to_where_it_was_after_training(device: torch.device, tiny_model: Path):
    def train() -> int:
        model = model_on(device, tiny_model)
        model.model.gradient_checkpointing = True
        for lengths in DOCUMENTS:
            step(model, lengths)
        del model
        gc.collect()
        return torch.cuda.memory_allocated(device)

    train()  # what is kept for good: levels, workspaces of cuBLAS
    assert train() == train()


def test_a_resumed_run_has_the_bits_of_one_left_alone(request, device, run: Callable[..., Path]):
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    flags = dict(device=device, save_steps=2, deterministic="true", lora_dropout=0.5, compile="off")
    alone = run("alone", max_steps=4, **flags)
    run("again", max_steps=2, **flags)
    again = run("again", max_steps=4, resume_from_checkpoint="latest", **flags)
    assert adapter_bytes(again) == adapter_bytes(alone)


@on_cuda
def test_steps_that_are_recorded_write_what_others_write(device, tiny_model: Path, monkeypatch):
    chapter = sys.modules[RecordedStep.__module__]  # whose name in the package is the function's
    model = load_model(tiny_model, dtype=torch.float32, device=device)
    prompts = [[1, 60, 61, 62], [1, 70]]
    recorded = generate_batch(model, prompts, max_new_tokens=chapter.WORTH_RECORDING)
    with monkeypatch.context() as patched:
        patched.setattr(chapter, "can_record", lambda *_: False)
        assert generate_batch(model, prompts, max_new_tokens=chapter.WORTH_RECORDING) == recorded
    step = RecordedStep(model, KVCache(model.arch, 1, 8, torch.float32, device))
    assert step.graph is not None
    block = model.model.layers[0]
    assert block.compiled_step and block.compiled_step[0] is not Block.enter  # nothing was left eager
