"""Merge an adapter into its base: an ordinary 16-bit model folder that needs neither minqlora nor PEFT.

    python scripts/merge.py --adapter runs/demo-1 --output_dir merged
    python scripts/merge.py --adapter runs/demo-1 --output_dir merged --onto dequantized --verify text.txt
    python scripts/merge.py --adapter PEFT_FOLDER --output_dir merged --base MODEL_FOLDER

An adapter of QLoRA was trained on weights that 4 bits had rounded, and what it learned makes up for that
rounding too. So there are two bases to merge it onto: `original`, the 16-bit weights, which are the better
model, and `dequantized`, the rounded ones, which are what was trained. Which is better, --verify says: in a
second process it runs the live model, as trained, and then the merged one over a sample, and compares their
predictions token by token. Nothing is ever rounded to 4 bits again: that would change what was learned.

One tensor is in memory at a time. The result has the base's names, and its tokenizer, chat template and
generation settings.
"""

import gc
import json
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import quantize
from chat import fill_as_trained, run_config
from finetune import as_json, choose_device, show_progress
from minqlora import NF4Tensor, load_adapter, load_model
from minqlora.adapter import CONFIG_FILE, public_name
from minqlora.architecture import both_spellings, read_config
from minqlora.checkpoint import Quantization, default_dtype, find_model, linear_weights, open_model
from minqlora.codebook import QUANT_TYPES
from minqlora.data import IGNORE, DataReport, Recipe, encode_rows, rows_of
from minqlora.files import Checkpoint, companions, write_atomically, write_checkpoint
from minqlora.lora import Adapter, LoRALinear, TrainedTokens, active_adapter, decoded, leading_part
from minqlora.model import CausalLM
from minqlora.tokenizer import Tokenizer
from options import REQUIRED, option, parse, user_errors

