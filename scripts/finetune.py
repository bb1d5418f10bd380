"""Fine-tune a language model with QLoRA: 4-bit base, adapters on every linear layer, paged AdamW.

    python scripts/finetune.py --model MODEL_FOLDER --dataset train.jsonl
    python scripts/finetune.py --config scripts/configs/demo.yaml --max_steps 20
    python scripts/finetune.py --help

MODEL_FOLDER is an ordinary Hugging Face folder (config.json, safetensors, tokenizer.json). A dataset is JSON
Lines, each row one of
    {"prompt": ..., "completion": ...}
    {"question": ..., "answer": ...}
    {"instruction": ..., "input": ..., "output": ...}
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
The result is a run folder: an adapter that PEFT loads too, the configuration, and one line of metrics a step.

This file is meant to be edited. It reads from top to bottom: what can be set, then what is done.
"""

import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minqlora import PagedAdamW, add_lora, load_model, save_adapter
from minqlora.architecture import read_architecture
from minqlora.checkpoint import default_dtype, find_model, quantized_size
from minqlora.codebook import QUANT_TYPES
from minqlora.data import Batch, Example, collate, load_dataset, shuffled, split
from minqlora.files import SAVED_QUANT_TYPES, write_atomically
from minqlora.lora import LoRAConfig, TrainedTokens, parameter_groups
from minqlora.loss import supervised_loss
from minqlora.model import CausalLM
from minqlora.run import MetricsLog, environment, next_run_folder, peak_memory_gib, require_unused
from minqlora.tokenizer import Tokenizer
from options import REQUIRED, option, parse, to_yaml, user_errors

# ---- configuration -----------------------------------------------------------------------------------------


