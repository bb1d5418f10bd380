"""Chapter 8. The shape of a model: config.json becomes one record.

A checkpoint folder says in `config.json` how its transformer is built: how many layers, how wide, how its
positions turn. This chapter reads that file once, fills in the defaults that Hugging Face leaves out, and
refuses what it does not understand, because a field ignored is a model that is silently wrong::

    {"model_type": "llama", "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, ...}
    -> Architecture(hidden_size=576, n_heads=9, n_kv_heads=3, head_dim=64, ...)

There is one transformer (Chapter 10) and a table of families, `FAMILIES`, that says in data how each departs
from Llama: where norms stand, which projections have a bias, which layers see only a window. The rest of the
package knows no family by name.

Rotary positions come in kinds (scaled, stretched, partial), and each is only another list of frequencies, so
frequencies are what the record holds. Pair i of a head turns by theta ** (-2 i / Hd) radians a position::

    theta = 10,000, Hd = 8     frequencies  1.0  0.1  0.01  0.001
    "linear", factor 4                      0.25 0.025 0.0025 0.00025

Before: optim. Next: attention.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """How fast the pairs of a head turn. The first 2 * len(frequencies) numbers of a head are turned."""

    frequencies: tuple[float, ...] = field(repr=False)  # radians a position, float32 numbers
    scale: float = 1.0  # cos and sin are multiplied by it
    # Sequences longer than this many positions turn at other frequencies; None: there are no others.
    original_length: int | None = None
    long_frequencies: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of one MLP: a router picks `active` of `count` MLPs for each token."""

    count: int
    active: int
    intermediate_size: int
    normalize: bool  # the chosen experts' weights sum to 1


@dataclass(frozen=True)
class Layer:
    """What may differ from one layer of a model to the next."""

    window: int | None = None  # positions that attention looks back on, its own included; None: all
    rotary: Rotary | None = None  # None: attention does not know positions
    experts: Experts | None = None


@dataclass(frozen=True)
class Norms:
    """Where a block has norms, by their names in checkpoints."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True)
class Family:
    """What a `model_type` says without saying it; the defaults are Llama's."""

    # Keys of config.json that this family reads besides COMMON, with what a missing one means.
    reads: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False  # whatever config.json says
    fused: bool = False  # one qkv_proj, one gate_up_proj
    norms: Norms = Norms()
    norm_offset: float = 0.0  # added to the weight of a norm
    norm_in_float32: bool = False  # the weight multiplies before the result is rounded to the compute dtype
    qk_norm: str | None = None  # "head": norms of queries and keys, for each head; "width": across all heads
    scaled_embedding: bool = False  # embeddings are multiplied by sqrt(D)
    mlp: str = "mlp"  # a block's MLP in checkpoints, then an expert's three matrices
    expert_matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """Everything about a model's shape that changes its arithmetic. Sizes count numbers, not bytes."""

    family: Family
    vocab_size: int
    hidden_size: int  # D, the width of the residual stream
    intermediate_size: int  # the width inside an MLP
    layers: tuple[Layer, ...]
    n_heads: int  # H, query heads
    n_kv_heads: int  # key and value heads, each shared by H / n_kv_heads query heads
    head_dim: int  # Hd
    norm_eps: float
    activation: str  # of the MLP's gate: "silu" or "gelu_tanh"
    tie_embeddings: bool  # the output head is the embedding matrix
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    max_positions: int  # the longest context the model was trained for, in tokens
    attention_scale: float  # what q @ k is multiplied by
    attention_dropout: float = 0.0  # in training
    attention_softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # what a block adds to the residual stream is multiplied by it
    logit_scale: float = 1.0

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return len(self.layers)

    @property
    def rotaries(self) -> set[Rotary]:
        """The different rotaries of the blocks."""
        return {layer.rotary for layer in self.layers if layer.rotary is not None}


# ---- the families ------------------------------------------------------------------------------------------

