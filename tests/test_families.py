"""Every family computes what transformers computes: tiny random models that show each peculiarity.

The real class of each family is the oracle, filled with random numbers in every parameter (zeros and ones, as
a fresh model has them in biases and norms, would hide a forgotten one), on sequences long enough for windows
and for scaled rotary positions to matter.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minqlora import LoRALinear, NF4Tensor, add_lora, load_model
from minqlora.architecture import both_spellings, read_architecture
from minqlora.attention import KVCache, StepCache
from minqlora.generate import RecordedStep
from minqlora.lora import lora_layers
from minqlora.loss import supervised_loss
from minqlora.model import CausalLM, compile_blocks

T = 40

SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def rope(kind: str, **others: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **others}}


LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
# T = 40 is beyond the old context of the second and within that of the first.
LONGROPE = {
    length: {
        "original_max_position_embeddings": length,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + 0.1 * i for i in range(4)],
            "long_factor": [1.0 + 2.0 * i for i in range(4)],
            "partial_rotary_factor": 0.5,
        },
        "hidden_size": 64,
    }
    for length in (64, 16)
}
GEMMA3_ROPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    }
}

# family: what makes its variants differ from the sizes above
FAMILIES: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {},
        LLAMA3,
        YARN,
        rope("yarn", factor=2.0, beta_fast=16.0, beta_slow=2.0, attention_factor=1.3, truncate=False),
        rope("yarn", factor=40.0, mscale=0.7, mscale_all_dim=1.1, original_max_position_embeddings=16),
        rope("linear", factor=3.0),
        {"attention_bias": True, "mlp_bias": True, "head_dim": 20, "tie_word_embeddings": True},
    ],
    "mistral": [{"sliding_window": 7}, {"sliding_window": None, "head_dim": 18}, {"sliding_window": 4096}],
    "qwen2": [
        {},
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0, **YARN},
        {"tie_word_embeddings": True},
    ],
    "qwen3": [
        {"head_dim": 22},
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
        YARN,
    ],
    "gemma": [{"head_dim": 20}, {"num_key_value_heads": 1, "attention_bias": True}],
    "gemma2": [
        {"head_dim": 20, "sliding_window": 6, "query_pre_attn_scalar": 13},
        {"sliding_window": 6, "attn_logit_softcapping": None, "final_logit_softcapping": None},
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5, "head_dim": 12},
    ],
    "gemma3_text": [
        {"num_hidden_layers": 7, "sliding_window": 5, "head_dim": 20, "query_pre_attn_scalar": 30},
        {"num_hidden_layers": 7, "sliding_window": 5, **GEMMA3_ROPE},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 3},
        {"final_logit_softcapping": 2.0, "head_dim": 16},
    ],
    "phi3": [
        {},
        {"sliding_window": 8},
        rope("default", partial_rotary_factor=0.5) | {"tie_word_embeddings": True, "hidden_size": 64},
        LONGROPE[64],
        LONGROPE[16],
    ],
    "smollm3": [
        {"num_hidden_layers": 5},
        {"no_rope_layers": [1, 0, 1], "attention_bias": True, "mlp_bias": True},
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6, **YARN},
    ],
    "olmo2": [{}, {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True}],
    "granite": [
        dict(embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22),
        dict(attention_multiplier=0.0156, residual_multiplier=0.5, attention_bias=True, mlp_bias=True),
    ],
    "mixtral": [
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 7, "head_dim": 20},
    ],
    "qwen3_moe": [
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 22},
        {"num_experts": 4, "num_experts_per_tok": 3, "norm_topk_prob": True, "mlp_only_layers": [1]},
        {"num_experts": 4, "decoder_sparse_step": 2, "num_experts_per_tok": 2}
        | {"use_sliding_window": True, "sliding_window": 6},
    ],
}
CASES = [
    pytest.param(family, changes, id=f"{family}-{number}")
    for family, variants in FAMILIES.items()
    for number, changes in enumerate(variants)
]


def write_model(folder: Path, family: str, changes: dict[str, Any], seed: int = 0) -> Any:
    """Write a random model of a family to a folder, and return transformers' own instance of it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **(SIZES | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Norms near 1 (or 0, where 1 is added), scores large enough for caps and softmax to bite.
            parameter.copy_(0.3 * noise + 1.0 if parameter.dim() == 1 else 0.25 * noise)
    model.save_pretrained(folder)
    return model