@dataclass
class Config:
    """What can be set. Defaults are the paper's unless the help says why not."""

    model: Path = option(
        REQUIRED,
        "folder of the base model, or a name such as org/model that the local Hugging Face cache has",
        aliases=["model_name_or_path"],
    )
    dataset: list[Path] = option(REQUIRED, "JSONL files to learn from")
    eval_dataset: list[Path] | None = option(
        None, "JSONL files to evaluate on; none: --val_size splits some off"
    )
    val_size: float = option(0.0, "held-out part of --dataset: a share if below 1, else a number of rows")
    max_eval_samples: int | None = option(None, "evaluate on at most this many held-out rows")
    output_dir: Path | None = option(
        None, "folder for the run, new or empty (default: runs/MODEL-1, -2, ...)"
    )

    bits: Literal[4, 16] = option(4, "bits of the frozen linear layers; 16: no quantization")
    quant_type: str = option(
        "nf4",
        "levels of the code; all but nf4 and fp4 are for comparison, and nf5 to nf8 take 8 bits",
        choices=list(QUANT_TYPES),
    )
    double_quant: bool = option(True, "quantize the scales too: 4.127 bits per parameter, not 4.5")
    block_size: int = option(64, "weights that share a scale")
    quantize_embeddings: bool = option(False, "embeddings and output head in 4 bits too")
    cache: Path | None = option(
        None,
        "keep the quantized weights in this folder, and read them from there the next time",
        bare=f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/minqlora",
    )

    lora_r: int = option(64, "rank of the adapters")
    lora_alpha: float = option(16.0, "size of the adapters' correction, scaled by alpha / r")
    lora_dropout: float = option(
        0.0, "dropout before the adapters, for small datasets (the paper: 0.1 to 13B, 0.05 above)"
    )
    lora_target_modules: list[str] = option(
        ["all-linear"],
        "layers to adapt: all-linear, names such as q_proj v_proj, or a regular expression for whole paths",
    )
    lora_rank_pattern: list[str] | None = option(None, "ranks of some layers, as in q_proj=8 mlp.up_proj=16")
    lora_alpha_pattern: list[str] | None = option(None, "alphas of some layers, likewise")
    layers_to_transform: list[int] | None = option(None, "adapt only these blocks, counted from 0")
    use_rslora: bool = option(
        False, "scale by alpha / sqrt(r): a larger rank then learns as fast as a small one"
    )
    use_dora: bool = option(False, "train the length of each weight's rows apart from their direction")
    init_lora_weights: str = option(
        "default",
        "where adapters start: default, gaussian, orthogonal; pissa, pissa_niter_N, olora or loftq read the "
        "full-precision weights again",
    )
    loraplus_lr_ratio: float | None = option(
        None, "learning rate of lora_B against --learning_rate; LoRA+ suggests 16 (default: 1)"
    )
    modules_to_save: list[str] | None = option(
        None, "modules to train whole, in float32, by the end of their names: embed_tokens, lm_head, norm"
    )
    new_tokens: list[str] | None = option(
        None, "words to be one token each, whose rows of embedding and head are trained"
    )

    max_seq_length: int = option(1024, "longest example in tokens; longer ones are cut and counted")
    per_device_train_batch_size: int = option(
        1, "examples in a micro-batch, end to end in one row, never padded"
    )
    gradient_accumulation_steps: int = option(16, "micro-batches an optimizer step")
    num_train_epochs: float = option(1.0, "passes over the data (the paper: 1 to 3, by dataset)")
    max_steps: int | None = option(None, "stop after so many optimizer steps, whatever num_train_epochs says")
    learning_rate: float = option(2e-4, "peak learning rate (the paper: 2e-4 up to 13B, 1e-4 above)")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = option(
        "constant", "schedule after the warmup"
    )
    warmup_steps: int = option(0, "optimizer steps from rate 0 to the peak")
    max_grad_norm: float = option(0.3, "clip the gradient to this norm; 0: do not")
    adam_beta2: float = option(0.999, "decay of AdamW's mean of squared gradients, per step")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay, per step and unit of learning rate")

    gradient_checkpointing: bool = option(
        True, "recompute each block in backward: a third slower, several times leaner"
    )
    dtype: Literal["bfloat16", "float32"] | None = option(
        None, "compute dtype (default: what the hardware does well)"
    )
    device: str | None = option(None, "cpu, cuda, ... (default: an accelerator if there is one)")
    seed: int = option(0, "seed of the adapters, the order of the data, and dropout")

    logging_steps: int = option(1, "write metrics every so many steps")
    eval_steps: int | None = option(
        None, "evaluate every so many steps (default: before the first and after the last)"
    )

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything."""
        at_least = {
            0: "val_size lora_alpha lora_dropout num_train_epochs learning_rate warmup_steps max_grad_norm"
            " weight_decay seed",
            1: "lora_r max_eval_samples max_steps per_device_train_batch_size gradient_accumulation_steps"
            " logging_steps eval_steps",
            2: "max_seq_length block_size",
        }
        for least, names in at_least.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and value < least:
                    raise ValueError(f"--{name} must be at least {least}, got {value}")
        for name, value, below in (
            ("adam_beta2", self.adam_beta2, 1),
            ("lora_dropout", self.lora_dropout, 1),
        ):
            if not 0 <= value < below:
                raise ValueError(f"--{name} must be in [0, {below}), got {value}")
        if self.seed >= 2**32:
            raise ValueError(f"--seed must be below 2**32, got {self.seed}")
        if self.block_size % 2:
            raise ValueError(f"--block_size must be even, got {self.block_size}")
        if self.cache and (self.bits != 4 or self.quant_type not in SAVED_QUANT_TYPES):
            raise ValueError(f"--cache keeps 4-bit weights of the types {' and '.join(SAVED_QUANT_TYPES)}")
        if self.quantize_embeddings and self.bits != 4:
            raise ValueError("--quantize_embeddings and --bits 16 contradict each other")
        if self.loraplus_lr_ratio is not None and self.loraplus_lr_ratio <= 0:
            raise ValueError(f"--loraplus_lr_ratio must be positive, got {self.loraplus_lr_ratio}")
        LoRAConfig(**self.lora_options())  # which says what cannot be
        if not self.dataset:
            raise ValueError("--dataset needs at least one file")
        if self.eval_dataset and self.val_size:
            raise ValueError("--eval_dataset and --val_size both say what to evaluate on; give one")

    def lora_options(self) -> dict[str, Any]:
        """Return what `add_lora` is to be told."""
        targets: list[str] | str = self.lora_target_modules
        if len(targets) == 1 and (targets[0] == "all-linear" or not re.fullmatch(r"[\w.]+", targets[0])):
            targets = targets[0]
        return dict(
            r=self.lora_r,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            target_modules=targets,
            rank_pattern=pairs("lora_rank_pattern", self.lora_rank_pattern, int),
            alpha_pattern=pairs("lora_alpha_pattern", self.lora_alpha_pattern, float),
            layers_to_transform=self.layers_to_transform,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init=self.init_lora_weights,
            modules_to_save=self.modules_to_save or [],
        )


def pairs(name: str, items: list[str] | None, kind: type[int] | type[float]) -> dict[str, Any]:
    """Return `key=number` texts as a dictionary; ValueError, naming the option, for what is none."""
    found: dict[str, Any] = {}
    for item in items or []:
        key, _, value = item.rpartition("=")
        try:
            found[key] = kind(value)
        except ValueError:
            key = ""
        if not key:
            raise ValueError(f"--{name} is a list such as q_proj=8 mlp.up_proj=16, got {item!r}")
    return found


# ---- preparation: every mistake a user can make shows here, before anything is written ---------------------


@dataclass
class Prepared:
    """What training starts from."""

    model: CausalLM
    train: list[Example]
    held_out: list[Example]
    folder: Path
    log: MetricsLog


def prepare(config: Config) -> Prepared:
    """Load model and data as configured and say what was found. Raises ValueError for the user's mistakes."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but training runs on one device so far; "
            "start it without torchrun"
        )
    folder = config.output_dir or next_run_folder(Path("runs"), config.model.resolve().name)
    require_unused(folder)
    device = choose_device(config.device)
    dtype = getattr(torch, config.dtype) if config.dtype else default_dtype(device)

    source = find_model(config.model)
    arch = read_architecture(source)
    tokenizer = Tokenizer(source)
    new_pieces = [tokenizer.encode(token) for token in config.new_tokens or []]
    new_ids = tokenizer.add_tokens(config.new_tokens or [])
    if new_ids and max(new_ids) >= arch.vocab_size:
        raise ValueError(
            f"--new_tokens: the model has rows for {arch.vocab_size} tokens and none to spare for "
            f"{tokenizer.token(max(new_ids))!r}; name tokens that it has, or take a model with more rows"
        )
    if tokenizer.vocab_size > arch.vocab_size:
        raise ValueError(
            f"{config.model}: tokenizer.json has {tokenizer.vocab_size} tokens, but config.json says "
            f"vocab_size = {arch.vocab_size}"
        )
    examples, report = load_dataset(config.dataset, tokenizer, config.max_seq_length)
    print(f"data      {report}")
    train, held_out = split(examples, config.val_size, config.seed)
    if config.eval_dataset:
        held_out, report = load_dataset(config.eval_dataset, tokenizer, config.max_seq_length)
        print(f"held out  {report}")
    held_out = held_out[: config.max_eval_samples]

    torch.manual_seed(config.seed)  # before the adapters are drawn
    with tqdm(unit="B", unit_scale=True, desc="loading", leave=False, disable=None) as bar:
        model = load_model(
            source,
            quant_type=config.quant_type if config.bits == 4 else None,
            double_quant=config.double_quant,
            block_size=config.block_size,
            device=device,
            dtype=dtype,
            progress=lambda read, total: show_progress(bar, read, total),
            quantize_embeddings=config.quantize_embeddings,
            cache=config.cache,
        )
    print(f"model     {config.model}: {describe_size(model, config.quant_type)}")
    if config.bits == 4 and config.quant_type not in SAVED_QUANT_TYPES:
        saved = " and ".join(SAVED_QUANT_TYPES)
        print(f"          {config.quant_type} is for comparison: of 4-bit weights only {saved} can be saved")
    chosen = "as asked" if config.dtype else "what this hardware does well"
    print(f"compute   {str(dtype).removeprefix('torch.')} on {device} ({chosen})")
    options = config.lora_options()
    if new_ids:
        options["trainable_token_indices"] = {"embed_tokens": new_ids, "lm_head": new_ids}
    adapted = add_lora(model, base=source, **options)
    start_new_tokens(model, new_pieces)
    model.model.gradient_checkpointing = config.gradient_checkpointing
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"adapters  rank {config.lora_r} on {len(adapted)} layers: {trained:,} parameters to train")
    if LoRAConfig(**options).is_residual:
        print(f"          the base's weights are what {config.init_lora_weights} has left of them")

    require_unused(folder)  # again: loading takes a while, and another run may have come first
    folder.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(folder)
    write_atomically(folder / "config.yaml", to_yaml(config).encode())
    write_atomically(folder / "environment.json", as_json(environment(device, dtype)))
    if new_ids:
        tokenizer.save(folder)
    return Prepared(model, train, held_out, folder, log)


