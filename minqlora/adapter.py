"""Chapter 13. Adapter folders: what was trained, in the form that the rest of the world loads.

An adapter is two files and a model card. `adapter_config.json` says what was adapted and how;
`adapter_model.safetensors` holds the matrices, each under the path of its layer::

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight               (r, K) float32
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight               (N, r) float32
    base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector       (N,) float32, with DoRA
    base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta     (n, D), rows of some tokens
    base_model.model.model.norm.weight                                           (D,), trained whole

That is the format of PEFT, down to its names, so an adapter trained here runs wherever PEFT's do, and the
other way round. Every field that PEFT would read is written; one that would change the arithmetic and is not
understood here is refused by name.

What began as PiSSA or OLoRA was trained on a base that nobody else has: W - s B0 A0. It is saved for the
original base, as the plain LoRA of twice the rank that does the same::

    W - s B0 A0 + s B A  =  W + s [B, -B0] [A; A0]

How it began stands in the header of the safetensors file. With the full-precision base at hand, a reader that
looks there takes the halves apart again, and on the same device training goes on from the same bits.

Cost: 4 r (N + K) bytes a layer. The weights are written before the config, each atomically: a folder with a
config is whole.

Before: checkpoint. Next: template.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from minqlora import lora
from minqlora.checkpoint import find_model
from minqlora.files import Checkpoint, open_safetensors, write_atomically
from minqlora.lora import Adapter, LoRAConfig, LoRALinear, TrainedTokens
from minqlora.model import CausalLM
from minqlora.nf4 import NF4Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
_PREFIX = "base_model.model."
_ORIGIN = "minqlora"  # in the header of the weights: how a residual adapter began


def add_lora(model: nn.Module, *, base: Any = None, name: str = "default", **options: Any) -> list[str]:
    """Put an adapter on a model, in place, and freeze everything else: `lora.add_lora`, of which `base` can
    also be a folder, or a name that the local Hugging Face cache has.

    The method, in Part I, knows no files, and asks for weights by name; here the folder is opened that has
    them. Raises ValueError, too, for a folder that is in 4 bits or of another model.
    """
    config = LoRAConfig(**options)
    source = None if config.init in lora.PLAIN_INITS else _open_base(base)
    if source is not None:
        _require_base(source, model, config)
    return lora.add_lora(model, base=source, name=name, **options)


def _open_base(base: Any) -> Any:
    # -> something with read(name), None for none
    if not isinstance(base, str | Path):
        return base
    checkpoint = Checkpoint(find_model(base))
    if checkpoint.has_quantized:
        raise ValueError(
            f"{checkpoint.folder}: is in 4 bits; as base give the full-precision model that it was made from"
        )
    return checkpoint


def _require_base(source: Any, model: nn.Module, config: LoRAConfig) -> None:
    # Before anything is changed: the files have each weight in its shape, and the first is the model's own.
    modules, targets = lora.base_modules(model), lora.find_targets(model, config)
    if isinstance(source, Checkpoint):
        for path in targets:
            shape = tuple(_weight(modules[path]).shape)
            found = source.shape(f"{path}.weight") if f"{path}.weight" in source.names else None
            if found != shape:
                raise ValueError(
                    f"{source.folder}: as base it should have {path}.weight of shape {shape}, not {found}; "
                    "give the model that this one was made from"
                )
    lora.read_full(source, f"{targets[0]}.weight", _weight(modules[targets[0]]))


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


# ---- out ---------------------------------------------------------------------------------------------------


def save_adapter(model: CausalLM, folder: Path | str, base_model: str | None = None) -> None:
    """Write a model's active adapter to a PEFT folder, made if needed; each file appears whole or not at all.

    base_model: the base's name or folder, for `base_model_name_or_path`, where of a path only the last part
    goes in. Raises ValueError if the model has no adapter.
    """
    adapter = lora.active_adapter(model)
    if adapter is None:
        raise ValueError("the model has no adapters to save; call add_lora first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base_model = public_name(base_model) if base_model else None
    card = _card(model, adapter, base_model)
    config, metadata = adapter.config, {"format": "pt"}
    if config.is_residual:
        fields = asdict(config)
        metadata[_ORIGIN] = json.dumps({name: fields[name] for name in _SIZES} | {"init": config.init})
        config = _of_twice_the_rank(config)
    tensors = adapter_tensors(adapter)
    entries = _as_json(config, base_model) | {"target_modules": _target_modules(model, adapter)}
    write_atomically(folder / WEIGHTS_FILE, safetensors.torch.save(tensors, metadata=metadata))
    write_atomically(folder / CARD_FILE, card.encode())
    write_atomically(folder / CONFIG_FILE, (json.dumps(entries, indent=2) + "\n").encode())


def adapter_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return what the weights file of an adapter holds, by PEFT's keys, on the CPU."""
    tensors = {key: getattr(module, name).detach() for key, module, name in _places(adapter)}
    if adapter.config.is_residual:
        tensors |= _with_what_was_taken_out(adapter)
    return {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}


