"""A config.json means to us what it means to transformers; what we do not understand, we refuse by name."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minqlora.architecture import (
    COMMON,
    FAMILIES,
    SCALINGS,
    Architecture,
    Layer,
    Rotary,
    architecture_from_config,
    read_architecture,
)

# As old checkpoints have it on the Hub: Llama 2 7B's config.json, less what says nothing of the arithmetic.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


def as_transformers_reads(config: dict[str, Any]) -> Architecture:
    """The oracle: the same file through transformers' own classes."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaConfig.from_dict(config)
    turning = LlamaRotaryEmbedding(theirs)
    rotary = Rotary(tuple(turning.inv_freq.tolist()), turning.attention_scaling)
    return Architecture(
        family=FAMILIES["llama"],
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        intermediate_size=theirs.intermediate_size,
        layers=(Layer(rotary=rotary),) * theirs.num_hidden_layers,
        n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        norm_eps=theirs.rms_norm_eps,
        activation=theirs.hidden_act,
        tie_embeddings=theirs.tie_word_embeddings,
        qkv_bias=theirs.attention_bias,
        o_bias=theirs.attention_bias,
        mlp_bias=theirs.mlp_bias,
        max_positions=theirs.max_position_embeddings,
        attention_scale=theirs.head_dim**-0.5,
        attention_dropout=theirs.attention_dropout,
    )


# -- what is read ------------------------------------------------------------------------------------------


def test_the_demo_models_shape_is_read_from_its_folder(demo_model: Path) -> None:
    arch = read_architecture(demo_model)
    assert (arch.vocab_size, arch.hidden_size, arch.intermediate_size) == (49152, 576, 1536)
    assert (arch.n_layers, arch.n_heads, arch.n_kv_heads, arch.head_dim) == (30, 9, 3, 64)
    assert (arch.norm_eps, arch.tie_embeddings, arch.max_positions) == (1e-5, True, 8192)
    (layer,) = set(arch.layers)  # all alike
    assert layer.window is None and layer.experts is None
    assert layer.rotary.frequencies[-1] == pytest.approx(100000.0 ** (-62 / 64))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 8},
        {"num_key_value_heads": None},
        {"head_dim": 160},
        {"head_dim": None},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"rope_theta": 500000.0},
        {"rope_theta": 500000},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_theta": 100000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
        {"rope_theta": 20000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_theta": 20000.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 20000.0, "rope_scaling": {"type": "default"}},
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "rope_scaling": {"rope_type": "default", "rope_theta": 30000.0},
        },
        {"rope_theta": 20000.0, "rope_scaling": {"rope_type": "default", "rope_theta": 30000.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    ],
    ids=str,
)
def test_a_config_means_what_transformers_takes_it_for(changes: dict[str, Any]) -> None:
    assert architecture_from_config(LLAMA | changes) == as_transformers_reads(LLAMA | changes)


