"""Talk to a model, with or without an adapter.

    python scripts/chat.py --adapter runs/demo-1                   # a conversation
    python scripts/chat.py --adapter runs/demo-1 --prompt "..."    # one answer, and done
    python scripts/chat.py --model MODEL_FOLDER --temperature 0.7

The base model is the one that the adapter was trained on. The answer appears as it is generated. End a
conversation with an empty line, Ctrl-D or Ctrl-C.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from finetune import choose_device
from minqlora import generate, load_adapter, load_model
from minqlora.checkpoint import default_dtype, find_model
from minqlora.codebook import QUANT_TYPES
from minqlora.data import encode_prompt
from minqlora.model import CausalLM
from minqlora.tokenizer import Message, Tokenizer
from options import option, parse, user_errors


@dataclass
class Config:
    """What can be set."""

    model: Path | None = option(
        None,
        "folder of the base model, or a name that the local Hugging Face cache has "
        "(default: the one the adapter's run was trained on)",
    )
    adapter: Path | None = option(None, "adapter folder: a run of finetune.py, or one of PEFT's")
    prompt: str | None = option(None, "answer this and stop; without it, a conversation")
    system: str | None = option(None, "system message (default: the chat template's own, if it has one)")
    max_new_tokens: int = option(256, "longest answer in tokens")
    temperature: float = option(0.0, "0: always the likeliest token; 1: the model's own odds")
    top_p: float = option(1.0, "draw from the likeliest tokens that have this much probability together")
    seed: int = option(0, "seed of the drawing")
    bits: Literal[4, 16] | None = option(
        None,
        "bits of the frozen linear layers; 16: no quantization (default: as the adapter was trained, else 4)",
    )
    quant_type: str | None = option(
        None,
        "levels of the 4-bit code (default: as the adapter was trained, else nf4)",
        choices=list(QUANT_TYPES),
    )
    double_quant: bool | None = option(
        None, "quantize the scales too (default: as the adapter was trained, else true)"
    )
    block_size: int | None = option(
        None, "weights that share a scale (default: as the adapter was trained, else 64)"
    )
    quantize_embeddings: bool | None = option(
        None, "embeddings and head in 4 bits too (default: as the adapter was trained, else false)"
    )
    cache: Path | None = option(
        None,
        "keep the quantized weights in this folder, and read them from there the next time",
        bare=f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/minqlora",
    )
    dtype: Literal["bfloat16", "float32"] | None = option(
        None, "compute dtype (default: what the hardware does well)"
    )
    device: str | None = option(None, "cpu, cuda, ... (default: an accelerator if there is one)")

    def __post_init__(self) -> None:
        """Find the base model, and refuse values that cannot mean anything."""
        if self.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"--temperature must be >= 0 and --top_p in (0, 1], got {self.temperature} and {self.top_p}"
            )
        if self.model is None and self.adapter is None:
            raise ValueError("give --model, or --adapter with a run of finetune.py")
        run: dict[str, Any] = {}
        if self.adapter is not None:
            try:
                run = run_config(self.adapter)
            except ValueError:  # a config.yaml that is not ours matters only if the base is to be found in it
                if self.model is None:
                    raise
        if self.model is None:
            if "model" not in run:
                path = f"{self.adapter}/config.yaml"
                raise ValueError(f"{path}: not found, so the base model is not known; give --model")
            self.model = Path(run["model"])
        # An adapter corrects the rounding of the base that it was trained on: another base is another model.
        fill_as_trained(self, run)
        if not isinstance(self.block_size, int) or self.block_size < 2 or self.block_size % 2:
            raise ValueError(f"--block_size must be even, got {self.block_size}")


def run_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of the run in an adapter folder, empty if it is not one of finetune.py's."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict) or not isinstance(config.get("model"), str):
        raise ValueError(f"{path}: names no model; give --model")
    return config


def fill_as_trained(config: Any, run: dict[str, Any]) -> None:
    """Give the options that say how the base is quantized, where they are None, the values of a run."""
    defaults = {"bits": 4, "quant_type": "nf4", "double_quant": True, "block_size": 64}
    for name, default in {**defaults, "quantize_embeddings": False}.items():
        if getattr(config, name) is None:
            setattr(config, name, run.get(name, default))


def reply(model: CausalLM, tokenizer: Tokenizer, messages: list[Message], **options: Any) -> Iterator[str]:
    """Yield the answer to a conversation in pieces of text, as generated; options are those of `generate`."""
    prompt = encode_prompt(messages, tokenizer)
    ids: list[int] = []
    shown = ""
    for token in generate(model, prompt, eos_ids=tokenizer.eos_ids, **options):
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # a character whose bytes are not all here yet
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids)[len(shown) :]


def main() -> None:
    """Load, then answer."""
    config = parse(Config, description=__doc__.split("\n\n")[0] if __doc__ else None)
    with user_errors():
        # __post_init__ found them.
        assert config.model and config.block_size and config.double_quant is not None
        source = find_model(config.model)
        # A run that added tokens has a tokenizer of its own.
        own = config.adapter is not None and (config.adapter / "tokenizer_config.json").is_file()
        tokenizer = Tokenizer(config.adapter if config.adapter and own else source)
        device = choose_device(config.device)
        dtype = getattr(torch, config.dtype) if config.dtype else default_dtype(device)
        model = load_model(
            source,
            quant_type=config.quant_type if config.bits == 4 else None,
            double_quant=config.double_quant,
            block_size=config.block_size,
            device=device,
            dtype=dtype,
            quantize_embeddings=bool(config.quantize_embeddings),
            cache=config.cache,
        )
        if config.adapter is not None:
            load_adapter(model, config.adapter, base=source)
        model.eval()
    options = dict(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
    )
    messages: list[Message] = [{"role": "system", "content": config.system}] if config.system else []
    if config.prompt is not None:
        with user_errors():
            answer(model, tokenizer, [*messages, {"role": "user", "content": config.prompt}], **options)
        return
    while True:
        try:
            said = input("\nyou: ").strip()
            if not said:
                return
            print("model: ", end="")
            messages.append({"role": "user", "content": said})
            with user_errors():
                text = answer(model, tokenizer, messages, **options)
            messages.append({"role": "assistant", "content": text})
        except (EOFError, KeyboardInterrupt):
            print()
            return


def answer(model: CausalLM, tokenizer: Tokenizer, messages: list[Message], **options: Any) -> str:
    """Print the answer to a conversation as it is generated, and return it."""
    text = ""
    for piece in reply(model, tokenizer, messages, **options):
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


if __name__ == "__main__":
    main()
