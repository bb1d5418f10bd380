"""Fine-tune a language model with QLoRA: 4-bit base, adapters on every linear layer, paged AdamW.

    python scripts/finetune.py --model MODEL_FOLDER --dataset train.jsonl
    python scripts/finetune.py --config scripts/configs/demo.yaml --max_steps 20
    python scripts/finetune.py --help

MODEL_FOLDER is an ordinary Hugging Face folder (config.json, safetensors, tokenizer.json). A dataset is files
or folders of JSON Lines, JSON, CSV, TSV, Parquet or text, each row of a file like one of
    {"prompt": ..., "completion": ...}
    {"question": ..., "answer": ...}
    {"instruction": ..., "input": ..., "output": ...}
    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    {"text": ...}
or whatever `convert`, below, makes one of these of. To see what will be learned, before the model is loaded:
    python scripts/finetune.py --model MODEL_FOLDER --dataset train.csv --inspect 3
The result is a run folder: an adapter that PEFT loads too, the configuration, and one line of metrics a step.

This file is meant to be edited. It reads from top to bottom: what can be set, then what is done.
"""

import contextlib
import errno
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minqlora import PagedAdamW, add_lora, load_adapter, load_model, save_adapter
from minqlora.adapter import WEIGHTS_FILE, adapter_tensors
from minqlora.architecture import read_architecture
from minqlora.batch import Batch, Examples, Part, collate, order, pack, split, tokenize
from minqlora.check import DataCheck, check, in_both, require_kept, show
from minqlora.checkpoint import default_dtype, find_model, quantized_size
from minqlora.codebook import QUANT_TYPES
from minqlora.data import FORMATS, DataReport
from minqlora.files import SAVED_QUANT_TYPES, open_safetensors, write_atomically
from minqlora.lora import (
    LoRAConfig,
    TrainedTokens,
    active_adapter,
    adapters_disabled,
    lora_layers,
    parameter_groups,
    store_adapters,
)
from minqlora.loss import supervised_loss
from minqlora.memory import Plan
from minqlora.model import CausalLM, compile_blocks, missing_compiler
from minqlora.report import RunningMean, Samples, prompts_in, prompts_of, write_report
from minqlora.run import (
    TRACKERS,
    MetricsLog,
    StopRequest,
    checkpoints,
    discard_after,
    environment,
    keep_freed_memory,
    memory_in_use,
    newest_checkpoint,
    next_run_folder,
    peak_memory_gib,
    prune_checkpoints,
    read_checkpoint,
    require_packages,
    require_unused,
    rng_state,
    save_checkpoint,
    set_rng_state,
    stop_requests,
)
from minqlora.tokenizer import Tokenizer
from options import REQUIRED, option, parse, to_yaml, user_errors
from planning import gib, plan_of, prepare_memory, what_saves_memory

# ---- configuration -----------------------------------------------------------------------------------------


