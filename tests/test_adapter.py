"""An adapter saved here runs in PEFT, one of PEFT's runs here, and no other is taken for what it is not."""

import json
import math
import os
import re
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import write_llama
from torch import Tensor

from minqlora import NF4Tensor, add_lora, load_adapter, load_model, save_adapter, set_adapter
from minqlora.lora import adapters_disabled, lora_layers
from minqlora.loss import supervised_loss
from minqlora.model import CausalLM

CARD, CONFIG, WEIGHTS = "README.md", "adapter_config.json", "adapter_model.safetensors"
IDS = torch.randint(3, 260, (1, 30), generator=torch.Generator().manual_seed(5))
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_ours(folder: Path) -> CausalLM:
    return load_model(folder, quant_type=None, dtype=torch.float32)


def load_theirs(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapted(folder: Path, seed: int = 0, **options: Any) -> CausalLM:
    """Return a model with adapters that do something: lora_B is not zero."""
    model = load_ours(folder)
    torch.manual_seed(seed)
    add_lora(model, **(dict(r=4, alpha=8) | options))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    return model.eval()


def assert_same_logits(ours: Tensor, theirs: Tensor, base: Tensor, tolerance: float = 1e-3) -> None:
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    assert (base - theirs).abs().max() > 0.05 * theirs.abs().max()  # the adapter does matter


# -- to PEFT -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_adapter_of_the_demo_model_gives_the_same_logits_in_peft(
    demo_model: Path, demo_text: Tensor, demo_fp32: CausalLM, tmp_path: Path
) -> None:
    from peft import PeftModel

    text = demo_text[:, :100]
    ours = adapted(demo_model, r=8, alpha=16)
    save_adapter(ours, tmp_path, base_model="HuggingFaceTB/SmolLM2-135M-Instruct")
    theirs = PeftModel.from_pretrained(load_theirs(demo_model), tmp_path).eval()
    assert_same_logits(ours(text), theirs(text).logits, demo_fp32(text))


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 3, "alpha": 4.5},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["self_attn.o_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"dropout": 0.5},
    ],
    ids=str,
)
def test_any_adapter_gives_the_same_logits_in_peft_and_back_here(
    tiny_model: Path, tmp_path: Path, options: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    from peft import PeftModel

    ours = adapted(tiny_model, **options)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(load_theirs(tiny_model), tmp_path).eval()
    assert_same_logits(ours(IDS), theirs(IDS).logits, load_ours(tiny_model)(IDS), tolerance=1e-5)
    assert not [str(w.message) for w in recwarn if "adapter" in str(w.message).lower()]  # no keys left over
    again = load_ours(tiny_model)
    assert load_adapter(again, tmp_path) == list(lora_layers(ours))
    assert torch.equal(again.eval()(IDS), ours(IDS))


def test_the_files_are_those_of_peft(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    save_adapter(adapted(tiny_model), tmp_path / "ours", base_model="tiny")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=EVERY_LINEAR, task_type="CAUSAL_LM")
    get_peft_model(load_theirs(tiny_model), config).save_pretrained(tmp_path / "theirs")
    ours, theirs = (safetensors.torch.load_file(tmp_path / name / WEIGHTS) for name in ("ours", "theirs"))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in ours.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in theirs.items()
    }
    our_config, their_config = (
        json.loads((tmp_path / name / CONFIG).read_text()) for name in ("ours", "theirs")
    )
    assert our_config.pop("base_model_name_or_path") == "tiny"
    our_config["target_modules"].sort()
    their_config["target_modules"].sort()
    assert our_config.items() <= their_config.items()  # no key of our own, no value that PEFT would not write