@torch.no_grad()
def start_new_tokens(model: CausalLM, pieces: list[list[int]]) -> None:
    """Let each new token's rows start as the mean of the rows of the tokens that it was before."""
    for module in (model.model.embed_tokens, model.lm_head) if pieces else ():
        assert isinstance(module, TrainedTokens)
        for row, ids in zip(module.rows.get_parameter("weight"), pieces, strict=True):
            row.copy_(F.embedding(torch.tensor(ids, device=model.device), module.weight).float().mean(0))


def choose_device(name: str | None) -> torch.device:
    """Return the device named, or an accelerator if there is one; ValueError if it is not there."""
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None
    return device


def describe_size(model: CausalLM, quant_type: str) -> str:
    """Return a line on how many parameters a model has and how many bits the quantized ones take."""
    total = sum(parameter.numel() for parameter in model.parameters())
    quantized, held = quantized_size(model)
    if not quantized:
        return f"{total:,} parameters, none quantized"
    share = f"{quantized:,} of {total:,} parameters in {quant_type.upper()}"
    return f"{share}, {8 * held / quantized:.3f} bits each ({held / 1e6:.1f} MB)"


def show_progress(bar: tqdm, read: int, total: int) -> None:
    """Move a progress bar to `read` of `total` bytes."""
    bar.total = total
    bar.update(read - bar.n)


