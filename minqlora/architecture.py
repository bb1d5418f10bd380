"""Chapter 8. The shape of a model: config.json becomes one record.

A checkpoint folder says in `config.json` how its transformer is built: how many layers, how wide, which base
the rotary angles have. This chapter reads that file once, fills in the defaults that Hugging Face leaves out,
and refuses what it does not understand, because a field ignored is a model that is silently wrong::

    {"model_type": "llama", "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, ...}
    -> Architecture(hidden_size=576, n_heads=9, n_kv_heads=3, head_dim=64, ...)

The families that are understood: Llama (Llama 2, Llama 3, TinyLlama, SmolLM2 and others whose model_type is
"llama").

Paper: none; Hugging Face's `LlamaConfig` is the reference.

Before: optim. Next: model.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """Everything about a model's shape that changes its arithmetic. Sizes count numbers, not bytes."""

    vocab_size: int
    hidden_size: int  # D, the width of the residual stream
    intermediate_size: int  # the width inside an MLP
    n_layers: int
    n_heads: int  # H, query heads
    n_kv_heads: int  # key and value heads, each shared by H / n_kv_heads query heads
    head_dim: int  # Hd
    norm_eps: float
    rope_theta: float  # base of the rotary angles
    tie_embeddings: bool  # the output head is the embedding matrix
    attention_bias: bool
    mlp_bias: bool
    max_positions: int  # the longest context the model was trained for, in tokens


# Fields that change the arithmetic of a Llama and the only values understood so far.
_UNDERSTOOD: dict[str, tuple] = {
    "hidden_act": ("silu",),
    "pretraining_tp": (1,),
    "rope_interleaved": (False,),
    "attention_dropout": (0, 0.0),
    "quantization_config": (),
    "sliding_window": (),
}


def read_architecture(folder: Path | str) -> Architecture:
    """Read `config.json` in a checkpoint folder.

    Raises ValueError, naming the file and the key, if the folder or file is missing, is not JSON, lacks a
    key, is of a family that is not supported, or sets a field to a value that is not understood.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no such model folder: {folder}")
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{path}: not found; a model folder holds config.json, *.safetensors and tokenizer.json"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    try:
        return architecture_from_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def architecture_from_config(config: dict[str, Any]) -> Architecture:
    """Translate the contents of a `config.json`; raises ValueError as `read_architecture` does."""
    family = config.get("model_type")
    if family != "llama":
        raise ValueError(f"model_type {family!r} is not supported; supported: 'llama'")
    for key, values in _UNDERSTOOD.items():
        if config.get(key) is not None and config[key] not in values:
            wanted = " or ".join(repr(value) for value in values) or "no such field"
            raise ValueError(f"{key} = {config[key]!r} is not supported; expected {wanted}")
    hidden_size = _number(config, "hidden_size")
    n_heads = _number(config, "num_attention_heads")
    n_kv_heads = _number(config, "num_key_value_heads", n_heads)
    head_dim = _number(config, "head_dim", hidden_size // n_heads)
    if n_heads % n_kv_heads:
        raise ValueError(
            f"num_attention_heads = {n_heads} is not a multiple of num_key_value_heads = {n_kv_heads}"
        )
    if head_dim % 2:
        raise ValueError(f"head_dim = {head_dim} is odd; rotary embeddings turn pairs")
    return Architecture(
        vocab_size=_number(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_number(config, "intermediate_size"),
        n_layers=_number(config, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        norm_eps=_number(config, "rms_norm_eps", 1e-6, kind=float),
        rope_theta=_rope_theta(config),
        tie_embeddings=_flag(config, "tie_word_embeddings"),
        attention_bias=_flag(config, "attention_bias"),
        mlp_bias=_flag(config, "mlp_bias"),
        max_positions=_number(config, "max_position_embeddings", 2048),
    )


def _number(config: dict[str, Any], key: str, default: Any = None, kind: type = int) -> Any:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"{key} is missing")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < 2**63 or kind(value) != value:
        raise ValueError(f"{key} must be a positive {'integer' if kind is int else 'number'}, got {value!r}")
    return kind(value)


def _flag(config: dict[str, Any], key: str) -> bool:
    value = config.get(key)
    if value not in (None, True, False):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return bool(value)


def _rope_theta(config: dict[str, Any]) -> float:
    # Old spelling: rope_theta and rope_scaling. New one (transformers 5): both inside rope_parameters. The
    # old one wins.
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        part = config.get(key)
        if part is not None and not isinstance(part, dict):
            raise ValueError(f"{key} must be an object, got {part!r}")
        rope |= part or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rotary embeddings of type {kind!r} are not supported; expected 'default'")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"partial_rotary_factor = {rope['partial_rotary_factor']!r} is not supported; expected 1"
        )
    return _number(rope if "rope_theta" in rope else config, "rope_theta", 10000.0, kind=float)
