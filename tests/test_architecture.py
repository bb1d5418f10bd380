"""A config.json means to us what it means to transformers; what we do not understand, we refuse by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minqlora.architecture import Architecture, architecture_from_config, read_architecture

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
    """The oracle: the same file through transformers' own class."""
    from transformers import LlamaConfig

    theirs = LlamaConfig.from_dict(config)
    assert theirs.rope_parameters["rope_type"] == "default"
    return Architecture(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        intermediate_size=theirs.intermediate_size,
        n_layers=theirs.num_hidden_layers,
        n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        norm_eps=theirs.rms_norm_eps,
        rope_theta=theirs.rope_parameters["rope_theta"],
        tie_embeddings=theirs.tie_word_embeddings,
        attention_bias=theirs.attention_bias,
        mlp_bias=theirs.mlp_bias,
        max_positions=theirs.max_position_embeddings,
    )


# -- what is read ------------------------------------------------------------------------------------------


def test_the_demo_models_shape_is_read_from_its_folder(demo_model: Path) -> None:
    assert read_architecture(demo_model) == Architecture(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        norm_eps=1e-5,
        rope_theta=100000.0,
        tie_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        max_positions=8192,
    )


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
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: 'llama'"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; expected 'silu'"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2 is not supported; expected 1"),
        ({"sliding_window": 4096}, "sliding_window = 4096 is not supported; expected no such field"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config = \{'bits': 4\} is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear' are not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "type 'llama3' are not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5 is not supported"),
        ({"rope_parameters": [1]}, r"rope_parameters must be an object, got \[1\]"),
        ({"rope_theta": "1e4"}, "rope_theta must be a positive number, got '1e4'"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number, got -1.0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
        ({"num_attention_heads": 32.5}, "num_attention_heads must be a positive integer, got 32.5"),
        ({"num_attention_heads": True}, "num_attention_heads must be a positive integer, got True"),
        ({"num_key_value_heads": 5}, "num_attention_heads = 32 is not a multiple of num_key_value_heads = 5"),
        ({"head_dim": 33}, "head_dim = 33 is odd"),
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
    key=st.sampled_from([*LLAMA, "head_dim", "rope_theta", "rope_parameters", "attention_bias"]),
    value=json_values,
)
def test_no_value_of_any_key_is_more_than_a_value_error(key: str, value: Any) -> None:
    config = json.loads(json.dumps(LLAMA | {key: value}))  # NaN too: json reads it
    try:
        arch = architecture_from_config(config)
    except ValueError:
        return
    assert arch.n_heads % arch.n_kv_heads == 0 and arch.head_dim % 2 == 0