# Keys that every family reads, with what a missing one means; REQUIRED must be there.
REQUIRED: Any = object()
COMMON: dict[str, Any] = {
    "vocab_size": REQUIRED,
    "hidden_size": REQUIRED,
    "intermediate_size": REQUIRED,
    "num_hidden_layers": REQUIRED,
    "num_attention_heads": REQUIRED,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
}

_WINDOWED = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA_SIZES = {  # configs that repeat a default often leave the key out
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
}
_GEMMA = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": None,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
_GEMMA_2 = {
    **_GEMMA,
    **_GEMMA_SIZES,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
_SANDWICH = Norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)

FAMILIES: dict[str, Family] = {
    # Llama 2, 3 and 3.x, TinyLlama, SmolLM2.
    "llama": Family({"attention_bias": False, "mlp_bias": False}),
    # No key at all means a window of 4096; hub folders of later versions write null.
    "mistral": Family(
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    # Qwen2 and 2.5: the bias is not in config.json.
    "qwen2": Family({"max_position_embeddings": 32768, **_WINDOWED}, qkv_bias=True),
    "qwen3": Family(
        {"head_dim": 128, "max_position_embeddings": 32768, "attention_bias": False, **_WINDOWED},
        qk_norm="head",
    ),
    # Gemma 1: "gelu" in its first config.json meant the tanh approximation.
    "gemma": Family(
        {**_GEMMA, "max_position_embeddings": 8192},
        norm_offset=1.0,
        norm_in_float32=True,
        scaled_embedding=True,
    ),
    "gemma2": Family(
        {
            **_GEMMA_2,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        norms=_SANDWICH,
        norm_offset=1.0,
        norm_in_float32=True,
        scaled_embedding=True,
    ),
    # Gemma 3, the text model; transformers reads no attn_logit_softcapping for it.
    "gemma3_text": Family(
        {
            **_GEMMA_2,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "final_logit_softcapping": None,
            "sliding_window_pattern": None,
            "_sliding_window_pattern": None,
            "rope_local_base_freq": None,
        },
        norms=_SANDWICH,
        norm_offset=1.0,
        norm_in_float32=True,
        qk_norm="head",
        scaled_embedding=True,
    ),
    # Phi-3, Phi-3.5 and Phi-4-mini.
    "phi3": Family(
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        fused=True,
    ),
    "smollm3": Family(
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
    ),
    # OLMo 2.
    "olmo2": Family(
        {"rms_norm_eps": 1e-5, "attention_bias": False},
        norms=Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
        norm_in_float32=True,
        qk_norm="width",
    ),
    "granite": Family(
        {
            "attention_bias": False,
            "mlp_bias": False,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
        },
    ),
    "mixtral": Family(
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "num_local_experts": None,
            "num_experts": None,
            "num_experts_per_tok": 2,
        },
        mlp="block_sparse_moe",
        expert_matrices=("w1", "w3", "w2"),
    ),
    "qwen3_moe": Family(
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "num_local_experts": None,
            "num_experts": None,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
        },
        qk_norm="head",
    ),
}

# The base of the rotary angles where config.json has none.
_DEFAULT_THETA = {"smollm3": 2e6, "mixtral": 1e6, "gemma3_text": 1e6}

# Settings that would change the arithmetic and are not built, each with the value that leaves it alone.
_INERT: dict[str, Any] = {
    "use_bidirectional_attention": False,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "router_jitter_noise": 0.0,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
}