def load_ours(folder: Path) -> CausalLM:
    return load_model(folder, quant_type=None, dtype=torch.float32)


def ids(rows: int, seed: int) -> Tensor:
    return torch.randint(3, SIZES["vocab_size"], (rows, T), generator=torch.Generator().manual_seed(seed))


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("family", "changes"), CASES)
def test_logits_are_those_of_transformers(
    tmp_path: Path, family: str, changes: dict[str, Any], seed: int
) -> None:
    theirs = write_model(tmp_path, family, changes, seed)
    ours = load_ours(tmp_path)
    text = ids(2, seed)
    expected = theirs(text).logits
    assert relative_difference(ours(text), expected) <= 1e-4
    assert expected.std() > 0.05  # it says something


@torch.no_grad()
@pytest.mark.parametrize(("family", "changes"), CASES)
def test_cached_decoding_is_that_of_transformers(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    theirs = write_model(tmp_path, family, changes)
    ours = load_ours(tmp_path)
    text = ids(1, 3)
    cache = KVCache(ours.arch, 1, T, torch.float32, torch.device("cpu"))
    past = None
    for part in text.split([T - 6] + [1] * 6, dim=1):
        out = theirs(part, past_key_values=past, use_cache=True)
        past = out.past_key_values
        assert relative_difference(ours(part, cache=cache), out.logits) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("family", "changes"), CASES)