def test_the_first_step_of_training_has_pefts_gradients(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    ours = adapted(tiny_model)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(load_theirs(tiny_model), tmp_path, is_trainable=True)
    F.cross_entropy(ours(IDS)[0, :-1], IDS[0, 1:]).backward()
    theirs(IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * len(lora_layers(ours)) == 28
    for name, layer in lora_layers(ours).items():
        for part in ("lora_A", "lora_B"):
            expected = gradients[f"base_model.model.{name}.{part}.default.weight"]
            torch.testing.assert_close(getattr(layer, part).grad, expected, rtol=1e-4, atol=1e-6)


# -- from PEFT ---------------------------------------------------------------------------------------------


def write_with_peft(model_folder: Path, folder: Path, **options: Any) -> Any:
    """Write an adapter that PEFT made and that does something; return PEFT's model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(**(dict(r=4, lora_alpha=8, target_modules=EVERY_LINEAR) | options))
    model = get_peft_model(load_theirs(model_folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"]},
        {"target_modules": r"model\.layers\.\d+\.mlp\.(up|down)_proj"},
        {"lora_dropout": 0.1},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"bias": "none", "task_type": "CAUSAL_LM"},
    ],
    ids=str,
)
def test_an_adapter_made_by_peft_gives_the_same_logits_here(
    tiny_model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    theirs = write_with_peft(tiny_model, tmp_path, **options)
    ours = load_ours(tiny_model)
    load_adapter(ours, tmp_path)
    assert_same_logits(ours.eval()(IDS), theirs(IDS).logits, load_ours(tiny_model)(IDS), tolerance=1e-5)


@torch.no_grad()
def test_a_minimal_config_and_a_bfloat16_file_are_enough(tiny_model: Path, tmp_path: Path) -> None:
    ours = adapted(tiny_model)
    save_adapter(ours, tmp_path)
    minimal = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": EVERY_LINEAR}
    (tmp_path / CONFIG).write_text(json.dumps(minimal))
    held = safetensors.torch.load_file(tmp_path / WEIGHTS)
    safetensors.torch.save_file({k: v.bfloat16() for k, v in held.items()}, tmp_path / WEIGHTS)
    again = load_ours(tiny_model)
    load_adapter(again, tmp_path)
    for name, layer in lora_layers(again).items():
        assert layer.lora_B.dtype == torch.float32
        assert torch.equal(layer.lora_B, ours.get_submodule(name).lora_B.bfloat16().float())


def test_a_loaded_adapter_is_trainable_and_the_rest_is_frozen(tiny_model: Path, tmp_path: Path) -> None:
    save_adapter(adapted(tiny_model), tmp_path)
    model = load_ours(tiny_model)
    load_adapter(model, tmp_path)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 28 and all("lora_" in name for name in trainable)


# -- every variant, both ways ------------------------------------------------------------------------------

# By name what add_lora is given, and what of it PEFT calls otherwise.
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "gaussian": {"init": "gaussian"},
    "dropout": {"dropout": 0.3},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora with bias": {"use_dora": True, "use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 3, "down_proj": 2.5},
        "use_rslora": True,
    },
    "regex": {"target_modules": r".*\.1\..*(q|up)_proj"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "all but some": {"exclude_modules": ["q_proj", "layers.1.mlp.up_proj"]},
    "norms": {"modules_to_save": ["norm"]},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True},
    "tokens": {"trainable_token_indices": [7, 3, 200]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [9]}},
    "same tokens of both": {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [7, 3]}},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [9, 8]}},
}
TIED = {"lora", "head", "embedding", "embedding and head"} | {name for name in VARIANTS if "tokens" in name}


def shaken(model: CausalLM) -> CausalLM:
    """A model whose trained parameters are no longer where training starts."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def step(model: Any, loss_of: Any) -> Tensor:
    """Take one step of AdamW in training mode; return the loss before it."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-3)
    torch.manual_seed(11)  # for dropout
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    model.eval()
    return loss.detach()


def our_loss(model: CausalLM) -> Tensor:
    targets = torch.cat([IDS[:, 1:], torch.full((1, 1), -100)], 1)
    return supervised_loss(model.model(IDS), targets, model.lm_head) / (IDS.numel() - 1)


def their_loss(model: Any) -> Tensor:
    return model(IDS, labels=IDS).loss


def peft_state(model: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


@pytest.mark.parametrize(
    ("variant", "tied"),
    [(variant, False) for variant in VARIANTS] + [(variant, True) for variant in VARIANTS if variant in TIED],
)
def test_one_step_of_training_here_and_in_peft_agree_and_each_reads_the_others(
    make_llama: Any, tmp_path: Path, variant: str, tied: bool, recwarn: pytest.WarningsRecorder
) -> None:
    from peft import PeftModel

    bias = dict(attention_bias=True) if "bias" in variant else {}
    base = make_llama(vocab_size=267, tie_word_embeddings=tied, **bias)
    ours = load_ours(base)
    add_lora(ours, **(dict(r=4, alpha=8) | VARIANTS[variant]))
    shaken(ours)
    save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(load_theirs(base), tmp_path / "ours", is_trainable=True)
    warnings = [str(w.message) for w in recwarn]
    assert not [text for text in warnings if "adapter keys" in text or "unexpected keyword" in text]
    torch.testing.assert_close(ours.eval()(IDS), theirs.eval()(IDS).logits, rtol=1e-4, atol=1e-5)

    torch.testing.assert_close(step(ours, our_loss), step(theirs, their_loss), rtol=1e-5, atol=1e-6)
    save_adapter(ours, tmp_path / "ours")
    ours_now, theirs_now = safetensors.torch.load_file(tmp_path / "ours" / WEIGHTS), peft_state(theirs)
    assert ours_now.keys() == theirs_now.keys()
    for key, tensor in ours_now.items():
        torch.testing.assert_close(tensor, theirs_now[key], rtol=1e-4, atol=1e-5, msg=key)

    theirs.save_pretrained(tmp_path / "theirs")
    again = load_ours(base)
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(again(IDS), theirs(IDS).logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        untouched = load_ours(base)(IDS)
        assert (untouched - again(IDS)).abs().max() > 0.02 * untouched.abs().max()
        with adapters_disabled(again):
            assert torch.equal(again(IDS), untouched)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_8"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_start_that_changes_the_base_is_pefts_and_saved_for_the_original_base(
    make_llama: Any, tmp_path: Path, init: str, use_dora: bool
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = make_llama(vocab_size=267)
    options = dict(
        use_rslora=True, use_dora=use_dora, rank_pattern={"v_proj": 2}, alpha_pattern={"up_proj": 3}
    )
    torch.manual_seed(0)
    ours = load_ours(base)
    add_lora(ours, r=4, alpha=8, init=init, **options)
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        init_lora_weights=init,
        task_type="CAUSAL_LM",
        **options,
    )
    theirs = get_peft_model(load_theirs(base), config)
    untouched = load_ours(base)(IDS)
    torch.testing.assert_close(ours(IDS), untouched, rtol=1e-4, atol=1e-4)  # W - BA + BA
    if init != "pissa_niter_8":  # which is random, and draws after what each library has drawn before
        torch.testing.assert_close(step(ours, our_loss), step(theirs, their_loss), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-3, atol=1e-4)
    shaken(ours)
    save_adapter(ours, tmp_path / "ours")
    plain = PeftModel.from_pretrained(load_theirs(base), tmp_path / "ours").eval()
    torch.testing.assert_close(ours(IDS), plain(IDS).logits, rtol=1e-4, atol=1e-4)
    with adapters_disabled(ours):
        torch.testing.assert_close(ours(IDS), untouched, rtol=1e-4, atol=1e-4)

    if init != "pissa_niter_8":
        theirs.save_pretrained(tmp_path / "theirs")
        again = load_ours(base)
        load_adapter(again, tmp_path / "theirs")
        torch.testing.assert_close(again(IDS), theirs(IDS).logits, rtol=1e-4, atol=1e-4)
        save_adapter(again, tmp_path / "again")
        plain = PeftModel.from_pretrained(load_theirs(base), tmp_path / "again").eval()
        torch.testing.assert_close(again(IDS), plain(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and what bitsandbytes makes of it: a folder in 4 bits."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("packed")
    write_llama(folder / "full", intermediate_size=128, dtype=torch.bfloat16)
    load_packed(folder / "full").save_pretrained(folder / "nf4")
    return folder / "full", folder / "nf4"


def load_packed(folder: Path) -> Any:
    # To be used in training mode: in eval mode bitsandbytes rounds scales to bfloat16 on some CPUs.
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    stored = json.loads((folder / "config.json").read_text()).get("quantization_config")
    how = {} if stored else {"quantization_config": how}
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **how)


SHORT = IDS % 97


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_on_a_4_bit_base_it_is_pefts_on_bitsandbytes(
    packed: tuple[Path, Path], tmp_path: Path, variant: str
) -> None:
    from peft import PeftModel

    ours = load_model(packed[1], dtype=torch.float32)
    untouched = ours(SHORT)
    add_lora(ours, r=4, alpha=8, **VARIANTS[variant])
    torch.testing.assert_close(ours(SHORT), untouched, rtol=1e-4, atol=1e-4)
    shaken(ours)
    save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(load_packed(packed[1]), tmp_path / "ours", is_trainable=True).train()
    torch.testing.assert_close(ours(SHORT), theirs(SHORT).logits, rtol=1e-4, atol=1e-4)
    ours(SHORT).logsumexp(-1).sum().backward()
    theirs(SHORT).logits.logsumexp(-1).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for name, layer in lora_layers(ours).items():
        grad = gradients[f"base_model.model.{name}.lora_A.default.weight"]
        torch.testing.assert_close(layer.lora_A.grad, grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item())
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(packed[1], dtype=torch.float32)
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(again(SHORT), theirs(SHORT).logits, rtol=1e-4, atol=1e-4)


# -- starts from the full-precision weights, on 4 bits -------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_8"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True, "use_rslora": True}], ids=str)
def test_on_4_bits_the_residual_is_quantized_and_made_again_to_the_bit(
    packed: tuple[Path, Path], tmp_path: Path, init: str, options: dict[str, Any]
) -> None:
    from peft import PeftModel

    full = packed[0]
    model = load_model(full, dtype=torch.float32, block_size=32, double_quant=False)
    before = model.model.layers[0].mlp.up_proj.weight
    add_lora(model, r=8, alpha=16, init=init, base=full, **options)
    after = model.model.layers[0].mlp.up_proj.weight
    assert isinstance(after, NF4Tensor) and after.format == before.format and after.absmax is not None
    assert after.dtype == before.dtype and not torch.equal(after.packed, before.packed)
    shaken(model)
    save_adapter(model, tmp_path)
    trained = model(SHORT)

    # PEFT on the original base: what 4 bits have lost is all the difference.
    theirs = PeftModel.from_pretrained(load_theirs(full), tmp_path).eval()
    exact = load_ours(full)
    for name, layer in lora_layers(model).items():
        weight = layer.weight.dequantize(torch.float32)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        residual = exact.get_submodule(name).weight - layer.scaling * layer.initial_B @ layer.initial_A
        rounding = (weight - residual).norm() / residual.norm()
        assert 0 < rounding < 0.12
        layer.weight.copy_(residual)
        layer.squared_norm = residual.square().sum(1)
    model.train().eval()  # which drops what DoRA has kept of the weights before
    torch.testing.assert_close(model(SHORT), theirs(SHORT).logits, rtol=1e-3, atol=1e-3)

    again = load_model(full, dtype=torch.float32, block_size=32, double_quant=False)
    with pytest.raises(ValueError, match=f"{tmp_path}: began as {init}.*give the folder of that as base"):
        load_adapter(again, tmp_path)
    assert not lora_layers(again)
    load_adapter(again, tmp_path, base=full)
    assert torch.equal(again(SHORT), trained)
    restored = again.model.layers[0].mlp.up_proj
    assert torch.equal(restored.weight.packed, after.packed) and torch.equal(
        restored.weight.absmax, after.absmax
    )
    for name, layer in lora_layers(again).items():
        twin = model.get_submodule(name)
        for part in ("lora_A", "lora_B", "initial_A", "initial_B", "lora_magnitude_vector"):
            a, b = getattr(layer, part), getattr(twin, part)
            assert (a is None) == (b is None) == (part == "lora_magnitude_vector" and not options)
            assert a is None or torch.equal(a, b)


@torch.no_grad()
def test_loftq_makes_up_for_rounding_and_stays_on_the_4_bit_base(
    packed: tuple[Path, Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    full = packed[0]
    exact = load_ours(full)
    model = load_model(packed[1], dtype=torch.float32)
    packed_logits = model(SHORT)
    add_lora(model, r=16, alpha=4, init="loftq", base=full)
    layer = model.model.layers[0].mlp.up_proj
    error = exact.model.layers[0].mlp.up_proj.weight - layer.weight.dequantize(torch.float32)
    U, S, Vh = torch.linalg.svd(error)
    torch.testing.assert_close(layer.scaling * layer.lora_B @ layer.lora_A, U[:, :16] * S[:16] @ Vh[:16])
    assert (model(SHORT) - exact(SHORT)).norm() < 0.8 * (packed_logits - exact(SHORT)).norm()
    save_adapter(model, tmp_path)
    assert "belongs on the 4-bit base" in (tmp_path / CARD).read_text()
    theirs = PeftModel.from_pretrained(load_packed(packed[1]), tmp_path).train()
    torch.testing.assert_close(model(SHORT), theirs(SHORT).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_a_base_that_cannot_be_is_refused_and_the_model_left_alone(
    packed: tuple[Path, Path], tmp_path: Path, init: str
) -> None:
    model = load_model(packed[0], dtype=torch.float32)
    before = model(SHORT)
    other = write_llama(tmp_path / "other", seed=1, intermediate_size=128)
    wider = write_llama(tmp_path / "wider", intermediate_size=160)
    for base, message in [
        (None, f"init {init} starts from full-precision weights: give their folder as base"),
        (packed[1], f"{packed[1]}: is in 4 bits; as base give the full-precision model"),
        (other, "base has another model.layers.0.self_attn.q_proj.weight than the model"),
        (wider, rf"{wider}: as base it should have .*gate_proj.weight of shape \(128, 64\), not \(160, 64\)"),
        (tmp_path, "holds neither model.safetensors nor"),
    ]:
        with pytest.raises(ValueError, match=message):
            add_lora(model, r=4, init=init, base=base)
        assert not lora_layers(model) and torch.equal(model(SHORT), before)


def test_loftq_is_for_4_bits(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="the model is not in 4 bits"):
        add_lora(load_ours(tiny_model), r=4, init="loftq")


# -- several -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_several_adapters_are_loaded_and_switched(tiny_model: Path, tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "a": {},
        "b": {"use_dora": True, "target_modules": ["up_proj"], "modules_to_save": ["norm", "lm_head"]},
        "c": {"trainable_token_indices": [3, 4]},
    }
    base = load_ours(tiny_model)(IDS)
    model, alone = load_ours(tiny_model), {}
    weights = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    for seed, (name, options) in enumerate(kinds.items()):
        one = adapted(tiny_model, seed=seed, **options)
        save_adapter(shaken(one), tmp_path / name)
        alone[name] = one(IDS)
        load_adapter(model, tmp_path / name, name=name)
        assert torch.equal(model(IDS), alone[name])
    for name in "abcbacba":
        set_adapter(model, name)
        assert torch.equal(model(IDS), alone[name])
        with adapters_disabled(model):
            assert torch.equal(model(IDS), base)
        assert torch.equal(model(IDS), alone[name])
        save_adapter(model, tmp_path / "again")
        assert contents(tmp_path / "again")[WEIGHTS] == contents(tmp_path / name)[WEIGHTS]
    set_adapter(model, None)
    assert torch.equal(model(IDS), base) and not lora_layers(model)
    assert weights == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="the model has no adapter 'd'; it has 'a', 'b', 'c'"):
        set_adapter(model, "d")


def test_a_name_that_is_taken_and_a_second_one_beside_a_residual_are_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = adapted(tiny_model)
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="one of them named 'default'; give another name"):
        load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="pissa and olora replace the base's weights"):
        add_lora(model, r=4, init="pissa", name="second")
    model = load_ours(tiny_model)
    add_lora(model, r=4, init="pissa")
    with pytest.raises(ValueError, match="pissa and olora replace the base's weights"):
        load_adapter(model, tmp_path, name="second")
    with pytest.raises(ValueError, match="use adapters_disabled"):
        set_adapter(model, None)


# -- the card ----------------------------------------------------------------------------------------------


def test_the_folder_has_a_model_card_and_no_machine_path(tiny_model: Path, tmp_path: Path) -> None:
    model = adapted(tiny_model, use_dora=True)
    save_adapter(model, tmp_path / "run", base_model=str(tiny_model))
    card = (tmp_path / "run" / CARD).read_text()
    assert "Base model: tiny." in card and "DoRA of rank 4, alpha 8, on 14 linear layers" in card
    assert json.loads((tmp_path / "run" / CONFIG).read_text())["base_model_name_or_path"] == "tiny"
    for content in contents(tmp_path / "run").values():
        assert str(tmp_path).encode() not in content and str(tiny_model.parent).encode() not in content
    save_adapter(model, tmp_path / "run", base_model="HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in (tmp_path / "run" / CARD).read_text()


@pytest.mark.parametrize("options", [{}, {"double_quant": False, "block_size": 32}], ids=str)
def test_the_card_says_how_the_base_was_quantized(
    tiny_model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = load_model(tiny_model, dtype=torch.float32, **options)
    add_lora(model, r=4, init="pissa", base=tiny_model)
    save_adapter(model, tmp_path)
    card = (tmp_path / CARD).read_text()
    assert ("NF4 in blocks of 32." if options else "NF4 in blocks of 64, double quantization.") in card
    assert "began as pissa and is stored as the plain LoRA of rank 8" in card


# -- what is refused ---------------------------------------------------------------------------------------


def assert_refused(model_folder: Path, adapter: Path, message: str) -> None:
    """The one that loads must say why, and leave the model as it was."""
    model = load_ours(model_folder)
    before = model(IDS)
    with pytest.raises(ValueError, match=message) as refusal:
        load_adapter(model, adapter)
    assert str(adapter) in str(refusal.value)
    assert not lora_layers(model)
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_bias": True, "bias": "none"}, "lora_bias = True is not supported"),
        ({"bias": "lora_only"}, "bias = 'lora_only' is not supported"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication = .* is not supported"),
        ({"target_modules": ["embed_tokens"]}, "'embed_tokens' matches no linear layer"),
        (
            {"modules_to_save": ["o_proj"]},
            "modules_to_save trains embeddings, the head and norms, not .*o_proj",
        ),
    ],
    ids=str,
)
def test_what_peft_saves_and_is_not_understood_is_refused_by_key(
    tiny_model: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    write_with_peft(tiny_model, tmp_path, **options)
    assert_refused(tiny_model, tmp_path, f"{CONFIG}: .*{message}")


@pytest.mark.parametrize(
    "changes",
    [
        {"arrow_config": {"top_k": 2}},
        {"use_bdlora": {"nblocks": 2}},
        {"target_parameters": ["mlp.weight"]},
        {"alora_invocation_tokens": [5]},
        {"ensure_weight_tying": True},
        {"use_qalora": True},
        {"an_option_of_tomorrow": 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_option_that_is_not_known_is_refused_by_name(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    save_adapter(adapted(tiny_model), tmp_path)
    edit(tmp_path, **changes)
    ((key, value),) = changes.items()
    assert_refused(tiny_model, tmp_path, re.escape(f"{CONFIG}: {key} = {value!r} is not supported"))


@pytest.mark.parametrize("kind", ["pissa_niter_4", "corda", "loftq", 3])
def test_an_adapter_whose_base_cannot_be_made_again_is_refused(
    tiny_model: Path, tmp_path: Path, kind: Any
) -> None:
    save_adapter(adapted(tiny_model), tmp_path)
    edit(tmp_path, init_lora_weights=kind)
    assert_refused(tiny_model, tmp_path, f"{CONFIG}: init_lora_weights = {kind!r} is not supported")


@torch.no_grad()
def test_an_adapter_on_the_output_head_counts_or_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    theirs = write_with_peft(tiny_model, tmp_path, target_modules=["q_proj", "lm_head"])
    edit_weights(tmp_path, lambda held: held.pop("base_model.model.lm_head.base_layer.weight", None))
    ours = load_ours(tiny_model)
    try:
        load_adapter(ours, tmp_path)
    except ValueError as error:
        assert "lm_head" in str(error)
    else:
        assert_same_logits(ours.eval()(IDS), theirs(IDS).logits, load_ours(tiny_model)(IDS))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Any) -> None:
    held = safetensors.torch.load_file(folder / WEIGHTS)
    change(held)
    safetensors.torch.save_file(held, folder / WEIGHTS)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / CONFIG).unlink(), f"{CONFIG}: not found"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS}: not found"),
        (lambda folder: (folder / CONFIG).write_text("{"), f"{CONFIG}: not valid JSON"),
        (lambda folder: (folder / CONFIG).write_text("[]"), f"{CONFIG}: expected a JSON object"),
        (lambda folder: os.truncate(folder / WEIGHTS, 5), f"{WEIGHTS}: damaged or cut off"),
        (lambda folder: os.truncate(folder / WEIGHTS, 9000), f"{WEIGHTS}: damaged or cut off"),
        (lambda folder: edit(folder, peft_type="IA3"), f"{CONFIG}: peft_type = 'IA3' is not supported"),
        (lambda folder: edit(folder, fan_in_fan_out=True), f"{CONFIG}: fan_in_fan_out = True is not"),
        (lambda folder: edit(folder, r=None), f"{CONFIG}: r is missing or of the wrong type: None"),
        (lambda folder: edit(folder, r="4"), f"{CONFIG}: r is missing or of the wrong type: '4'"),
        (lambda folder: edit(folder, lora_alpha="8"), f"{CONFIG}: lora_alpha is missing or of the wrong"),
        (lambda folder: edit(folder, target_modules=None), f"{CONFIG}: target_modules is missing"),
        (lambda folder: edit(folder, target_modules=["c_attn"]), f"{CONFIG}: .*'c_attn' matches no linear"),
        (lambda folder: edit(folder, r=8), rf"{WEIGHTS}: .* has shape \(4, \d+\), but this model needs \(8"),
        (lambda folder: edit_weights(folder, lambda t: t.pop(KEY)), f"{WEIGHTS}: {KEY} is missing"),
        (
            lambda folder: edit_weights(folder, lambda t: t.update(other=torch.ones(1))),
            f"{WEIGHTS}: other has no place in this model",
        ),
        (lambda folder: edit(folder, target_modules=["q_proj"]), f"{WEIGHTS}: .* has no place in this model"),
        (lambda folder: edit_weights(folder, lambda t: t[KEY].fill_(math.nan)), f"{WEIGHTS}: {KEY} holds"),
        (
            lambda folder: edit(folder, rank_pattern={"q_proj": "4"}),
            f"{CONFIG}: rank_pattern is missing or of",
        ),
        (lambda folder: edit(folder, modules_to_save=["norm"]), rf"{WEIGHTS}: .*norm.weight is missing"),
        (lambda folder: edit(folder, trainable_token_indices=[9999]), f"{CONFIG}: .*9999 is none of 267"),
    ],
    ids=[
        "no-config",
        "no-weights",
        "broken-config",
        "list-config",
        "cut-to-5",
        "cut-to-9000",
        "ia3",
        "fan-in-fan-out",
        "no-r",
        "r-text",
        "alpha-text",
        "no-targets",
        "other-targets",
        "other-r",
        "tensor-missing",
        "tensor-left-over",
        "fewer-targets",
        "nan",
        "pattern-of-text",
        "no-norms",
        "token-beyond",
    ],
)
def test_a_damaged_adapter_is_refused_by_file_and_key(
    tiny_model: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    save_adapter(adapted(tiny_model), tmp_path)
    damage(tmp_path)
    assert_refused(tiny_model, tmp_path, message)


@pytest.mark.parametrize(
    "changes", [{"lora_dropout": 1.5}, {"lora_dropout": "0.1"}, {"target_modules": "("}], ids=str
)
def test_an_impossible_value_is_refused_by_file_and_key(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    save_adapter(adapted(tiny_model), tmp_path)
    edit(tmp_path, **changes)
    assert_refused(tiny_model, tmp_path, f"{CONFIG}: ")


@pytest.mark.parametrize(
    "entry", ["{", "[]", "{}", '{"init": "pissa"}', '{"init": "default", "r": 4, "alpha": 8}'], ids=str
)
def test_a_damaged_word_on_how_it_began_is_refused(tiny_model: Path, tmp_path: Path, entry: str) -> None:
    save_adapter(adapted(tiny_model), tmp_path)
    held = safetensors.torch.load_file(tmp_path / WEIGHTS)
    safetensors.torch.save_file(held, tmp_path / WEIGHTS, metadata={"minqlora": entry})
    assert_refused(tiny_model, tmp_path, f"{WEIGHTS}: the header's entry 'minqlora' is damaged")


def test_an_adapter_of_another_model_is_refused(tiny_model: Path, tmp_path: Path, make_llama: Any) -> None:
    save_adapter(adapted(make_llama(num_hidden_layers=3)), tmp_path / "deeper")
    assert_refused(
        tiny_model, tmp_path / "deeper", r"layers\.2\..* has no place in this model; was it trained"
    )
    save_adapter(adapted(make_llama(intermediate_size=128)), tmp_path / "wider")
    assert_refused(tiny_model, tmp_path / "wider", r"has shape \(.*128.*\), but this model needs \(.*96.*\)")


def test_a_model_without_adapters_has_nothing_to_save(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(load_ours(tiny_model), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# -- whole or not at all -----------------------------------------------------------------------------------


def test_the_weights_are_there_before_the_config_says_so(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    replace = os.replace

    def noted(source: Path, target: Path) -> None:
        replace(source, target)
        seen.append(sorted(path.name for path in tmp_path.iterdir()))

    monkeypatch.setattr(os, "replace", noted)
    save_adapter(adapted(tiny_model), tmp_path)
    assert seen == [[WEIGHTS], [CARD, WEIGHTS], [CARD, CONFIG, WEIGHTS]]


def test_a_save_that_fails_leaves_the_adapter_before_it_whole(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(adapted(tiny_model), tmp_path)
    shutil.copytree(tmp_path, tmp_path.parent / "before")

    def refuse(*_: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        save_adapter(adapted(tiny_model, seed=1), tmp_path)
    assert contents(tmp_path) == contents(tmp_path.parent / "before")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files the way Linux does")
def test_a_full_disk_leaves_the_adapter_before_it_whole(tiny_model: Path, tmp_path: Path) -> None:
    save_adapter(adapted(tiny_model), tmp_path)
    before = contents(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    other = adapted(tiny_model, seed=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_adapter(other, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