@pytest.mark.parametrize(
    "left_out",
    ["num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"],
)
def test_a_key_left_out_has_transformers_default(left_out: str) -> None:
    config = {key: value for key, value in LLAMA.items() if key != left_out}
    assert architecture_from_config(config) == as_transformers_reads(config)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4),
    kv_heads=st.integers(1, 4),
    half_head=st.integers(1, 40),
    theta=st.floats(1.0, 1e7),
    eps=st.floats(1e-12, 1e-3),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    layers=st.integers(1, 100),
)
def test_whatever_transformers_saves_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    groups: int,
    kv_heads: int,
    half_head: int,
    theta: float,
    eps: float,
    flags: tuple[bool, bool, bool],
    layers: int,
) -> None:
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("config")
    theirs = LlamaConfig(
        hidden_size=groups * kv_heads * 2 * half_head,
        intermediate_size=3 * half_head,
        num_hidden_layers=layers,
        num_attention_heads=groups * kv_heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=eps,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=flags[0],
        attention_bias=flags[1],
        mlp_bias=flags[2],
    )
    theirs.save_pretrained(folder)
    assert read_architecture(folder) == as_transformers_reads(theirs.to_dict())


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: llama, mistral, "),
        ({"model_type": "gemma3"}, "'gemma3' is not supported; only the text model, gemma3_text, is"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; expected 'silu' or"),
        ({"sliding_window": 4096}, "sliding_window = 4096 is not understood for model_type 'llama'"),
        ({"layer_types": ["full_attention"]}, "layer_types = .* is not understood for model_type 'llama'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic' are not supported"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}},
            "beta = 1 is not understood for rotary",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_parameters": {"full_attention": {}}}, "by kind of layer are not understood for 'llama'"),
        ({"rope_parameters": {"partial_rotary_factor": 2.0}}, "256 of 128 numbers of a head would be turned"),
        ({"attention_dropout": 1}, r"attention_dropout must be in \[0, 1\), got 1"),
        ({"model_type": "phi3", "resid_pdrop": 0.1}, "resid_pdrop = 0.1 is not supported; expected 0.0"),
        ({"model_type": "qwen2", "layer_types": ["x"] * 32, "use_sliding_window": True}, "layer_types must"),
        (
            {"model_type": "mixtral", "num_experts_per_tok": 9, "num_local_experts": 8},
            "is more than num_local",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, "no_rope_layers must list one of"),
        ({"rope_parameters": [1]}, r"rope_parameters must be an object, got \[1\]"),
        ({"rope_theta": "1e4"}, "rope_theta must be a positive number, got '1e4'"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number, got -1.0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
        ({"num_attention_heads": 32.5}, "num_attention_heads must be a positive integer, got 32.5"),
        ({"num_attention_heads": True}, "num_attention_heads must be a positive integer, got True"),
        ({"num_key_value_heads": 5}, "num_attention_heads = 32 is not a multiple of num_key_value_heads = 5"),
        ({"head_dim": 33}, "33 of 33 numbers of a head would be turned; it must be an even number"),
        ({"hidden_size": "4096"}, "hidden_size must be a positive integer, got '4096'"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"rms_norm_eps": [1]}, r"rms_norm_eps must be a positive number, got \[1\]"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
    ],
    ids=str,
)
def test_a_config_not_understood_is_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        architecture_from_config(LLAMA | changes)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no such model folder: {tmp_path / 'nowhere'}"):
        read_architecture(tmp_path / "nowhere")


def test_a_folder_without_config_says_what_a_model_folder_holds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: not found; a model folder holds config\.json, \*"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"model_type": "llama"', "not valid JSON"),
        (b"\xff\xfe{", "not valid JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b'{"model_type": "gpt2"}', "model_type 'gpt2' is not supported"),
        (b'{"model_type": "llama"}', "is missing"),
        (b'{"model_type": "llama", "num_attention_heads": NaN}', "must be a positive integer|is missing"),
    ],
    ids=str,
)
def test_a_broken_config_is_named_with_its_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json: .*({message})"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", float("inf")), ("rope_theta", 10**400), ("rope_theta", float("inf"))],
    ids=["size-inf", "theta-huge", "theta-inf"],
)
def test_a_number_without_bounds_is_refused_by_key(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key} must be a positive"):
        architecture_from_config(LLAMA | {key: value})


finite = st.integers(-(10**9), 10**9) | st.floats(allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | finite | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@settings(max_examples=300, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    data=st.data(),
)
def test_no_value_of_any_key_is_more_than_a_value_error(family: str, data: st.DataObject) -> None:
    known = LLAMA | {"model_type": family, "num_local_experts": 4}
    key = data.draw(st.sampled_from(sorted({*known, *COMMON, *FAMILIES[family].reads})))
    config = json.loads(json.dumps(known | {key: data.draw(json_values)}))  # NaN too: json reads it
    try:
        arch = architecture_from_config(config)
    except ValueError:
        return
    assert arch.n_heads % arch.n_kv_heads == 0 and len(arch.layers) > 0


ROPE_KEYS = sorted({key for _, keys in SCALINGS.values() for key in keys} | {"rope_theta"})


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(sorted(SCALINGS)),
    parameters=st.dictionaries(st.sampled_from(ROPE_KEYS), json_values | st.floats(0.5, 100.0)),
)
def test_no_rotary_parameters_are_more_than_a_value_error(kind: str, parameters: dict[str, Any]) -> None:
    config = json.loads(json.dumps(LLAMA | {"rope_scaling": parameters | {"rope_type": kind}}))
    try:
        rotary = architecture_from_config(config).layers[0].rotary
    except ValueError:
        return
    assert all(math.isfinite(frequency) for frequency in rotary.frequencies)