# Keys that say nothing of the arithmetic: names, versions, token ids, how weights were drawn, what to return,
# how to generate, and at the end some that exporters write for families that do not read them. Anything else
# that a family does not read is refused unless it is null or false.
_NO_ARITHMETIC = """
    architectures auto_map model_type torch_dtype dtype transformers_version transformers.js_config
    unsloth_version unsloth_fixed name_or_path tokenizer_class task_specific_params finetuning_task
    problem_type id2label label2id bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id
    decoder_start_token_id bad_words_ids begin_suppress_tokens suppress_tokens forced_bos_token_id
    forced_eos_token_id prefix initializer_range use_cache cache_implementation is_decoder return_dict
    return_dict_in_generate output_scores output_router_logits router_aux_loss_coef
    chunk_size_feed_forward pruned_heads max_length min_length do_sample num_beams num_beam_groups
    num_return_sequences temperature top_k top_p typical_p repetition_penalty length_penalty
    diversity_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size early_stopping
    attn_implementation use_flash_attn use_flash_attention_2 kernel_config quantization_config
    pretraining_tp max_window_layers sliding_window_size is_llama_config
"""


def read_architecture(folder: Path | str) -> Architecture:
    """Read `config.json` in a checkpoint folder.

    Raises ValueError, naming the file and the key, if the folder or file is missing, is not JSON, lacks a
    key, is of a family that is not supported, or sets a field that is not understood.
    """
    folder = Path(folder)
    config = read_config(folder)
    try:
        return architecture_from_config(config)
    except ValueError as error:
        # A key may hold anything, ends of lines too.
        problem = "".join(c if c.isprintable() else " " for c in str(error))
        raise ValueError(f"{folder / 'config.json'}: {' '.join(problem.split())}") from None