REPORT_FILE = "merge_report.json"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass
class Config:
    """What can be set."""

    adapter: Path = option(
        REQUIRED, "adapter folder: a run of finetune.py, one of its checkpoints, or PEFT's"
    )
    output_dir: Path = option(REQUIRED, "folder to write, new or empty")
    base: Path | None = option(
        None,
        "folder of the base model, or a name that the local Hugging Face cache has "
        "(default: the one the adapter was trained on)",
    )
    onto: Literal["original", "dequantized"] = option(
        "original", "the 16-bit weights, or what 4 bits made of them, as in training"
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = option(
        None, "dtype of the merged weights (default: the base's if it has 16 bits, else bfloat16)"
    )
    max_shard_size: str = option("5GB", "largest file, in MB or GB (10**9 bytes)")

    bits: Literal[4, 16] | None = option(
        None, "bits of the base as it was trained on (default: as the run says, else 4)"
    )
    quant_type: str | None = option(
        None, "levels of its code (default: as the run says, else nf4)", choices=list(QUANT_TYPES)
    )
    double_quant: bool | None = option(
        None, "its scales were quantized too (default: as the run says, else true)"
    )
    block_size: int | None = option(
        None, "its weights that shared a scale (default: as the run says, else 64)"
    )
    quantize_embeddings: bool | None = option(
        None, "its embeddings and head in 4 bits too (default: as the run says, else false)"
    )

    verify: Path | None = option(
        None, "file of text, or of rows: compare live and merged model on it afterwards, in a second process"
    )
    verify_tokens: int = option(4096, "so much of it, in tokens")
    max_seq_length: int = option(1024, "tokens of a row of it")
    compute_dtype: Literal["bfloat16", "float32"] | None = option(
        None, "compute dtype of that (default: what the hardware does well)"
    )
    device: str | None = option(None, "cpu, cuda, ... for that (default: an accelerator if there is one)")

    def __post_init__(self) -> None:
        """Take from the adapter's run what was not given."""
        run = self.run()
        fill_as_trained(self, run)
        if self.base is None:
            self.base = Path(run["model"]) if run else trained_on(self.adapter)
        if self.onto == "dequantized" and self.bits == 16:
            raise ValueError(
                f"{self.adapter}: was trained on 16 bits (--bits 16); merge it onto the original"
            )
        if self.verify is not None and not self.verify.is_file():
            raise ValueError(f"{self.verify}: no such file to verify on")
        if self.verify_tokens < 2 or self.max_seq_length < 2:
            raise ValueError("--verify_tokens and --max_seq_length must be at least 2")
        quantize.shard_bytes(self.max_shard_size)

    def run(self) -> dict[str, Any]:
        """Return the configuration of the run that made the adapter, empty if it is not known."""
        return run_config(self.adapter)

    def quantization(self) -> Quantization:
        """Return how the base was quantized in training."""
        assert self.quant_type and self.block_size and self.double_quant is not None  # by __post_init__
        return Quantization(self.quant_type, self.double_quant, self.block_size)


def trained_on(adapter: Path) -> Path:
    """Return the base that a PEFT folder names; ValueError if it names none."""
    path = adapter / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{path}: not found; an adapter folder has it")
    try:
        name = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(name, str) or not name:
        raise ValueError(f"{path}: names no base model; give --base")
    return Path(name)


# ---- merging -----------------------------------------------------------------------------------------------


class Merge:
    """A base, tensor by tensor, with an adapter merged into it."""

    def __init__(self, config: Config):
        assert config.base is not None  # by Config.__post_init__
        self.model, self.source = open_model(config.base)
        # Of a base in 4 bits there is no other kind.
        self.dequantized = config.onto == "dequantized" or self.source.has_quantized
        self.names = [name for name, _ in self.model.named_parameters()]
        quantizable = set(linear_weights(self.model))
        if config.quantize_embeddings:
            quantizable |= {f"{EMBEDDING}.weight", f"{HEAD}.weight"}
        self.quantizable = set() if self.source.has_quantized else quantizable
        self.quantization = config.quantization()
        # With the base at hand, what PiSSA took out of it comes back as that; else the adapter holds it too.
        load_adapter(self.model, config.adapter, base=self.source.folder if self.dequantized else None)
        adapter = active_adapter(self.model)
        assert adapter is not None
        self.adapter: Adapter = adapter
        first = next(path for path, module in adapter.modules.items() if isinstance(module, LoRALinear))
        self.dtype = self.source.dtype(f"{first}.weight")
        if self.dtype == torch.float32:
            self.dtype = torch.bfloat16
        if config.dtype is not None:
            self.dtype = getattr(torch, config.dtype)

    @property
    def is_untied(self) -> bool:
        """Whether head and embedding were one and are so no longer."""
        head = self.adapter.modules.get(HEAD)
        follows = isinstance(head, TrainedTokens) and head.is_tied
        return (
            self.model.arch.tie_embeddings
            and not follows
            and bool({EMBEDDING, HEAD} & set(self.adapter.modules))
        )

    def plan(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return what will be written."""
        plan = {name: (self.dtype, self.source.shape(name)) for name in self.names}
        if self.is_untied:
            plan[f"{HEAD}.weight"] = plan[f"{EMBEDDING}.weight"]
        return plan

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the merged model, one at a time."""
        for name in self.source.in_file_order(self.names):
            yield name, self._cast(name, self._merged(name, self._base(name)))
        if self.is_untied:
            base = self._base(f"{EMBEDDING}.weight")
            yield f"{HEAD}.weight", self._cast(f"{HEAD}.weight", self._merged(f"{HEAD}.weight", base))

    @torch.no_grad()
    def _base(self, name: str) -> Tensor:
        # A tensor of the base that is merged onto, in 16 or 32 bits.
        tensor = self.source.read(name)
        layer = self.adapter.modules.get(name.removesuffix(".weight"))
        if isinstance(layer, LoRALinear) and self.adapter.config.is_residual:
            tensor = decoded(tensor)
            A, B = layer.initial_A, layer.initial_B
            if A is None or B is None or A.is_meta:  # PEFT's own folder does not say, but how to find it
                A, B = leading_part(tensor, self.adapter.config.init, layer.r, layer.scaling)
            tensor.addmm_(B, A, alpha=-layer.scaling)
        if isinstance(tensor, NF4Tensor):
            return tensor.dequantize(torch.float32)
        if self.dequantized and name in self.quantizable:
            return self.quantization(tensor).dequantize(torch.float32)
        return tensor

    @torch.no_grad()
    def _merged(self, name: str, base: Tensor) -> Tensor:
        path, _, child = name.rpartition(".")
        module = self.adapter.modules.get(path)
        if module is None or (isinstance(module, LoRALinear) and child != "weight"):
            return base
        if isinstance(module, LoRALinear | TrainedTokens):
            return module.merged(base)
        return module.get_parameter(child).detach()

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        cast = tensor.to(self.dtype)
        if not torch.stack(cast.aminmax()).isfinite().all():  # which are found without a copy
            raise ValueError(f"{name}: has numbers that {self.dtype} has not; choose another --dtype")
        return cast

    def config(self) -> dict[str, Any]:
        """Return the `config.json` of the merged model."""
        config = read_config(self.source.folder)
        config.pop("quantization_config", None)
        config.pop("torch_dtype", None)
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        if self.is_untied:
            config["tie_word_embeddings"] = False
        return both_spellings(config)


def write_merged(config: Config) -> dict[str, Any]:
    """Write the merged model; return what was done."""
    merge = Merge(config)
    with tqdm(unit="B", unit_scale=True, desc="merging", leave=False, disable=None) as bar:
        write_checkpoint(
            config.output_dir,
            merge.plan(),
            merge.tensors(),
            # The run's tokenizer, if it has one, knows the tokens that were added.
            files={"config.json": as_json(merge.config())}
            | companions(merge.source.folder)
            | companions(config.adapter),
            max_shard_bytes=quantize.shard_bytes(config.max_shard_size),
            progress=lambda written, total: show_progress(bar, written, total),
        )
    return {
        "adapter": config.adapter.resolve().name,
        "base": public_name(str(config.base)),
        "onto": "dequantized" if merge.dequantized else "original",
        "dtype": str(merge.dtype).removeprefix("torch."),
        "merged_modules": len(merge.adapter.modules),
        "untied": merge.is_untied,
    }


# ---- comparing ---------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What a model makes of the sample: the states before its head, and the head."""

    hidden: list[Tensor]  # (n, D) of each row, where the next token counts
    head: nn.Module


def read_sample(config: Config, tokenizer: Tokenizer) -> list[tuple[Tensor, Tensor]]:
    """Return the rows to compare on: ids (1, T), and the next token (T - 1,), IGNORE where it does not count.

    Of rows the answers count, of a text everything.
    """
    assert config.verify is not None
    if config.verify.suffix in (".txt", ".md"):
        windows = quantize.read_windows(config.verify, tokenizer, config.verify_tokens, config.max_seq_length)
        return [(window[None], window[1:]) for window in windows]
    rows: list[tuple[Tensor, Tensor]] = []
    room = config.verify_tokens
    recipe = Recipe(config.max_seq_length)
    for example in encode_rows(rows_of([config.verify]), tokenizer, recipe, DataReport()):
        if rows and len(example.input_ids) > room:
            break
        room -= len(example.input_ids)
        rows.append((torch.tensor([example.input_ids]), torch.tensor(example.labels[1:])))
    if not rows:
        raise ValueError(f"{config.verify}: has no answer to compare on")
    return rows


@torch.inference_mode()
def look(model: CausalLM, rows: list[tuple[Tensor, Tensor]], what: str) -> Seen:
    """Return what a model makes of the sample."""
    hidden = []
    for ids, targets in tqdm(rows, desc=what, leave=False, disable=None):
        states = model.model(ids.to(model.device))[0, :-1]
        hidden.append(states[(targets != IGNORE).to(model.device)])
    return Seen(hidden, model.lm_head)


@torch.inference_mode()
def compare(live: Seen, merged: Seen, rows: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Return how far two models are apart, per token: KL divergence in nats, share of tokens on which their
    first choices agree, and both perplexities."""
    divergence, agreed, losses, count, worst = 0.0, 0, [0.0, 0.0], 0, 0.0
    for i, (_, targets) in enumerate(rows):
        wanted = targets[targets != IGNORE].to(live.hidden[i].device)
        chunks = zip(
            *(states.split(256) for states in (live.hidden[i], merged.hidden[i], wanted)), strict=True
        )
        for ours, theirs, ids in chunks:
            p, q = (
                seen.head(states).float().log_softmax(-1) for seen, states in ((live, ours), (merged, theirs))
            )
            apart = (p.exp() * (p - q)).sum(-1)  # (n,)
            divergence, worst = divergence + apart.sum().item(), max(worst, apart.max().item())
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            losses = [
                loss + F.nll_loss(x, ids, reduction="sum").item()
                for loss, x in zip(losses, (p, q), strict=True)
            ]
            count += len(ids)
    return {
        "tokens": count,
        "kl_per_token": divergence / count,
        "kl_largest": worst,
        "same_first_choice": agreed / count,
        "perplexity_live": math.exp(losses[0] / count),
        "perplexity_merged": math.exp(losses[1] / count),
    }


def verify(config: Config) -> dict[str, Any]:
    """Run the live model, as trained, and the merged one over the sample, and compare; one is in memory at a
    time."""
    assert config.base is not None
    device = choose_device(config.device)
    dtype = getattr(torch, config.compute_dtype) if config.compute_dtype else default_dtype(device)
    rows = read_sample(config, Tokenizer(config.output_dir))
    folder, quantization = find_model(config.base), config.quantization()
    in_4_bits = config.bits == 4 or Checkpoint(folder).has_quantized
    live = load_model(
        folder,
        quant_type=quantization.quant_type if in_4_bits else None,
        double_quant=quantization.double_quant,
        block_size=quantization.block_size,
        quantize_embeddings=bool(config.quantize_embeddings),
        device=device,
        dtype=dtype,
    )
    load_adapter(live, config.adapter, base=folder)
    seen = look(live, rows, "live model")
    del live
    gc.collect()  # or its blocks, which refer to each other, would stay beside the next model
    merged = load_model(config.output_dir, quant_type=None, device=device, dtype=dtype)
    return compare(seen, look(merged, rows, "merged model"), rows)


def main() -> None:
    """Merge, and compare."""
    config = parse(Config, description=__doc__.split("\n\n")[0] if __doc__ else None)
    with user_errors():
        report = write_merged(config)
        write_atomically(config.output_dir / REPORT_FILE, as_json(report))
        print(f"saved     {config.output_dir}, {report['dtype']}")
        print(
            f"          {report['merged_modules']} modules of {config.adapter} on the {report['onto']} base"
        )
        if report["untied"]:
            print("          embedding and head were one matrix and are two now; config.json says so")
        if config.run().get("init_lora_weights") == "loftq" and report["onto"] == "original":
            print("note      the adapter began as LoftQ, which makes up for rounding: use --onto dequantized")
        if config.verify is not None:
            # A process of its own has the memory that merging took, and sees only what is on the disk.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found = pool.submit(verify, config).result()
            write_atomically(config.output_dir / REPORT_FILE, as_json(report | {"verify": found}))
            print(
                f"verify    KL divergence {found['kl_per_token']:.6f} nats a token (largest "
                f"{found['kl_largest']:.4f}), {found['same_first_choice']:.2%} same first choice,"
            )
            print(
                f"          perplexity {found['perplexity_live']:.4f} live, "
                f"{found['perplexity_merged']:.4f} merged, on {found['tokens']:,} tokens"
            )


if __name__ == "__main__":
    main()