def public_name(model: str) -> str:
    """Return what a model is called among strangers: `org/name` as it is, of any other path the last part."""
    path = Path(model)
    is_name = not path.is_dir() and not path.is_absolute() and len(path.parts) <= 2 and path.parts[0] != ".."
    return model if is_name else path.resolve().name


def _places(adapter: Adapter) -> Iterator[tuple[str, nn.Module, str]]:
    # What is saved: a key of the file, and whose parameter it is, by which name.
    for path, module in adapter.modules.items():
        if isinstance(module, LoRALinear):
            yield f"{_PREFIX}{path}.lora_A.weight", module, "lora_A"
            yield f"{_PREFIX}{path}.lora_B.weight", module, "lora_B"
            if module.lora_magnitude_vector is not None:
                yield f"{_PREFIX}{path}.lora_magnitude_vector", module, "lora_magnitude_vector"
        elif isinstance(module, TrainedTokens):
            if not module.is_tied:
                yield f"{_PREFIX}{path}.token_adapter.trainable_tokens_delta", module.rows, "weight"
        else:
            yield from ((f"{_PREFIX}{path}.{name}", module, name) for name, _ in module.named_parameters())


_SIZES = ("r", "alpha", "rank_pattern", "alpha_pattern")


def _of_twice_the_rank(config: LoRAConfig) -> LoRAConfig:
    # The scaling stays: alpha / r, or alpha / sqrt(r).
    stretch = math.sqrt(2) if config.use_rslora else 2
    return replace(
        config,
        init="default",
        r=2 * config.r,
        alpha=stretch * config.alpha,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: stretch * alpha for key, alpha in config.alpha_pattern.items()},
    )


def _with_what_was_taken_out(adapter: Adapter) -> dict[str, Tensor]:
    tensors = {}
    for path, layer in adapter.modules.items():
        if isinstance(layer, LoRALinear):
            assert layer.initial_A is not None and layer.initial_B is not None
            tensors[f"{_PREFIX}{path}.lora_A.weight"] = torch.cat([layer.lora_A.detach(), layer.initial_A])
            tensors[f"{_PREFIX}{path}.lora_B.weight"] = torch.cat(
                [layer.lora_B.detach(), -layer.initial_B], 1
            )
    return tensors


def _as_json(config: LoRAConfig, base_model: str | None) -> dict[str, Any]:
    # All that PEFT's config has and we know, but for the targets.
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # What changed the base is undone above; and any other start is behind us.
        "init_lora_weights": True,
        "modules_to_save": list(config.modules_to_save) or None,
        "trainable_token_indices": config.trainable_token_indices or None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        # Which layers it is, the targets say.
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "revision": None,
    }


def _target_modules(model: nn.Module, adapter: Adapter) -> list[str]:
    # The short names where they say enough ("q_proj"), whole paths where only some layers of a kind are
    # adapted.
    adapted = [path for path, module in adapter.modules.items() if isinstance(module, LoRALinear)]
    kinds = sorted({path.rpartition(".")[2] for path in adapted})
    of_these_kinds = [path for path in lora.base_modules(model) if path.rpartition(".")[2] in kinds]
    return kinds if set(of_these_kinds) == set(adapted) else sorted(adapted)


def _card(model: nn.Module, adapter: Adapter, base_model: str | None) -> str:
    config = adapter.config
    layers = [module for module in adapter.modules.values() if isinstance(module, LoRALinear)]
    head = ["library_name: peft", "tags: [lora]"]
    if base_model is not None and base_model.count("/") == 1:  # what the hub takes for a name
        head.insert(0, f"base_model: {base_model}")
    variants = [name for name, used in (("rsLoRA", config.use_rslora), ("DoRA", config.use_dora)) if used]
    facts = [
        f"Base model: {base_model or 'not named'}.",
        f"Method: {' and '.join(variants) or 'LoRA'} of rank {config.r}, alpha {config.alpha:g}, on "
        f"{len(layers)} linear layers ({', '.join(_target_modules(model, adapter)[:8])}"
        f"{', ...' if len(_target_modules(model, adapter)) > 8 else ''}).",
        f"Base while it was trained: {_base_format(layers)}.",
    ]
    if config.modules_to_save:
        facts.append(f"Trained whole: {', '.join(config.modules_to_save)}.")
    if config.is_residual:
        facts.append(
            f"It began as {config.init} and is stored as the plain LoRA of rank {2 * config.r} that does the "
            "same on the original base."
        )
    if config.init == "loftq":
        facts.append(
            "It began as LoftQ and belongs on the 4-bit base: it makes up for what rounding has lost, and on "
            "a 16-bit base that would be added twice."
        )
    return "\n".join(
        ["---", *head, "---", "", f"# Adapter for {base_model or 'a language model'}", ""]
        + [f"- {fact}" for fact in facts]
        + ["", "With minqlora, `load_adapter(load_model(BASE), FOLDER)`; with PEFT,", "", "```python"]
        + ["from peft import PeftModel", "from transformers import AutoModelForCausalLM", ""]
        + ["model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)"]
        + ["```", "", "Made with minqlora.", ""]
    )