def read_config(folder: Path | str) -> dict[str, Any]:
    """Return what `config.json` in a checkpoint folder holds; raises ValueError, naming it, if it cannot."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no such model folder: {folder}")
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{path}: not found; a model folder holds config.json, *.safetensors and a tokenizer"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def architecture_from_config(config: dict[str, Any]) -> Architecture:
    """Translate the contents of a `config.json`; raises ValueError as `read_architecture` does."""
    family = _family(config)
    values = _Values({**COMMON, **family.reads}, config)
    hidden_size, n_heads = values.size("hidden_size"), values.size("num_attention_heads")
    n_kv_heads = values.size("num_key_value_heads", n_heads)
    if hidden_size < n_heads:
        raise ValueError(f"hidden_size = {hidden_size} is less than num_attention_heads = {n_heads}")
    head_dim = values.size("head_dim", hidden_size // n_heads)
    if head_dim > 2**16:
        raise ValueError(f"head_dim = {head_dim} is more than any model has")
    if n_heads % n_kv_heads:
        raise ValueError(
            f"num_attention_heads = {n_heads} is not a multiple of num_key_value_heads = {n_kv_heads}"
        )
    attention_bias = values.flag("attention_bias")
    scale = values.number("query_pre_attn_scalar", head_dim) ** -0.5
    if "attention_multiplier" in family.reads:
        scale = values.number("attention_multiplier")
    embedding_scale = math.sqrt(hidden_size) if family.scaled_embedding else 1.0
    return Architecture(
        family=family,
        vocab_size=values.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=values.size("intermediate_size"),
        layers=_layers(values, head_dim),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        norm_eps=values.number("rms_norm_eps", 1e-6),
        activation=_activation(values),
        tie_embeddings=values.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=values.flag("mlp_bias"),
        max_positions=values.size("max_position_embeddings", COMMON["max_position_embeddings"]),
        attention_scale=scale,
        attention_dropout=values.share("attention_dropout"),
        attention_softcap=values.number("attn_logit_softcapping", None),
        logit_softcap=values.number("final_logit_softcapping", None),
        embedding_scale=embedding_scale * values.number("embedding_multiplier", 1.0),
        residual_scale=values.number("residual_multiplier", 1.0),
        logit_scale=1.0 / values.number("logits_scaling", 1.0),
    )


def _family(config: dict[str, Any]) -> Family:
    # Refuses what could change the arithmetic and is not understood.
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        hint = "; only the text model, gemma3_text, is" if name == "gemma3" else ""
        raise ValueError(f"model_type {name!r} is not supported{hint}; supported: {', '.join(FAMILIES)}")
    for key, value in config.items():
        if value is None or value is False or key in _NO_ARITHMETIC.split() or key.startswith("_"):
            continue
        if key in _INERT:
            if value != _INERT[key]:
                raise ValueError(f"{key} = {_short(value)} is not supported; expected {_INERT[key]!r}")
        elif key not in COMMON and key not in family.reads:
            raise ValueError(
                f"{key} = {_short(value)} is not understood for model_type {name!r} and could change the "
                "arithmetic; if it does not, take it out"
            )
    return family


def _activation(values: "_Values") -> str:
    # Gemma's own key wins where it is there; its early "gelu" always meant the approximation.
    key = "hidden_activation" if values.get("hidden_activation") is not None else "hidden_act"
    name = values.get(key)
    if values.reads("hidden_activation") and name in ("gelu", "gelu_pytorch_tanh"):
        return "gelu_tanh"
    if name in ("silu", "swish"):
        return "silu"
    if name == "gelu_pytorch_tanh":
        return "gelu_tanh"
    raise ValueError(f"{key} = {_short(name)} is not supported; expected 'silu' or 'gelu_pytorch_tanh'")


class _Values:
    """The values of a config.json, missing ones filled in, each checked where it is asked for."""

    def __init__(self, defaults: Mapping[str, Any], config: dict[str, Any]):
        self._values = {**defaults, **{key: config[key] for key in defaults if key in config}}
        self.model_type: str = config["model_type"]

    def reads(self, key: str) -> bool:
        """Return whether the family has such a key."""
        return key in self._values

    def get(self, key: str) -> Any:
        """Return the value as it stands there; None if there is none."""
        value = self._values.get(key)
        return None if value is REQUIRED else value

    def number(self, key: str, default: Any = REQUIRED, whole: bool = False) -> Any:
        """Return a positive number, or the default for null and for a key that the family does not have."""
        value = self._values.get(key)
        if value is None or value is REQUIRED:
            if default is REQUIRED or value is REQUIRED:
                raise ValueError(f"{key} is missing")
            return default
        if not _is_number(value) or value <= 0 or (whole and (value != int(value) or value >= 2**31)):
            raise ValueError(
                f"{key} must be a positive {'integer' if whole else 'number'}, got {_short(value)}"
            )
        return int(value) if whole else float(value)

    def size(self, key: str, default: Any = REQUIRED) -> int:
        """Return a positive whole number."""
        return self.number(key, default, whole=True)

    def count(self, key: str) -> int:
        """Return a whole number, 0 for null."""
        value = self.get(key) or 0
        return self.size(key) if value else 0

    def share(self, key: str) -> float:
        """Return a number in [0, 1)."""
        value = self.get(key)
        if value is not None and (not _is_number(value) or not 0 <= value < 1):
            raise ValueError(f"{key} must be in [0, 1), got {_short(value)}")
        return float(value or 0)

    def flag(self, key: str) -> bool:
        """Return true or false; null is false."""
        value = self.get(key)
        if not (value is None or isinstance(value, bool)):
            raise ValueError(f"{key} must be true or false, got {_short(value)}")
        return bool(value)

    def of_layers(self, key: str, n_layers: int, allowed: tuple) -> list | None:
        """Return a list with one of the allowed values for each layer, or None for null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < n_layers or any(item not in allowed for item in value):
            raise ValueError(f"{key} must list one of {allowed} for each of {n_layers} layers")
        return value[:n_layers]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- what differs from layer to layer ----------------------------------------------------------------------