def test_documents_and_padded_rows_are_what_they_are_alone(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    write_model(tmp_path, family, changes)
    ours = load_ours(tmp_path)
    text = ids(1, 4)
    first, second = text.split([17, T - 17], dim=1)
    alone = [ours(first), ours(second)]
    torch.testing.assert_close(ours(text, [17, T - 17]), torch.cat(alone, 1), rtol=1e-4, atol=1e-4)
    # The same two as the rows of a batch, the shorter one padded on the left, the last three one by one.
    pad = T - 2 * 17
    rows = torch.cat([torch.cat([torch.zeros(1, pad, dtype=torch.int64), first], 1), second])
    batch = in_pieces(ours, rows, KVCache(*room(ours, 2), padding=torch.tensor([pad, 0])))
    for row, text in enumerate([first, second]):
        own = in_pieces(ours, text, KVCache(*room(ours, 1)))
        torch.testing.assert_close(batch[row, -text.shape[1] :], own[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("family", "changes"), CASES)
def test_steps_of_fixed_shapes_are_those_of_a_growing_cache(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    write_model(tmp_path, family, changes)
    ours = load_ours(tmp_path)
    if not StepCache.suits(ours.arch, T):
        pytest.skip("a mixture, or a rotary that changes with the length")
    text, pad = ids(2, 6), torch.tensor([3, 0])
    for rows, padding in ((text[:1], None), (text, pad)):
        growing, cache = (KVCache(*room(ours, len(rows)), padding=padding) for _ in range(2))
        for each in (growing, cache):
            ours(rows[:, : T - 4], cache=each)
        step = RecordedStep(ours, cache)
        for token in rows[:, T - 4 :].split(1, dim=1):
            expected = ours(token, cache=growing)[:, -1]
            torch.testing.assert_close(step(token), expected, rtol=1e-4, atol=1e-4)
        assert cache.length == growing.length == T
        with pytest.raises(ValueError, match="has room for"):
            step(token)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), CASES)
def test_compiled_blocks_train_as_eager_ones_do(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    write_model(tmp_path, family, changes)
    found = []
    for compiled in (True, False):
        torch.manual_seed(0)
        ours = load_model(tmp_path, dtype=torch.float32)
        add_lora(ours, r=2, dropout=0.1)
        for layer in lora_layers(ours).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
        if compiled:
            torch._dynamo.reset()
            compile_blocks(ours, "aot_eager")
        ours.train().model(ids(1, 7), [T - 5, 5]).square().sum().backward()
        found.append([p.grad for p in ours.parameters() if p.grad is not None])
    assert found[0]
    for a, b in zip(*found, strict=True):
        assert relative_difference(a, b) <= 1e-5


def room(model: CausalLM, rows: int) -> tuple:
    return model.arch, rows, T, torch.float32, torch.device("cpu")


def in_pieces(model: CausalLM, text: Tensor, cache: KVCache) -> Tensor:
    pieces = text.split([text.shape[1] - 3, 1, 1, 1], dim=1)
    return torch.cat([model(piece, cache=cache) for piece in pieces], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    changes = FAMILIES[family][-1]
    theirs = write_model(tmp_path, family, changes)
    ours = load_ours(tmp_path)
    text = ids(1, 5)
    theirs.requires_grad_(False).get_input_embeddings().weight.requires_grad_()
    ours.model.embed_tokens.weight = torch.nn.Parameter(ours.model.embed_tokens.weight.clone())
    expected = theirs(text, labels=text).loss
    targets = torch.cat([text[:, 1:], torch.full((1, 1), -100)], 1)
    loss = supervised_loss(ours.model(text), targets, ours.lm_head) / (T - 1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    if not ours.arch.tie_embeddings:  # theirs would add the head's gradient
        loss.backward()
        expected.backward()
        grad = theirs.get_input_embeddings().weight.grad
        assert relative_difference(ours.model.embed_tokens.weight.grad, grad) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_in_4_bits_it_is_the_same_model_with_rounded_weights(tmp_path: Path, family: str) -> None:
    write_model(tmp_path, family, FAMILIES[family][0])
    packed, dense = load_model(tmp_path, block_size=32, dtype=torch.float32), load_ours(tmp_path)
    quantized = {name: p for name, p in packed.named_parameters() if isinstance(p, NF4Tensor)}
    for name, weight in quantized.items():
        dense.get_parameter(name).copy_(weight.dequantize())
    text = ids(1, 8)
    assert relative_difference(packed(text), dense(text)) <= 1e-5
    matrices = {name for name, p in dense.model.layers.named_parameters() if p.dim() == 2}
    routers = {name for name in matrices if name.endswith(".gate.weight")}
    assert {f"model.layers.{name}" for name in matrices - routers} == set(quantized)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_train_on_a_4_bit_model_of_every_family(tmp_path: Path, family: str) -> None:
    write_model(tmp_path, family, FAMILIES[family][0])
    model = load_model(tmp_path, block_size=32, dtype=torch.float32)
    adapted = add_lora(model, r=4, alpha=8)
    linear = {name for name, module in model.model.named_modules() if isinstance(module, LoRALinear)}
    assert {f"model.{name}" for name in linear} == set(adapted)
    assert not any(".experts." in name or name.endswith(".gate") for name in adapted)
    model.train().model.gradient_checkpointing = True
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    text = ids(1, 9)
    targets = torch.cat([text[:, 1:], torch.full((1, 1), -100)], 1)
    losses = []
    for _ in range(15):
        loss = supervised_loss(model.model(text, [15, 25]), targets, model.lm_head) / (T - 1)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    found = []
    for checkpointing in (False, True):
        model.model.gradient_checkpointing = checkpointing
        loss = supervised_loss(model.model(text, [15, 25]), targets, model.lm_head)
        found.append(torch.autograd.grad(loss, trained))
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*found, strict=True))


# -- spellings ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("family", "changes"), CASES)
def test_both_spellings_of_a_config_mean_the_same(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    theirs = write_model(tmp_path, family, changes)
    new = json.loads((tmp_path / "config.json").read_text())
    arch = read_architecture(tmp_path)
    both = both_spellings(new)
    old = {key: value for key, value in both.items() if key not in ("rope_parameters", "dtype")}
    for config in (both, old, both_spellings(old)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_architecture(tmp_path) == arch
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, attn_implementation="eager"
        )
        text = ids(1, 6)
        assert relative_difference(again(text).logits, theirs(text).logits) <= 1e-6


# -- what is not understood --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_transformers_writes_is_understood_and_a_strange_one_is_not(
    tmp_path: Path, family: str
) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_architecture(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_sinks": 4}))
    with pytest.raises(ValueError, match="config.json: attention_sinks = 4 is not understood for model_type"):
        read_architecture(tmp_path)


# As the hub has them, less sizes and token ids: what exporters of several years write beside what is read.
HUB: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": dict(
        model_type="llama",
        attention_bias=False,
        head_dim=64,
        hidden_act="silu",
        initializer_range=0.02,
        mlp_bias=False,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling=LLAMA3["rope_parameters"] | {"factor": 32.0, "original_max_position_embeddings": 8192},
        rope_theta=500000.0,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
        use_cache=True,
    ),
    "SmolLM2-135M": {
        "model_type": "llama",
        "is_llama_config": True,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "transformers.js_config": {"dtype": "q4"},
        "tie_word_embeddings": True,
    },
    "SmolLM3-3B": dict(
        model_type="smollm3",
        layer_types=["full_attention"] * 4,
        no_rope_layers=[1, 1, 1, 0],
        no_rope_layer_interval=4,
        max_window_layers=28,
        pretraining_tp=2,
        rope_scaling=None,
        rope_theta=5000000.0,
        sliding_window=None,
        use_sliding_window=False,
    ),
    "Qwen2.5-7B": dict(
        model_type="qwen2",
        max_window_layers=28,
        sliding_window=131072,
        use_sliding_window=False,
        use_mrope=False,
        rope_theta=1000000.0,
        transformers_version="4.40.1",
    ),
    "Gemma-2-2b": dict(
        model_type="gemma2",
        cache_implementation="hybrid",
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        head_dim=16,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=256,
        sliding_window=6,
        sliding_window_size=6,
    ),
    "gemma-3-1b": dict(
        model_type="gemma3_text",
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        head_dim=16,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256,
        rope_local_base_freq=10000,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=5,
        sliding_window_pattern=2,
    ),
    "Phi-4-mini": dict(
        model_type="phi3",
        auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
        attention_bias=False,
        embd_pdrop=0.0,
        full_attn_mod=1,
        interpolate_factor=1,
        lm_head_bias=False,
        mlp_bias=False,
        original_max_position_embeddings=16,
        partial_rotary_factor=0.5,
        resid_pdrop=0.0,
        rope_scaling={"type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 4.0, 9.0]},
        rope_theta=10000.0,
        sliding_window=262144,
        tie_word_embeddings=True,
    ),
    "Mixtral-8x7B": dict(
        model_type="mixtral",
        num_local_experts=3,
        num_experts_per_tok=2,
        output_router_logits=False,
        router_aux_loss_coef=0.02,
        rope_theta=1000000.0,
        sliding_window=None,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("config", HUB.values(), ids=HUB)
def test_configs_as_the_hub_has_them_give_transformers_logits(tmp_path: Path, config: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    family = config["model_type"]
    changes = {
        key: config[key] for key in ("tie_word_embeddings", "num_local_experts", "head_dim") if key in config
    }
    write_model(tmp_path, family, {"num_hidden_layers": 4, "intermediate_size": 72} | changes)
    written = SIZES | {"num_hidden_layers": 4} | config
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    text = ids(1, 7)
    assert relative_difference(load_ours(tmp_path)(text), theirs(text).logits) <= 1e-4