@dataclass
class Config:
    """What can be set. Defaults are the paper's unless the help says why not."""

    model: Path = option(
        REQUIRED,
        "folder of the base model, or a name such as org/model that the local Hugging Face cache has",
        aliases=["model_name_or_path"],
    )
    dataset: list[Path] = option(
        REQUIRED,
        "files to learn from, or folders of them: .jsonl, .json, .csv, .tsv, .parquet; .txt and .md are text",
    )
    dataset_format: str = option(
        "auto", "what rows are; auto: what the keys of a file's first row say", choices=["auto", *FORMATS]
    )
    train_on_source: bool = option(False, "learn all tokens: prompts as well as answers")
    allow_dropped: bool = option(
        False, "go on even if more than a fifth of the rows have no answer, or lose it to --max_seq_length"
    )
    inspect: int | None = option(
        None, "check the data, show so many examples token by token, and stop", bare="3"
    )
    eval_dataset: list[Path] | None = option(
        None, "files or folders to evaluate on; none: --val_size splits some off"
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

    data_cache: Path = option(
        Path(f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/minqlora").expanduser(),
        "folder that keeps the tokenized data, so that the same files are tokenized once",
    )
    max_seq_length: int = option(1024, "longest example in tokens; longer ones are cut and counted")
    packing: bool = option(
        True, "fill rows of max_seq_length with whole examples, which do not see each other; false: one each"
    )
    per_device_train_batch_size: int = option(
        1, "rows in a micro-batch, laid end to end and never padded; with --packing false, examples"
    )
    gradient_accumulation_steps: int = option(16, "micro-batches an optimizer step")
    num_train_epochs: float = option(1.0, "passes over the data (the paper: 1 to 3, by dataset)")
    max_steps: int | None = option(None, "stop after so many optimizer steps, whatever num_train_epochs says")
    max_time: float | None = option(None, "save and stop after so many minutes")
    learning_rate: float = option(2e-4, "peak learning rate (the paper: 2e-4 up to 13B, 1e-4 above)")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = option(
        "constant", "schedule after the warmup"
    )
    warmup_steps: int = option(0, "optimizer steps from rate 0 to the peak")
    warmup_ratio: float = option(0.0, "the same as a share of all steps, where --warmup_steps is 0")
    max_grad_norm: float = option(0.3, "clip the gradient to this norm; 0: do not")
    adam_beta2: float = option(0.999, "decay of AdamW's mean of squared gradients, per step")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay, per step and unit of learning rate")
    optim: Literal["paged_adamw_32bit", "paged_adamw_8bit"] = option(
        "paged_adamw_32bit", "width of AdamW's moments: 8 bytes a trained parameter, or 2"
    )
    paged: Literal["auto", "always", "never"] = option(
        "auto", "moments in host memory; auto: once the device's memory runs short"
    )
    page_bytes: int = option(2**24, "bytes of each moment that visit the device at a time")
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop", "at a loss or gradient that is no number: stop, or leave the step out and go on"
    )

    gradient_checkpointing: Literal["true", "false", "offload"] = option(
        "true",
        "recompute each block in backward: a third slower, several times leaner; offload: keep the blocks' "
        "inputs in host memory meanwhile",
        bare="true",
    )
    compile: Literal["auto", "on", "off"] = option(
        "auto",
        "torch.compile the blocks, all but attention; auto: on CUDA with Triton, nowhere else",
    )
    adapter_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "dtype in which adapters and their gradients are kept; the moments stay as --optim says"
    )
    dtype: Literal["bfloat16", "float32"] | None = option(
        None, "compute dtype (default: what the hardware does well)"
    )
    device: str | None = option(None, "cpu, cuda, ... (default: an accelerator if there is one)")
    seed: int = option(0, "seed of the adapters, the order of the data, and dropout")
    deterministic: bool = option(
        False, "only kernels that give the same bits every time: slower on a GPU, as it is on a CPU anyway"
    )
    dry_run: bool = option(
        False, "say what the data are and what memory it takes, and stop: no weight is read, no run written"
    )

    resume_from_checkpoint: Path | None = option(
        None,
        "go on from this checkpoint folder, or from the newest whole one of --output_dir",
        bare="latest",
    )
    save_steps: int | None = option(
        None, "save a checkpoint every so many steps, and after the last (default: when stopped)"
    )
    save_total_limit: int = option(2, "checkpoints to keep; the best one stays besides")
    early_stopping_patience: int | None = option(
        None, "stop when so many evaluations in a row have not been the best"
    )
    load_best: bool = option(
        False, "save the adapter of the best evaluation, not of the last step; needs save_steps = eval_steps"
    )
    logging_steps: int = option(1, "write metrics every so many steps")
    eval_steps: int | None = option(
        None, "evaluate every so many steps (default: before the first and after the last)"
    )
    sample_steps: int | None = option(
        None, "let the model answer some prompts every so many steps, before the first and after the last too"
    )
    sample_prompts: list[str] | None = option(
        None, "those prompts (default: of the first two examples held out, else of the training data)"
    )
    sample_tokens: int = option(48, "longest such answer in tokens")
    report_to: list[str] = option(
        ["none"],
        "who else gets the metrics; wandb stays offline unless WANDB_MODE says otherwise",
        choices=["none", *TRACKERS],
    )

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything."""
        at_least = {
            0: "val_size lora_alpha lora_dropout num_train_epochs learning_rate warmup_steps max_grad_norm"
            " weight_decay seed max_time inspect",
            1: "lora_r max_eval_samples max_steps per_device_train_batch_size gradient_accumulation_steps"
            " logging_steps eval_steps save_steps save_total_limit early_stopping_patience"
            " sample_steps sample_tokens",
            4: "page_bytes",
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
            ("warmup_ratio", self.warmup_ratio, 1),
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
        try:
            LoRAConfig(**self.lora_options())  # which says what cannot be
        except ValueError as error:
            raise ValueError(re.sub(r"^init ", "--init_lora_weights ", str(error))) from None
        if not self.dataset:
            raise ValueError("--dataset needs at least one file")
        if self.eval_dataset and self.val_size:
            raise ValueError("--eval_dataset and --val_size both say what to evaluate on; give one")
        if self.resume_from_checkpoint == Path("latest") and not self.output_dir:
            raise ValueError("--resume_from_checkpoint latest needs --output_dir, the run to go on with")
        if self.early_stopping_patience and not self.eval_steps:
            raise ValueError("--early_stopping_patience needs --eval_steps")
        if (self.early_stopping_patience or self.load_best) and not (self.eval_dataset or self.val_size):
            name = "early_stopping_patience" if self.early_stopping_patience else "load_best"
            raise ValueError(f"--{name} needs something held out: --eval_dataset or --val_size")
        if self.load_best and (not self.eval_steps or self.save_steps != self.eval_steps):
            raise ValueError("--load_best needs --eval_steps, and --save_steps equal to it")
        if self.sample_prompts is not None and not self.sample_steps:
            raise ValueError("--sample_prompts needs --sample_steps, which says how often to answer them")
        if not all(self.sample_prompts or ["none given"]):
            raise ValueError("--sample_prompts: expected a text, got an empty one")
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ValueError(f"--report_to {' '.join(self.report_to)}: give none alone, or who is to get it")

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


# ---- the rows ----------------------------------------------------------------------------------------------


def convert(row: dict[str, Any]) -> dict[str, Any]:
    """Return what is learned from a row of the data: a row with the keys of one of the formats above.

    Change it to read data of your own: `return {"prompt": row["title"], "completion": row["abstract"]}`.
    Tokenized data is kept under the source of this function, so all that may change belongs in it.
    """
    return row


# ---- preparation: every mistake a user can make shows here, before anything is written ---------------------


@dataclass
class Run:
    """A run as it stands: what it works with, and how far it has come."""

    config: Config
    model: CausalLM
    optimizer: PagedAdamW
    train: Part
    held_out: Part
    n_held_out: int  # of which so many are evaluated
    folder: Path
    log: MetricsLog
    total_steps: int
    step: int = 0  # finished so far
    rng: dict[str, Any] = field(default_factory=rng_state)  # of the random generators, after that step
    updating: bool = False  # within an optimizer step: what is in memory then is of no step
    plan: Plan | None = None  # of memory
    memory_before: int = 0  # bytes that the process held before the model
    num_tokens: int = 0
    supervised_tokens: int = 0
    skipped_steps: int = 0
    samples: Samples | None = None  # where answers to fixed prompts go, if they are asked for
    smoothed_loss: RunningMean = field(default_factory=RunningMean)
    best_loss: float | None = None  # of the evaluations so far
    best_step: int | None = None
    evaluations_since_best: int = 0


FEW_STEPS = 10  # below which a run is told how to have more

# What a checkpoint keeps of a run besides tensors.
COUNTERS = (
    "step",
    "num_tokens",
    "supervised_tokens",
    "skipped_steps",
    "best_loss",
    "best_step",
    "evaluations_since_best",
)
# Options that may differ when a run goes on: they do not change what a step computes.
MAY_CHANGE = {
    "allow_dropped",
    "inspect",
    "output_dir",
    "resume_from_checkpoint",
    "num_train_epochs",
    "max_steps",
    "max_time",
    "cache",
    "data_cache",
    "logging_steps",
    "eval_steps",
    "max_eval_samples",
    "save_steps",
    "save_total_limit",
    "early_stopping_patience",
    "load_best",
    "sample_steps",
    "sample_prompts",
    "sample_tokens",
    "report_to",
    "paged",
    "page_bytes",
    "on_nonfinite",
    "gradient_checkpointing",
    "dry_run",
}


def prepare(config: Config) -> Run:
    """Load model and data as configured and say what was found. Raises ValueError for the user's mistakes."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but training runs on one device so far; "
            "start it without torchrun"
        )
    require_packages([name for name in config.report_to if name != "none"])
    folder = config.output_dir or next_run_folder(Path("runs"), config.model.resolve().name)
    resumed = find_resumed(config)
    if resumed is None:
        require_unused(folder)
    else:
        folder = resumed[0].parent
    device = choose_device(config.device)
    dtype = getattr(torch, config.dtype) if config.dtype else default_dtype(device)

    source = find_model(config.model)
    tokenizer = Tokenizer(source)
    new_tokens = prepare_tokens(config, source, tokenizer)
    train, held_out, n_held_out, data_check = prepare_data(config, tokenizer)
    require_positions(data_check, read_architecture(source).max_positions)
    plan = prepare_memory(config, source, device, dtype, list(new_tokens))
    if config.dry_run:
        steps = count_steps(train, config)
        print(f"dry run   {steps:,} step{'s' * (steps != 1)} to do; no weight was read, and no run written")
        raise SystemExit(0)
    memory_before = memory_in_use(device)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS sums in another order without
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.seed)  # before the adapters are drawn
    model = prepare_model(config, source, device, dtype, new_tokens, resumed and resumed[0])
    optimizer = PagedAdamW(
        parameter_groups(model, config.learning_rate, config.weight_decay, config.loraplus_lr_ratio),
        betas=(0.9, config.adam_beta2),
        bits=8 if config.optim == "paged_adamw_8bit" else 32,
        paged=config.paged,
        page_bytes=config.page_bytes,
    )
    total_steps = count_steps(train, config)
    if config.max_steps is None and total_steps < FEW_STEPS:
        more = "a smaller --gradient_accumulation_steps or more --num_train_epochs gives more"
        print(f"note      {total_steps} optimizer step{'s' * (total_steps != 1)} in all: {more}")
    if resumed is None:
        require_unused(folder)  # again: loading takes a while, and another run may have come first
        folder.mkdir(parents=True, exist_ok=True)
        log = MetricsLog(folder)
        write_atomically(folder / "environment.json", as_json(environment(device, dtype)))
        write_atomically(folder / "data_check.json", as_json(data_check))
        if new_tokens:
            tokenizer.save(folder)
        run = Run(config, model, optimizer, train, held_out, n_held_out, folder, log, total_steps)
    else:
        path, state = resumed
        require_same(state, train, total_steps, has_ended=(folder / "completed").exists())
        with open_safetensors(path / "optimizer.safetensors") as file:
            optimizer.load_tensors({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        optimizer.paged_bytes = state["paged_bytes"]
        (folder / "completed").unlink(missing_ok=True)  # more steps of it were asked for
        discard_after(folder, state["step"])
        log = MetricsLog(folder, resumed_from=state["step"])
        counters = {name: state[name] for name in COUNTERS}
        run = Run(config, model, optimizer, train, held_out, n_held_out, folder, log, total_steps, **counters)
        set_rng_state(state["rng"])
        print(f"resumed   {path}")
    run.plan, run.memory_before = plan, memory_before
    kept = replace(config, output_dir=folder, resume_from_checkpoint=None)
    write_atomically(folder / "config.yaml", to_yaml(kept).encode())
    show_elsewhere(run, kept, tokenizer, resumed[1]["step"] if resumed else None)
    return run


def show_elsewhere(run: Run, config: Config, tokenizer: Tokenizer, resumed_from: int | None) -> None:
    """Open what is written besides the metrics: answers to prompts, TensorBoard, Weights & Biases."""
    if config.sample_steps:
        asked = config.sample_prompts
        examples = run.held_out if len(run.held_out) else run.train
        prompts = prompts_of(asked, tokenizer) if asked else prompts_in(examples, 2, tokenizer)
        run.samples = Samples(run.folder, prompts, tokenizer, config.sample_tokens, resumed_from)
    for name in config.report_to:
        if name != "none":
            run.log.trackers.append(TRACKERS[name](run.folder, asdict(config), resumed_from))


def require_same(state: dict[str, Any], examples: Part, total_steps: int, *, has_ended: bool) -> None:
    """Raise ValueError unless a run can go on from a checkpoint's state with these examples, so far.

    One that was killed after its last step goes on to its end.
    """
    if state["data"] != examples.key:
        raise ValueError(
            "--dataset: the files, the tokenizer or its chat template are not what the run began with; put "
            "them back, or begin a new run"
        )
    if state["step"] >= total_steps + (not has_ended):
        raise ValueError(
            f"the run has done {state['step']} of {total_steps} steps already; "
            "ask for more with --max_steps or --num_train_epochs"
        )


def find_resumed(config: Config) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint to go on from and its state, None if the run begins; ValueError if it cannot."""
    wanted = config.resume_from_checkpoint
    if wanted is None:
        return None
    folder = config.output_dir if wanted == Path("latest") else wanted.parent
    assert folder is not None  # `latest` needs --output_dir, says Config
    ended = folder / "completed"
    if ended.exists() and not (folder / f"checkpoint-{ended.read_text().strip()}").is_dir():
        raise ValueError(
            f"{folder}: that run has come to its end, and left no checkpoint there to go on from, as "
            "--save_steps does"
        )
    if wanted == Path("latest"):
        path, state, problems = newest_checkpoint(folder)
        for problem in problems:
            print(f"warning   {problem}; going on from {path.name} instead", file=sys.stderr)
    else:
        path, state = wanted, read_checkpoint(wanted)
        if config.output_dir and config.output_dir.resolve() != path.resolve().parent:
            raise ValueError(
                f"--output_dir {config.output_dir}: a run goes on in its own folder, {path.parent}"
            )
    before = read_yaml_config(path.parent / "config.yaml")
    for name, value in asdict(config).items():
        if name not in MAY_CHANGE and before.get(name, value) != value:
            raise ValueError(
                f"--{name} {value} would change the arithmetic of a run that began with {before[name]}; "
                "leave it as it was, or begin a new run"
            )
    return path, state


def read_yaml_config(path: Path) -> dict[str, Any]:
    """Return the configuration that a run was started with, by name, in the types of `Config`."""
    return asdict(parse(Config, ["--config", str(path)]))


def prepare_tokens(config: Config, source: Path, tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Add the new tokens to the tokenizer; return for the id of each the ids that its text was before.

    Raises ValueError if the model has no rows for them.
    """
    vocab_size = read_architecture(source).vocab_size
    pieces = [tokenizer.encode(token) for token in config.new_tokens or []]
    new_ids = tokenizer.add_tokens(config.new_tokens or [])
    if new_ids and max(new_ids) >= vocab_size:
        raise ValueError(
            f"--new_tokens: the model has rows for {vocab_size} tokens and none to spare for "
            f"{tokenizer.token(max(new_ids))!r}; name tokens that it has, or take a model with more rows"
        )
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{config.model}: the tokenizer has {tokenizer.vocab_size} tokens, but config.json says "
            f"vocab_size = {vocab_size}"
        )
    return dict(zip(new_ids, pieces, strict=True))


def prepare_data(config: Config, tokenizer: Tokenizer) -> tuple[Part, Part, int, dict[str, Any]]:
    """Return the examples to learn from, those held out, how many of these to evaluate, and what the check of
    all has found."""

    def read(paths: list[Path]) -> tuple[Examples, DataReport]:
        with tqdm(unit="B", unit_scale=True, desc="tokenizing", leave=False, disable=None) as bar:
            return tokenize(
                paths,
                tokenizer,
                config.max_seq_length,
                config.data_cache,
                dataset_format=config.dataset_format,
                train_on_source=config.train_on_source,
                convert=convert,
                progress=lambda done, total: show_progress(bar, done, total),
            )

    examples, report = read(config.dataset)
    learned_from = evaluated_on = check(examples, report, tokenizer)
    print_check("data", learned_from)
    train, held_out = split(examples, config.val_size, config.seed)
    if config.eval_dataset:
        others, report = read(config.eval_dataset)
        evaluated_on = check(others, report, tokenizer)
        print_check("held out", evaluated_on)
        held_out = Part.whole(others)
    if not config.allow_dropped and config.inspect is None:
        require_kept(learned_from.report, "--dataset")
        require_kept(evaluated_on.report, "--eval_dataset")
    numbers = learned_from.numbers() | {"held_out": len(held_out)}
    if len(held_out):
        numbers["held_out_also_learned"] = n_both = in_both(train, learned_from, held_out, evaluated_on)
        if n_both:
            print(
                f"warning   {n_both:,} of {len(held_out):,} held-out examples are learned from",
                file=sys.stderr,
            )
    if config.eval_dataset:
        numbers |= {f"held_out_{name}": value for name, value in evaluated_on.numbers().items()}
    return train, held_out, min(len(held_out), config.max_eval_samples or len(held_out)), numbers


def print_check(name: str, found: DataCheck) -> None:
    """Print what a dataset comes to, and what is probably not meant."""
    for line in found.lines():
        print(f"{name:10}{line}")
        name = ""
    for warning in found.warnings():
        print(f"warning   {warning}", file=sys.stderr)


def require_positions(data_check: dict[str, Any], max_positions: int) -> None:
    """Raise ValueError if an example is longer than what the model was made for."""
    longest = max(data_check["longest"], data_check.get("held_out_longest", 0))
    if longest > max_positions:
        raise ValueError(
            f"the longest example has {longest:,} tokens, more than the {max_positions:,} that the model was "
            f"made for (max_position_embeddings in config.json); --max_seq_length {max_positions} cuts them"
        )


def inspect(config: Config) -> None:
    """Print the check of the data, and some examples token by token; what is learned of them stands out."""
    source = find_model(config.model)
    tokenizer = Tokenizer(source)
    prepare_tokens(config, source, tokenizer)
    train, *_ = prepare_data(config, tokenizer)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for place in range(min(config.inspect or 0, len(train))):
        example = train[place]
        sizes = f"{len(example.input_ids):,} tokens, {example.supervised:,} of them learned"
        print(f"\nexample {train.row(place) + 1:,}: {sizes} ({'green' if colour else 'in [[ ]]'})")
        print(show(example, tokenizer, colour=colour))


def prepare_model(
    config: Config,
    source: Path,
    device: torch.device,
    dtype: torch.dtype,
    new_tokens: dict[int, list[int]],
    checkpoint: Path | None,
) -> CausalLM:
    """Load the base model, and put adapters on it: new ones, or those of a checkpoint."""
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
    if new_tokens:
        options["trainable_token_indices"] = dict.fromkeys(("embed_tokens", "lm_head"), list(new_tokens))
    if checkpoint is not None:
        adapted = load_adapter(model, checkpoint, base=source)
    else:
        adapted = add_lora(model, base=source, **options)
        start_new_tokens(model, list(new_tokens.values()))
    if config.adapter_dtype != "float32":
        store_adapters(model, getattr(torch, config.adapter_dtype))
    model.model.gradient_checkpointing = config.gradient_checkpointing != "false"
    model.model.offload = config.gradient_checkpointing == "offload"
    compiled, why = compile_choice(config, device)
    print(f"compile   {'on' if compiled else 'off'}: {why}")
    if compiled:
        compile_blocks(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"adapters  rank {config.lora_r} on {len(adapted)} layers: {trained:,} parameters to train")
    if LoRAConfig(**options).is_residual:
        print(f"          the base's weights are what {config.init_lora_weights} has left of them")
    return model


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


def compile_choice(config: Config, device: torch.device) -> tuple[bool, str]:
    """Return whether blocks are compiled, and the reason; ValueError if they are to be and cannot be."""
    missing = missing_compiler(device)
    if config.compile == "on" and missing:
        raise ValueError(f"--compile on: {missing} for {device}; install one, or leave it at auto")
    if config.compile != "auto":
        return config.compile == "on", "as asked"
    if device.type == "cpu":
        return False, "on a CPU eager is as fast here"
    if missing:
        return False, f"{missing} for {device}"
    if config.deterministic:  # how a kernel sums is found by timing, which may come out otherwise next time
        return False, "--deterministic"
    return device.type == "cuda", device.type.upper() if device.type == "cuda" else f"not tried on {device}"


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


def step_places(examples: Part, config: Config) -> Iterator[tuple[float, list[list[int]]]]:
    """Yield, for each optimizer step without end, the epochs passed after it and its micro-batches.

    A micro-batch is a list of places of examples. Nothing is read but lengths, so steps can be passed over.
    """
    size = config.per_device_train_batch_size
    for epoch in itertools.count():
        seen = 0
        rows = epoch_rows(examples, config, epoch)
        while chosen := list(itertools.islice(rows, size * config.gradient_accumulation_steps)):
            micro_batches = [sum(chosen[i : i + size], []) for i in range(0, len(chosen), size)]
            seen += sum(map(len, micro_batches))
            yield epoch + seen / len(examples), micro_batches


def epoch_rows(examples: Part, config: Config, epoch: int) -> Iterator[list[int]]:
    """Yield an epoch's rows: places of the examples that stand in each."""
    if config.packing:
        return pack(examples, config.max_seq_length, config.seed, epoch)
    return ([place] for place in order(len(examples), config.seed, epoch))


def count_steps(examples: Part, config: Config) -> int:
    """Return the number of optimizer steps of the run."""
    if config.max_steps:
        return config.max_steps
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    whole, rest = divmod(config.num_train_epochs, 1)
    steps = 0
    for epoch in range(int(whole) + (rest > 0)):
        in_epoch = math.ceil(sum(1 for _ in epoch_rows(examples, config, epoch)) / size)
        steps += in_epoch if epoch < whole else math.ceil(rest * in_epoch)
    return max(steps, 1)


def rate_factor(config: Config, total_steps: int, step: int) -> float:
    """Return what the peak learning rate is multiplied by in a step, counted from 0."""
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    rest = (total_steps - step) / max(total_steps - warmup, 1)  # 1 down to nearly 0
    return {"constant": 1.0, "linear": rest, "cosine": 0.5 - 0.5 * math.cos(math.pi * rest)}[
        config.lr_scheduler_type
    ]


def summed_loss(model: CausalLM, batch: Batch) -> torch.Tensor:
    """Return the cross entropy summed over a batch's supervised positions."""
    hidden = model.model(batch.input_ids.to(model.device), batch.lengths)
    return supervised_loss(hidden, batch.targets.to(model.device), model.lm_head)


@torch.no_grad()
def evaluate(model: CausalLM, examples: Part, count: int, max_tokens: int) -> float:
    """Return the mean loss per supervised token of the first `count` examples held out.

    A batch holds `max_tokens`, or a longer example alone: those of a micro-batch, so that an evaluation takes
    no more memory than training.
    """
    model.eval()
    total, supervised = 0.0, 0
    with tqdm(total=count, desc="evaluating", leave=False, disable=None) as bar:
        for places in batches_within(examples.lengths(range(count)), max_tokens):
            batch = collate([examples[place] for place in places])
            total += summed_loss(model, batch).item()
            supervised += batch.supervised
            bar.update(len(places))
    model.train()
    return total / supervised


def batches_within(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield places of examples in order, as many at a time as hold `max_tokens`, at least one."""
    places: list[int] = []
    held = 0
    for place, length in enumerate(lengths):
        if places and held + length > max_tokens:
            yield places
            places, held = [], 0
        places.append(place)
        held += length
    if places:
        yield places


def accumulate_gradients(model: CausalLM, batches: list[Batch]) -> float:
    """Run the micro-batches of a step forward and backward; return their mean loss per supervised token."""
    supervised = sum(batch.supervised for batch in batches)
    loss = 0.0
    for batch in batches:
        summed = summed_loss(model, batch)
        # Divided by the answers' tokens of the whole step, so that every one of them weighs the same.
        (summed / supervised).backward()
        loss += summed.item() / supervised
    return loss


def train(run: Run, stop: StopRequest) -> int:
    """Run the training loop and write the adapter. Returns the exit code."""
    config, model, optimizer, folder = run.config, run.model, run.optimizer, run.folder
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rates = [group["lr"] for group in optimizer.param_groups]
    first_step, total_steps = run.step, run.total_steps
    steps = itertools.islice(step_places(run.train, config), first_step, total_steps)
    began = window_began = time.perf_counter()
    window_tokens = 0
    norms: dict[str, float] = {}
    if run.step == 0:
        log_evaluation(run)
        log_samples(run)
    model.train()
    run.rng = rng_state()
    with step_bar(run.step, total_steps) as bar:
        for epoch, micro_batches in steps:
            if out_of_patience(run):
                tqdm.write(
                    f"step {run.step}: no better for {run.evaluations_since_best} evaluations, stopping"
                )
                break
            batches = [collate([run.train[place] for place in places]) for places in micro_batches]
            loss = accumulate_gradients(model, batches)
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
            grad_norm = float(norm)
            factor = rate_factor(config, total_steps, run.step)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            if math.isfinite(loss + grad_norm):
                torch.nn.utils.clip_grads_with_norm_(trained, config.max_grad_norm or math.inf, norm)
                run.updating = True
                optimizer.step()
                run.updating = False
            elif config.on_nonfinite == "skip":
                run.skipped_steps += 1
                tqdm.write(f"step {run.step + 1}: loss {loss}, gradient norm {grad_norm}: left out")
            else:
                raise FloatingPointError(describe_nonfinite(run, loss, grad_norm, micro_batches, batches))
            run.step += 1
            run.smoothed_loss.update(loss)
            tokens = sum(sum(batch.lengths) for batch in batches)
            run.num_tokens += tokens
            run.supervised_tokens += sum(batch.supervised for batch in batches)
            run.rng = rng_state()

            last = run.step == total_steps
            evaluating = last or (config.eval_steps is not None and run.step % config.eval_steps == 0)
            if evaluating:  # it may be the last step all the same, for want of patience
                norms = gradient_norms(model)
            optimizer.zero_grad()
            window_tokens += tokens
            bar.update()
            now = time.perf_counter()
            if run.step % config.logging_steps == 0 or last:
                row = {"step": run.step, "epoch": round(epoch, 4), "loss": loss, "grad_norm": grad_norm}
                row |= {
                    "learning_rate": rates[0] * factor,
                    "tokens_per_second": window_tokens / (now - window_began),
                    "num_tokens": run.num_tokens,
                    "supervised_tokens": run.supervised_tokens,
                    "peak_memory_gib": peak_memory_gib(model.device),
                    "paged_bytes": optimizer.paged_bytes,
                    "eta_seconds": (now - began) / (run.step - first_step) * (total_steps - run.step),
                }
                run.log.write(row)
                show_step(bar, row, run.smoothed_loss.mean)
                window_began, window_tokens = now, 0
            if last:
                write_adapter(run, folder)  # before the evaluation, which takes a while
            if evaluating:
                log_evaluation(run)
            if config.sample_steps and (last or run.step % config.sample_steps == 0):
                log_samples(run)
            window_began += time.perf_counter() - now  # which is no time of training
            if last:
                break
            out_of_time = config.max_time is not None and now - began >= 60 * config.max_time
            stopping = stop.number is not None or out_of_time
            if stopping or (config.save_steps and run.step % config.save_steps == 0):
                save(run)
            if stopping:
                bar.close()
                why = "out of time" if stop.number is None else "interrupted"
                go_on = resume_command(run)
                print(f"{why}: step {run.step} is saved; go on with\n  {go_on}", file=sys.stderr)
                return 0 if stop.number is None else stop.exit_code
    finish(run, norms)
    seconds, peak = time.perf_counter() - began, peak_memory_gib(model.device)
    print(f"saved     {folder}, after {seconds:.0f} s; peak memory {peak:.2f} GiB")
    print(f"talk      python scripts/chat.py --adapter {folder}")
    return 0


def finish(run: Run, norms: dict[str, float]) -> None:
    """Write what a run leaves at its end, and check it. norms: of the last gradients, by kind of layer."""
    folder = run.folder
    if run.samples and run.samples.step < run.step:  # stopped for want of patience
        log_samples(run)
    write_adapter(run, folder)
    if run.config.save_steps and folder / f"checkpoint-{run.step}" not in checkpoints(folder):
        save(run)  # from which it can be made longer
    print_sanity(run, norms)
    print_memory(run)
    if run.config.load_best:
        take_best(run)
    write_atomically(folder / "completed", f"{run.step}\n".encode())


def step_bar(step: int, total_steps: int) -> tqdm:
    """Return a progress bar of at most 100 columns; what `show_step` says stands behind it."""
    columns = min(100, shutil.get_terminal_size((100, 24)).columns)
    form = "step {n_fmt}/{total_fmt} |{bar}|{desc}"
    return tqdm(total=total_steps, initial=step, bar_format=form, ncols=columns)


def show_step(bar: tqdm, row: dict[str, Any], smoothed_loss: float) -> None:
    """Show a row of metrics behind the progress bar."""
    bar.set_description_str(
        f" loss {row['loss']:.3f} (mean {smoothed_loss:.3f}), {row['tokens_per_second']:.0f} tokens/s, "
        f"{row['peak_memory_gib']:.2f} GiB, {tqdm.format_interval(row['eta_seconds'])} left"
    )


# ---- what a run says and keeps -----------------------------------------------------------------------------


def log_evaluation(run: Run) -> None:
    """Evaluate, if there is anything held out; write the metrics and note whether this was the best."""
    if not run.n_held_out:
        return
    size = run.config.per_device_train_batch_size * run.config.max_seq_length
    loss = evaluate(run.model, run.held_out, run.n_held_out, size)
    run.log.write({"step": run.step, "eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))})
    tqdm.write(f"step {run.step}: held-out loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.3f}")
    run.evaluations_since_best += 1
    if run.step and (run.best_loss is None or loss < run.best_loss):
        run.best_loss, run.best_step, run.evaluations_since_best = loss, run.step, 0


def log_samples(run: Run) -> None:
    """Let the model answer the fixed prompts, if that is asked for; show the answers and keep them."""
    for prompt, text in run.samples.take(run.model, run.step) if run.samples else ():
        asked = " ".join(prompt.split())
        shown = f"... {asked[-28:]}" if len(asked) > 32 else asked
        answer = textwrap.shorten(text, 52, placeholder=" ...") or "(nothing)"
        tqdm.write(f"step {run.step}: {shown!r} -> {answer!r}")


def out_of_patience(run: Run) -> bool:
    """Return whether so many evaluations in a row have not been the best that the run is to end."""
    patience = run.config.early_stopping_patience
    return patience is not None and run.evaluations_since_best >= patience


def take_best(run: Run) -> None:
    """Make the adapter of the best evaluation the result, in place of the last step's."""
    if run.best_step in (None, run.step):
        return
    best = run.folder / f"checkpoint-{run.best_step}"
    try:
        read_checkpoint(best)
    except ValueError as error:
        print(f"warning   {error}; the adapter of the last step is the result", file=sys.stderr)
        return
    for path in best.glob("adapter_*"):
        write_atomically(run.folder / path.name, path.read_bytes())
    print(f"best      step {run.best_step}, held-out loss {run.best_loss:.4f}: its adapter is the result")


def write_adapter(run: Run, folder: Path) -> None:
    """Write the adapter as a PEFT folder."""
    save_adapter(run.model, folder, base_model=str(run.config.model))


def save(run: Run) -> None:
    """Write a checkpoint, from which the run goes on to the same bits, and delete old ones."""

    def write(folder: Path) -> None:
        write_adapter(run, folder)
        write_atomically(folder / "optimizer.safetensors", run.optimizer.tensors())

    state = {name: getattr(run, name) for name in COUNTERS}
    state |= {"data": run.train.key, "paged_bytes": run.optimizer.paged_bytes}
    save_checkpoint(run.folder, run.step, write, state)
    best = None if run.best_step is None else run.folder / f"checkpoint-{run.best_step}"
    prune_checkpoints(run.folder, run.config.save_total_limit, also=best)


def resume_command(run: Run) -> str:
    """Return the command line that goes on with a run."""
    config = str(run.folder / "config.yaml")
    return shlex.join([sys.executable, sys.argv[0], "--config", config, "--resume_from_checkpoint", "latest"])


def gradient_norms(model: CausalLM) -> dict[str, float]:
    """Return the norm of the gradient of each kind of layer's adapters."""
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            kind = name.split(".")[-2]
            squares[kind] = squares.get(kind, 0.0) + float(parameter.grad.square().sum())
    return {kind: math.sqrt(square) for kind, square in squares.items()}


def describe_nonfinite(
    run: Run, loss: float, grad_norm: float, micro_batches: list[list[int]], batches: list[Batch]
) -> str:
    """Return a line on where a loss or gradient that is no number comes from."""
    layer = find_nonfinite_output(run.model, batches) or find_nonfinite_gradient(run.model)
    rows = sorted(run.train.row(place) for places in micro_batches for place in places)
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    return (
        f"step {run.step + 1}: loss {loss}, gradient norm {grad_norm}, not finite first in {layer}, examples "
        f"{shown}; lower --learning_rate, or leave such steps out with --on_nonfinite skip"
    )


@torch.no_grad()
def find_nonfinite_output(model: CausalLM, batches: list[Batch]) -> str | None:
    """Return the path of the first layer that makes something else than numbers of the batches."""
    found: list[str] = []

    def watch(name: str, module: torch.nn.Module) -> Any:
        def look(module: torch.nn.Module, given: Any, output: Any) -> None:
            if torch.is_tensor(output) and not output.isfinite().all():
                found.append(name)

        return module.register_forward_hook(look)

    hooks = [watch(name, module) for name, module in model.named_modules()]
    for batch in batches:
        summed_loss(model, batch)
    for hook in hooks:
        hook.remove()
    return found[0] if found else None


def find_nonfinite_gradient(model: CausalLM) -> str:
    """Return the last parameter whose gradient is not finite: backward, it is the first."""
    bad = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    return bad[-1] if bad else "the loss"


@torch.no_grad()
def print_sanity(run: Run, norms: dict[str, float]) -> None:
    """Check that the adapter does something, and that what was saved is what was trained."""
    layers = lora_layers(run.model)
    if norms:
        print("gradient  " + ", ".join(f"{kind} {norm:.2g}" for kind, norm in norms.items()))
    idle = [name for name, layer in layers.items() if not layer.lora_B.any()]
    if idle:
        print(f"warning   {len(idle)} adapters still do nothing, the first on {idle[0]}", file=sys.stderr)
    if run.skipped_steps:
        print(f"warning   {run.skipped_steps} steps were left out: not finite", file=sys.stderr)
    batch = collate([run.train[0]])
    run.model.eval()
    on = summed_loss(run.model, batch).item() / batch.supervised
    with adapters_disabled(run.model):
        off = summed_loss(run.model, batch).item() / batch.supervised
    print(f"adapter   loss on an example of the training data {on:.4f}, without the adapter {off:.4f}")
    write_atomically(
        run.folder / "sanity.json",
        as_json(
            {
                "loss_with_adapter": on,
                "loss_without_adapter": off,
                "idle_adapters": len(idle),
                "skipped_steps": run.skipped_steps,
                "gradient_norms": norms,
            }
        ),
    )
    adapter = active_adapter(run.model)
    assert adapter is not None
    with open_safetensors(run.folder / WEIGHTS_FILE) as file:
        for key, tensor in adapter_tensors(adapter).items():
            if not torch.equal(file.get_tensor(key), tensor):
                raise OSError(errno.EIO, f"{key} reads otherwise than it was written", str(run.folder))


def print_memory(run: Run) -> None:
    """Print what memory was planned and what was measured; keep both in the run's `memory.json`."""
    plan = run.plan
    assert plan is not None
    measured = max(int(peak_memory_gib(run.model.device) * 2**30) - run.memory_before, 0)
    is_process = run.model.device.type == "cpu"
    what = ", the growth of the process: an allocator keeps what was freed" if is_process else ""
    print(f"memory    planned {gib(plan.total)}, measured {gib(measured)}{what}")
    kept = {"planned_bytes": plan.total, "measured_bytes": measured, "planned": plan.parts}
    kept |= {"fullest_at": plan.instant, "planned_at": plan.instants, "on_host_bytes": plan.host}
    write_atomically(run.folder / "memory.json", as_json(kept))


# ---- the command -------------------------------------------------------------------------------------------


def main() -> None:
    """Read the configuration, prepare, train."""
    config = parse(Config, description=__doc__.split("\n\n")[0] if __doc__ else None)
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal has the characters of every dataset
    try:
        with user_errors():
            if config.inspect is not None:
                return inspect(config)
            run = prepare(config)
    except KeyboardInterrupt:
        print("\ninterrupted before the first step", file=sys.stderr)
        sys.exit(130)
    code, why = 1, ""
    try:
        with stop_requests() as stop:
            code = train(run, stop)
    except (FloatingPointError, OSError, MemoryError, RuntimeError) as error:
        why = f"error: {explain(run, error)}"
    leave_report(run)
    if why:
        print(why, file=sys.stderr)
    if code:
        sys.exit(code)


def leave_report(run: Run) -> None:
    """Write the page and the picture of a run that has ended, however; a failure here is only told."""
    try:
        run.log.close()
        print(f"report    {write_report(run.folder)[0]}")
    except Exception as error:  # of whatever kind: the run itself is done and saved
        what = " ".join(str(error).split()) or type(error).__name__
        print(f"warning   no report: {what}; scripts/report.py {run.folder} tries again", file=sys.stderr)


def explain(run: Run, error: BaseException) -> str:
    """Save what can be saved, and return a line on what ended the run, what to change and where it stands.

    Raises the error again if it is none that a user can do something about.
    """
    if isinstance(error, OSError):  # of a disk that is full, in the middle of a save perhaps: nothing to save
        what = f"{error.filename or run.folder}: {error.strerror or error}"
    else:
        what = str(error) if isinstance(error, FloatingPointError) else describe_out_of_memory(run, error)
        rescue(run)
    kept = checkpoints(run.folder)
    if not kept:
        return f"{what}; there is no checkpoint to go on from"
    return f"{what}; {kept[0].name} is whole; to go on from there: {resume_command(run)}"


def rescue(run: Run) -> None:
    """Save the last step that was finished, if that can be done and has not been done yet."""
    run.optimizer.zero_grad()
    if run.step and not run.updating and run.folder / f"checkpoint-{run.step}" not in checkpoints(run.folder):
        set_rng_state(run.rng)  # a part of the step that failed has drawn from the generators
        with contextlib.suppress(OSError, MemoryError):
            save(run)


def describe_out_of_memory(run: Run, error: BaseException) -> str:
    """Return a line on what to change; raises the error again if it is of another kind."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    if not isinstance(error, kinds) and "can't allocate memory" not in str(error):  # PyTorch's, on a CPU
        raise error
    config, model = run.config, run.model
    where = find_model(config.model), model.device, model.compute_dtype
    plan = run.plan or plan_of(config, *where, [])
    largest = f"{plan.largest}, {gib(plan.parts[plan.largest])} of about {gib(plan.total)}"
    what = next(iter(str(error).splitlines()), type(error).__name__)
    advice = ", ".join(what_saves_memory(config, *where))
    return f"out of memory after step {run.step} ({what}); the largest part is {largest}; try {advice}"


if __name__ == "__main__":
    main()