def _layers(values: _Values, head_dim: int) -> tuple[Layer, ...]:
    n = values.size("num_hidden_layers")
    if n > 10_000:
        raise ValueError(f"num_hidden_layers = {n} is more than any model has")
    rotary = _rotary(values, head_dim)
    turns = values.of_layers("no_rope_layers", n, (0, 1, False, True))
    if turns is None and values.reads("no_rope_layers"):
        interval = values.size("no_rope_layer_interval")
        turns = [(i + 1) % interval != 0 for i in range(n)]
    local = _windowed(values, n, turns)
    window = values.size("sliding_window") if any(local) else None
    experts = _experts(values)
    layers = []
    for i in range(n):
        kind = "sliding_attention" if local[i] else "full_attention"
        layers.append(
            Layer(
                window=window if local[i] else None,
                rotary=rotary[kind] if turns is None or turns[i] else None,
                experts=experts if _is_mixture(values, i) else None,
            )
        )
    return tuple(layers)


def _windowed(values: _Values, n: int, turns: list | None) -> list[bool]:
    # For each layer, whether attention sees only a window.
    switched_off = values.reads("use_sliding_window") and not values.flag("use_sliding_window")
    if values.get("sliding_window") is None or switched_off:
        return [False] * n
    kinds = values.of_layers("layer_types", n, ("full_attention", "sliding_attention"))
    if kinds is not None:
        return [kind == "sliding_attention" for kind in kinds]
    if values.reads("query_pre_attn_scalar"):
        # Every layer but each second (Gemma 2) or sixth (Gemma 3), unless the config has another number.
        key = "sliding_window_pattern" if values.get("sliding_window_pattern") else "_sliding_window_pattern"
        pattern = values.size(key, 6 if values.reads(key) else 2)
        return [(i + 1) % pattern != 0 for i in range(n)]
    if values.reads("layer_types") and values.reads("max_window_layers"):
        first = values.count("max_window_layers")
        return [i >= first for i in range(n)]
    if turns is not None:
        return [not turn for turn in turns]
    return [True] * n


def _experts(values: _Values) -> Experts | None:
    if not values.reads("num_experts_per_tok"):
        return None
    # Two names for one number; which one a file has depends on the version that wrote it.
    key = "num_local_experts" if values.get("num_experts") is None else "num_experts"
    experts = Experts(
        count=values.size(key),
        active=values.size("num_experts_per_tok"),
        intermediate_size=values.size("moe_intermediate_size", values.size("intermediate_size")),
        normalize=values.flag("norm_topk_prob") if values.reads("norm_topk_prob") else True,
    )
    if experts.active > experts.count:
        raise ValueError(f"num_experts_per_tok = {experts.active} is more than {key} = {experts.count}")
    return experts


def _is_mixture(values: _Values, layer: int) -> bool:
    plain = values.get("mlp_only_layers") or []
    if not isinstance(plain, list):
        raise ValueError(f"mlp_only_layers must be a list of layers, got {_short(plain)}")
    return layer not in plain and (layer + 1) % values.size("decoder_sparse_step", 1) == 0


# ---- rotary positions --------------------------------------------------------------------------------------


def _rotary(values: _Values, head_dim: int) -> dict[str, Rotary]:
    # The rotary positions of both kinds of layer. Old spelling: rope_theta and rope_scaling. New one
    # (transformers 5): both inside rope_parameters, which may hold an object for each kind. The old one wins.
    spelled: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        part = values.get(key)
        if part is not None and not isinstance(part, dict):
            raise ValueError(f"{key} must be an object, got {_short(part)}")
        spelled |= part or {}
    kinds = ("full_attention", "sliding_attention")
    theta = values.number("rope_theta", _DEFAULT_THETA.get(values.model_type, 10000.0))
    if not values.reads("rope_local_base_freq"):
        if any(kind in spelled for kind in kinds):
            raise ValueError(f"rope_parameters by kind of layer are not understood for {values.model_type!r}")
        return dict.fromkeys(kinds, _rotary_of(spelled, theta, values, head_dim))
    # Gemma 3: layers with a window turn by a base of their own, and are never scaled by the old spelling.
    own = {kind: spelled.pop(kind, None) or {} for kind in kinds}
    local_theta = values.number("rope_local_base_freq", 10000.0)
    return {
        "full_attention": _rotary_of({**own["full_attention"], **spelled}, theta, values, head_dim),
        "sliding_attention": _rotary_of(own["sliding_attention"], local_theta, values, head_dim),
    }