def _base_format(layers: list[LoRALinear]) -> str:
    weight = layers[0].weight
    if not isinstance(weight, NF4Tensor):
        return f"{str(weight.dtype).removeprefix('torch.')}, not quantized"
    double = ", double quantization" if weight.absmax is None else ""
    return f"{weight.format.quant_type.upper()} in blocks of {weight.format.block_size}{double}"


# ---- in ----------------------------------------------------------------------------------------------------


def load_adapter(
    model: CausalLM, folder: Path | str, *, name: str = "default", base: Any = None
) -> list[str]:
    """Put a PEFT folder's adapter on a model and switch to it; return the paths of the adapted layers.

    name: to switch to it again with `set_adapter`. base: folder of the full-precision base, needed where the
    adapter began as PiSSA or OLoRA and the model is in 4 bits: the base is then made again what it was in
    training. On a model that is not quantized such an adapter is a plain one without it.

    The adapter is trainable, the rest is frozen. Raises ValueError, naming file and key, for a folder that is
    incomplete or damaged, an option that is not understood, or an adapter made for another model. The model
    is then as it was.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG_FILE)
    held, origin = _read_weights(folder / WEIGHTS_FILE)
    _require_fit(model, folder, held, config)
    quantized = any(isinstance(parameter, NF4Tensor) for parameter in model.parameters())
    begun = replace(config, **origin) if origin else config
    source = _open_base(base) if begun.is_residual else None
    if source is not None:
        _require_base(source, model, begun)
        config = begun
    elif begun.is_residual and quantized:
        raise ValueError(
            f"{folder}: began as {begun.init}, which took a part out of the full-precision base; give the "
            "folder of that as base"
        )
    added = lora.attach(model, config, name)
    for path in [path for path, module in added.modules.items() if isinstance(module, LoRALinear)]:
        if not config.is_residual:
            continue
        if origin is None:  # PEFT's own, which finds what was taken out by the same decomposition
            lora.start(model, path, config.init, source)
        else:
            A0, B0 = _split(held, path, config.size(path)[0])
            lora.take_out(model, path, source, A0, B0)
    with torch.no_grad():
        for key, module, attribute in _places(added):
            _fill(getattr(module, attribute), held[key])
    return [path for path, module in added.modules.items() if isinstance(module, LoRALinear)]


def _split(held: dict[str, Tensor], path: str, r: int) -> tuple[Tensor, Tensor]:
    # Leaves in `held` what was trained; -> A0 and B0, what it started with.
    A, B = f"{_PREFIX}{path}.lora_A.weight", f"{_PREFIX}{path}.lora_B.weight"
    initial = held[A][r:].clone(), -held[B][:, r:]
    held[A], held[B] = held[A][:r], held[B][:, :r]
    return initial


def _fill(parameter: Tensor, value: Tensor) -> None:
    if parameter.is_meta:  # of a model without memory only the adapter has some
        torch.utils.swap_tensors(parameter, nn.Parameter(value.to(torch.float32)))
    else:
        parameter.copy_(value)


# ---- the config, checked -----------------------------------------------------------------------------------


def _is_int(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _list_of(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(of, value))


def _dict_of(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _either(*kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(kind(value) for kind in kinds)


_texts = _either(_is_text, _list_of(_is_text))

# Fields of PEFT's LoraConfig that are understood: what we call them, and what they may be.
# Null is as good as nothing, but where a value is required.
_READ: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("r", _is_int),
    "lora_alpha": ("alpha", _is_number),
    "target_modules": ("target_modules", _texts),
    "lora_dropout": ("dropout", _is_number),
    "exclude_modules": ("exclude_modules", _texts),
    "rank_pattern": ("rank_pattern", _dict_of(_is_int)),
    "alpha_pattern": ("alpha_pattern", _dict_of(_is_number)),
    "use_rslora": ("use_rslora", _is_flag),
    "use_dora": ("use_dora", _is_flag),
    "layers_to_transform": ("layers_to_transform", _either(_is_int, _list_of(_is_int))),
    "layers_pattern": ("layers_pattern", _texts),
    "modules_to_save": ("modules_to_save", _list_of(_is_text)),
    "trainable_token_indices": (
        "trainable_token_indices",
        _either(_list_of(_is_int), _dict_of(_list_of(_is_int))),
    ),
}
_REQUIRED = ("r", "lora_alpha", "target_modules")

# Fields that say nothing of the arithmetic, or only how training began.
_HARMLESS = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_HARMLESS |= {"inference_mode", "megatron_core", "qalora_group_size", "runtime_config"}
_HARMLESS |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}

# Fields of which one value leaves the arithmetic alone; any other field must be null, false or empty.
_INERT: dict[str, tuple[Any, ...]] = {"peft_type": ("LORA",), "bias": ("none",)}

# Starts that leave the base alone, and those that can be made again.
_BEGINNINGS = {None: "default", True: "default", False: "default", "gaussian": "gaussian", "eva": "default"}
_BEGINNINGS |= {"orthogonal": "orthogonal", "pissa": "pissa", "olora": "olora"}


def _read_config(path: Path) -> LoRAConfig:
    if not path.is_file():
        raise ValueError(f"{path}: not found; an adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected a JSON object")
    beginning = given.pop("init_lora_weights", None)
    if not isinstance(beginning, str | bool | None) or beginning not in _BEGINNINGS:
        raise ValueError(
            f"{path}: init_lora_weights = {beginning!r} is not supported: it changed the base in a way that "
            "the folder does not tell; in PEFT, save it with path_initial_model_for_weight_conversion"
        )
    options: dict[str, Any] = {"init": _BEGINNINGS[beginning], "dropout": 0.0}
    for key in [*_REQUIRED, *given]:
        value = given.get(key)
        if key in _READ:
            name, is_sound = _READ[key]
            if value is None and key not in _REQUIRED:
                continue
            if not is_sound(value):
                raise ValueError(f"{path}: {key} is missing or of the wrong type: {value!r}")
            options[name] = value
        elif key not in _HARMLESS and value not in (None, False, "", [], {}, *_INERT.get(key, ())):
            raise ValueError(f"{path}: {key} = {value!r} is not supported")
    try:
        return LoRAConfig(**options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    # -> tensors by key, and of a residual adapter the fields of the config with which it began
    if not path.is_file():
        raise ValueError(f"{path}: not found")
    with open_safetensors(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        origin = (file.metadata() or {}).get(_ORIGIN)
    if origin is None:
        return tensors, None
    try:
        fields = json.loads(origin)
        sound = LoRAConfig(**{name: fields[name] for name in (*_SIZES, "init")}).is_residual
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound or fields.keys() != {*_SIZES, "init"}:
        raise ValueError(f"{path}: the header's entry {_ORIGIN!r} is damaged: {origin[:100]!r}") from None
    return tensors, fields


def _require_fit(model: nn.Module, folder: Path, held: Mapping[str, Tensor], config: LoRAConfig) -> None:
    # Before anything is changed: the tensors must be those of the targeted layers of this model, and have
    # their shapes.
    try:
        wanted = dict(_shapes(model, config))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
    path = folder / WEIGHTS_FILE
    missing, left_over = sorted(set(wanted) - set(held)), sorted(set(held) - set(wanted))
    if left_over:
        raise ValueError(f"{path}: {left_over[0]} has no place in this model; was it trained on another one?")
    if missing:
        raise ValueError(f"{path}: {missing[0]} is missing, but {CONFIG_FILE} targets that layer")
    for key, shape in wanted.items():
        if tuple(held[key].shape) != shape:
            raise ValueError(
                f"{path}: {key} has shape {tuple(held[key].shape)}, but this model needs {shape}"
            )
        if not held[key].is_floating_point() or not held[key].isfinite().all():
            raise ValueError(f"{path}: {key} holds something else than finite floating-point numbers")


def _shapes(model: nn.Module, config: LoRAConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    # The keys of an adapter's file, and the shapes of its tensors.
    modules = lora.base_modules(model)
    for path in lora.find_targets(model, config):
        (n, k), (r, _) = _weight(modules[path]).shape, config.size(path)
        yield f"{_PREFIX}{path}.lora_A.weight", (r, k)
        yield f"{_PREFIX}{path}.lora_B.weight", (n, r)
        if config.use_dora:
            yield f"{_PREFIX}{path}.lora_magnitude_vector", (n,)
    for path in lora.find_modules_to_save(model, config):
        for name, parameter in modules[path].named_parameters():
            yield f"{_PREFIX}{path}.{name}", tuple(parameter.shape)
    for path, (tokens, shared) in lora.find_token_modules(model, config).items():
        if shared is None:
            width = _weight(modules[path]).shape[1]
            yield f"{_PREFIX}{path}.token_adapter.trainable_tokens_delta", (len(tokens), width)