def as_json(value: Any) -> bytes:
    """Return a value as indented JSON text."""
    return (json.dumps(value, indent=2) + "\n").encode()


# ---- training ----------------------------------------------------------------------------------------------


def micro_batches(examples: list[Example], config: Config) -> Iterator[tuple[float, list[Batch]]]:
    """Yield, for each optimizer step without end, the epochs passed after it and its micro-batches."""
    size = config.per_device_train_batch_size
    step_size = size * config.gradient_accumulation_steps
    for epoch in itertools.count():
        order = shuffled(len(examples), config.seed, epoch)
        for start in range(0, len(order), step_size):
            chosen = [examples[i] for i in order[start : start + step_size]]
            batches = [collate(chosen[i : i + size]) for i in range(0, len(chosen), size)]
            yield epoch + (start + len(chosen)) / len(order), batches


def rate_factor(config: Config, total_steps: int, step: int) -> float:
    """Return what the peak learning rate is multiplied by in a step, counted from 0."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    rest = (total_steps - step) / max(total_steps - config.warmup_steps, 1)  # 1 down to nearly 0
    return {"constant": 1.0, "linear": rest, "cosine": 0.5 - 0.5 * math.cos(math.pi * rest)}[
        config.lr_scheduler_type
    ]


@torch.no_grad()
def evaluate(model: CausalLM, examples: list[Example], batch_size: int) -> float:
    """Return the mean loss per supervised token of examples that are not trained on."""
    model.eval()
    total, supervised = 0.0, 0
    for start in tqdm(range(0, len(examples), batch_size), desc="evaluating", leave=False, disable=None):
        batch = collate(examples[start : start + batch_size])
        hidden = model.model(batch.input_ids.to(model.device), batch.lengths)
        total += supervised_loss(hidden, batch.targets.to(model.device), model.lm_head).item()
        supervised += batch.supervised
    model.train()
    return total / supervised


def train(config: Config, prepared: Prepared) -> None:
    """Run the training loop and write the adapter."""
    model, folder, log = prepared.model, prepared.folder, prepared.log
    device = model.device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = PagedAdamW(
        parameter_groups(model, config.learning_rate, config.weight_decay, config.loraplus_lr_ratio),
        betas=(0.9, config.adam_beta2),
    )
    examples_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(prepared.train) / examples_per_step)
    total_steps = config.max_steps or max(1, math.ceil(config.num_train_epochs * steps_per_epoch))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(config, total_steps, step)
    )
    num_tokens = supervised_tokens = 0
    began = window_began = time.perf_counter()
    window_tokens = 0

    def log_evaluation(step: int) -> None:
        if prepared.held_out:
            loss = evaluate(model, prepared.held_out, examples_per_step)
            log.write({"step": step, "eval_loss": loss, "eval_perplexity": math.exp(loss)})
            tqdm.write(f"step {step}: held-out loss {loss:.4f}, perplexity {math.exp(loss):.3f}")

    log_evaluation(step=0)
    model.train()
    steps = itertools.islice(micro_batches(prepared.train, config), total_steps)
    with tqdm(total=total_steps, desc="training", unit="step") as bar:
        for step, (epoch, batches) in enumerate(steps, start=1):
            supervised = sum(batch.supervised for batch in batches)
            loss = 0.0
            for batch in batches:
                hidden = model.model(batch.input_ids.to(device), batch.lengths)
                summed = supervised_loss(hidden, batch.targets.to(device), model.lm_head)
                # Divided by the answers' tokens of the whole step, so that every one of them weighs the same.
                (summed / supervised).backward()
                loss += summed.item() / supervised
            grad_norm = float(torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or math.inf))
            if not math.isfinite(loss + grad_norm):
                raise FloatingPointError(
                    f"step {step}: loss {loss}, gradient norm {grad_norm}; lower --learning_rate"
                )
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

            num_tokens += sum(sum(batch.lengths) for batch in batches)
            window_tokens += sum(sum(batch.lengths) for batch in batches)
            supervised_tokens += supervised
            bar.update()
            if step % config.logging_steps == 0 or step == total_steps:
                now = time.perf_counter()
                row = {
                    "step": step,
                    "epoch": round(epoch, 4),
                    "loss": loss,
                    "grad_norm": grad_norm,
                    "learning_rate": learning_rate,
                    "tokens_per_second": window_tokens / (now - window_began),
                    "num_tokens": num_tokens,
                    "supervised_tokens": supervised_tokens,
                    "peak_memory_gib": peak_memory_gib(device),
                    "paged_bytes": optimizer.paged_bytes,
                    "eta_seconds": (now - began) / step * (total_steps - step),
                }
                log.write(row)
                window_began, window_tokens = now, 0
                bar.set_postfix_str(
                    f"loss {loss:.3f}, {row['tokens_per_second']:.0f} tokens/s, "
                    f"peak {row['peak_memory_gib']:.2f} GiB"
                )
            if config.eval_steps and step % config.eval_steps == 0 and step < total_steps:
                log_evaluation(step)
                window_began = time.perf_counter()
    log_evaluation(step=total_steps)
    log.close()
    save_adapter(model, folder, base_model=str(config.model))
    write_atomically(folder / "completed", b"")
    print(
        f"saved     {folder}, after {time.perf_counter() - began:.0f} s; "
        f"peak memory {peak_memory_gib(device):.2f} GiB"
    )


def main() -> None:
    """Read the configuration, prepare, train."""
    config = parse(Config, description=__doc__.split("\n\n")[0] if __doc__ else None)
    with user_errors():
        prepared = prepare(config)
    try:
        train(config, prepared)
    except KeyboardInterrupt:
        save_adapter(prepared.model, prepared.folder, base_model=str(config.model))
        print(f"\ninterrupted: the adapter as it stands is in {prepared.folder}", file=sys.stderr)
        sys.exit(130)
    except FloatingPointError as error:
        print(f"error: {error}; {prepared.folder} holds no adapter", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