def _rotary_of(rope: dict[str, Any], theta: float, values: _Values, head_dim: int) -> Rotary:
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if values.model_type == "phi3" and kind in ("su", "yarn"):  # what it was called at first
        kind = "longrope"
    scaling = SCALINGS.get(kind) if isinstance(kind, str) else None
    if scaling is None:
        known = ", ".join(SCALINGS)
        raise ValueError(f"rotary embeddings of type {kind!r} are not supported; supported: {known}")
    scale, understood = scaling
    numbers = _Values(
        dict.fromkeys(("rope_theta", "partial_rotary_factor", *understood)),
        {**rope, "model_type": values.model_type},
    )
    unknown = set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *understood}
    if unknown:
        key = min(unknown)
        raise ValueError(
            f"{key} = {_short(rope[key])} is not understood for rotary embeddings of type {kind!r}"
        )
    theta = numbers.number("rope_theta", theta)
    share = numbers.number("partial_rotary_factor", values.number("partial_rotary_factor", 1.0))
    width = int(head_dim * share)
    if width % 2 or not 0 < width <= head_dim:
        raise ValueError(
            f"{width} of {head_dim} numbers of a head would be turned; it must be an even number"
        )
    # float32 throughout, and in the order in which transformers takes it: the angles of far positions
    # show every bit.
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    return scale(theta**exponents, theta, numbers, values)


def _numbers(frequencies: Tensor) -> tuple[float, ...]:
    return tuple(frequencies.tolist())


def _original_length(numbers: _Values, values: _Values) -> int:
    # The context before it was stretched. A key of its own beats the one among the rotary parameters.
    trained = values.size("max_position_embeddings", COMMON["max_position_embeddings"])
    if values.reads("original_max_position_embeddings"):
        return values.size("original_max_position_embeddings", trained)
    return numbers.size("original_max_position_embeddings", trained)


def _unscaled(wavelengths: Tensor, theta: float, numbers: _Values, values: _Values) -> Rotary:
    return Rotary(_numbers(1.0 / wavelengths))


def _linear(wavelengths: Tensor, theta: float, numbers: _Values, values: _Values) -> Rotary:
    # All positions closer together by one factor.
    return Rotary(_numbers(1.0 / wavelengths / numbers.number("factor")))


