"""Chapter 12. Adapter folders: what was trained, in the form that the rest of the world loads.

An adapter is two files. `adapter_config.json` says what was adapted and how; `adapter_model.safetensors`
holds the matrices, each under the path of its layer::

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   (r, K) float32
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight   (N, r) float32

That is the format of PEFT, down to its names, so an adapter trained here runs wherever PEFT's do, and the
other way round. Every field that PEFT would read is written; one that would change the arithmetic and is not
understood here is refused by name.

Cost: 4 r (N + K) bytes a layer. The weights are written before the config, each atomically: a folder with a
config is whole.

Before: checkpoint. Next: template.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minqlora.files import open_safetensors, write_atomically
from minqlora.lora import add_lora, find_targets, lora_layers
from minqlora.model import CausalLM

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Fields of PEFT's LoraConfig that change the arithmetic, and the only values understood so far.
_UNDERSTOOD: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_rslora": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "init_lora_weights": (True, "gaussian", "orthogonal"),  # others change the base too
    "use_qalora": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": ([],),
    "layers_to_transform": (),
    "exclude_modules": (),
    "target_parameters": ([],),
    "trainable_token_indices": ([],),
    "layer_replication": ([],),
    "megatron_config": (),
    "alora_invocation_tokens": (),
}


def save_adapter(model: CausalLM, folder: Path | str, base_model: str | None = None) -> None:
    """Write a model's adapters to a PEFT folder, made if needed; each file appears whole or not at all.

    base_model: what `base_model_name_or_path` should say. Raises ValueError if the model has no adapters.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no adapters to save; call add_lora first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(layers.values()))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": first.r,
        "lora_alpha": first.alpha,
        "lora_dropout": getattr(first.dropout, "p", 0.0),
        "target_modules": _target_modules(model, list(layers)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "layers_to_transform": None,
        "layers_pattern": None,
        "revision": None,
    }
    write_atomically(folder / WEIGHTS_FILE, dict(_tensors(model)))
    write_atomically(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def load_adapter(model: CausalLM, folder: Path | str) -> list[str]:
    """Put a PEFT folder's adapters on a model that has none; return the paths of the adapted layers.

    The adapters are trainable, the rest is frozen. Raises ValueError, naming file and key, for a folder that
    is incomplete or damaged, an option that is not understood, or an adapter made for another model. The
    model is then as it was.
    """
    folder = Path(folder)
    options = _read_config(folder / CONFIG_FILE)
    held = _read_weights(folder / WEIGHTS_FILE)
    _require_fit(model, folder, held, options["r"], options["target_modules"])
    chosen = add_lora(model, **options)
    with torch.no_grad():
        for key, parameter in _tensors(model):
            parameter.copy_(held[key])
    return chosen


def _tensors(model: CausalLM):
    for name, layer in lora_layers(model).items():
        yield f"{_PREFIX}{name}.lora_A.weight", layer.lora_A
        yield f"{_PREFIX}{name}.lora_B.weight", layer.lora_B


def _target_modules(model: CausalLM, adapted: list[str]) -> list[str]:
    # The short names where they say enough ("q_proj"), whole paths where only some layers of a kind are
    # adapted.
    kinds = sorted({name.rpartition(".")[2] for name in adapted})
    by_kind = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in kinds]
    return kinds if set(by_kind) == set(adapted) else sorted(adapted)


def _read_config(path: Path) -> dict[str, Any]:
    # -> the arguments of add_lora
    if not path.is_file():
        raise ValueError(f"{path}: not found; an adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object")
    for key, values in _UNDERSTOOD.items():
        if config.get(key) not in (None, False, *values):
            raise ValueError(f"{path}: {key} = {config[key]!r} is not supported")
    config.setdefault("lora_dropout", 0.0)
    number = (int, float)
    kinds = {"r": (int,), "lora_alpha": number, "lora_dropout": number, "target_modules": (str, list)}
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind) or isinstance(config[key], bool):
            raise ValueError(f"{path}: {key} is missing or of the wrong type: {config.get(key)!r}")
    if config["r"] < 1 or not 0 <= config["lora_dropout"] < 1:
        raise ValueError(f"{path}: impossible r = {config['r']} or lora_dropout = {config['lora_dropout']}")
    return dict(
        r=config["r"],
        alpha=config["lora_alpha"],
        dropout=config["lora_dropout"],
        target_modules=config["target_modules"],
    )


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: not found")
    with open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


def _require_fit(
    model: CausalLM, folder: Path, held: dict[str, Tensor], r: int, target_modules: str | list[str]
) -> None:
    # Before anything is changed: the tensors must be those of the targeted layers of this model, and have
    # their shapes.
    try:
        targets = find_targets(model, target_modules)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
    wanted = {}
    for name in targets:
        weight = model.get_parameter(f"{name}.weight")
        n, k = weight.shape
        wanted[f"{_PREFIX}{name}.lora_A.weight"] = (r, k)
        wanted[f"{_PREFIX}{name}.lora_B.weight"] = (n, r)
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