def _llama3(wavelengths: Tensor, theta: float, numbers: _Values, values: _Values) -> Rotary:
    # Slow pairs, which do not come round once in the old context, are slowed by the factor; fast ones are
    # left; those in between blend.
    frequencies = 1.0 / wavelengths
    factor, slow, fast = (numbers.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if fast <= slow:
        raise ValueError(f"high_freq_factor = {fast} must be more than low_freq_factor = {slow}")
    length = _original_length(numbers, values)
    rounds_per = 2 * math.pi / frequencies  # positions in a turn
    blend = (length / rounds_per - slow) / (fast - slow)
    blended = (1 - blend) * (frequencies / factor) + blend * frequencies
    frequencies = torch.where(
        rounds_per > length / slow,
        frequencies / factor,
        torch.where(rounds_per < length / fast, frequencies, blended),
    )
    return Rotary(_numbers(frequencies))


def _yarn(wavelengths: Tensor, theta: float, numbers: _Values, values: _Values) -> Rotary:
    # As llama3, but the blend is linear in the index of the pair, and attention is sharpened.
    factor, length = numbers.number("factor"), _original_length(numbers, values)
    n_pairs = len(wavelengths)
    if theta <= 1:
        raise ValueError(f"rope_theta = {theta} must be more than 1 for rotary embeddings of type 'yarn'")

    def pair_that_turns(rounds: float) -> float:  # so many times in the old context
        return 2 * n_pairs * math.log(length / (rounds * 2 * math.pi)) / (2 * math.log(theta))

    first = pair_that_turns(numbers.number("beta_fast", 32.0))
    last = pair_that_turns(numbers.number("beta_slow", 1.0))
    if numbers.get("truncate") is None or numbers.flag("truncate"):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * n_pairs - 1)
    last += 0.001 * (first == last)
    kept = 1 - ((torch.arange(n_pairs, dtype=torch.float32, device="cpu") - first) / (last - first)).clamp(
        0, 1
    )
    frequencies = (1.0 / (factor * wavelengths)) * (1 - kept) + (1.0 / wavelengths) * kept

    def sharpened(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all = numbers.number("mscale", 0.0), numbers.number("mscale_all_dim", 0.0)
    scale = sharpened(mscale) / sharpened(mscale_all) if mscale and mscale_all else sharpened(1.0)
    return Rotary(_numbers(frequencies), numbers.number("attention_factor", scale))


def _longrope(wavelengths: Tensor, theta: float, numbers: _Values, values: _Values) -> Rotary:
    # A factor for each pair, found by search: one list within the old context and one beyond it.
    length = _original_length(numbers, values)
    trained = values.size("max_position_embeddings", COMMON["max_position_embeddings"])
    factor = numbers.number("factor", trained / length)
    scale = math.sqrt(1 + math.log(factor) / math.log(max(length, 2))) if factor > 1 else 1.0

    def frequencies(key: str) -> tuple[float, ...]:
        """Return each pair's frequency over its factor."""
        factors = numbers.get(key)
        if (
            not isinstance(factors, list)
            or len(factors) != len(wavelengths)
            or not all(map(_is_number, factors))
        ):
            raise ValueError(f"{key} must list {len(wavelengths)} numbers, got {_short(factors)}")
        return _numbers(1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * wavelengths))

    return Rotary(
        frequencies("short_factor"),
        numbers.number("attention_factor", scale),
        original_length=length,
        long_frequencies=frequencies("long_factor"),
    )


_STRETCHED = ("factor", "original_max_position_embeddings")
SCALINGS: dict[str, tuple[Callable[[Tensor, float, _Values, _Values], Rotary], tuple[str, ...]]] = {
    "default": (_unscaled, ()),
    "linear": (_linear, ("factor",)),
    "llama3": (_llama3, (*_STRETCHED, "low_freq_factor", "high_freq_factor")),
    "yarn": (
        _yarn,
        (*_STRETCHED, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (_longrope, (*_STRETCHED, "attention_factor", "short_factor", "long_factor")),
}


# ---- writing -----------------------------------------------------------------------------------------------


def both_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that old and new readers understand: dtype and rotary parameters in both spellings.

    transformers 5 writes `dtype` and `rope_parameters`; earlier versions, and most other tools, read
    `torch_dtype`, `rope_theta` and `rope_scaling`.
    """
    config = dict(config)
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is not None:
        config["dtype"] = config["torch_dtype"] = dtype
    new = config.get("rope_parameters")
    if new is not None and "rope_theta" not in config and config.get("rope_scaling") is None:
        local = new.get("sliding_attention") or {}
        if "rope_theta" in local:
            config["rope_local_base_freq"] = local["rope_theta"]
        flat = dict(new.get("full_attention") or new)
        config["rope_theta"] = flat.pop("rope_theta", None)
        if "partial_rotary_factor" in flat:
            config["partial_rotary_factor"] = flat.pop("partial_rotary_factor")
        plain = flat.get("rope_type", "default") == "default"
        # A null would be read as "nothing was said", which is right.
        config["rope_scaling"] = None if plain else {**flat, "type": flat["rope_type"]}
    elif new is None and config.get("rope_theta") is not None and "rope_local_base_freq" not in config:
        old = dict(config.get("rope_scaling") or {"rope_type": "default"})
        old.setdefault("rope_type", old.pop("type", "default"))
        config["rope_parameters"] = {**old, "rope_theta": config["rope_theta"]}
    return config
