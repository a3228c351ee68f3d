"""What the work of the stages costs on this machine at a model's own sizes: their own trainers, on random rows.

Weights are random: what a step costs does not depend on them. Seconds are of one row or pair, memory of a step whose
rows are the longest that the params allow.
"""

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedConfig, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig

from dsa import DSAForCausalLM
from dsa.convert import config_of
from dsa.data.rows import Collator
from dsa.evaluation.predictions import changed, greedy, predict
from dsa.families import family
from dsa.training.dpo import DSADPOTrainer, score_pair
from dsa.training.trainer import DSATrainer, freeze
from stages import arms
from stages.common import forget_peak, peak_memory
from stages.cost import DEVICE
from stages.params import Indexer, Params, Training
from stages.training import split_batch, trainer_options

DENSE = {"attention_mode": "dense"}
KINDS = {  # of training: what the model's config has, and which halves are frozen; in DPO, the indexer as by default
    "dense": (DENSE, {"backbone": False, "indexer": True}),
    "warmup": (DENSE, {"backbone": True, "indexer": False}),
    "sparse": (arms.sparse("indexer"), {"backbone": False, "indexer": False}),
    "window": (arms.sparse("window"), {"backbone": False, "indexer": True}),
    "dpo@dense": (DENSE, {"backbone": False, "indexer": True}),
    "dpo@dsa": (arms.sparse("indexer"), {"backbone": False, "indexer": True}),
}
CHOICES = {"dense": DENSE} | {name: arms.sparse(name) for name in ("indexer", "window", "oracle")}  # of keys
TOKENIZER = "data/base"  # of TRL, which wants one; the pairs are tokens already
LONG = 10  # seconds, of which what happens once is no part worth a repetition
GENERATED = 8  # tokens whose time is taken


@dataclass
class Cost:
    """rows: {length in tokens: seconds}; once: seconds of a step whatever its rows, the optimizer's; peak: bytes, None
    where a process cannot tell."""

    rows: dict[int, float] = field(default_factory=dict)
    once: float = 0.0
    peak: int | None = None

    def seconds(self, length: float) -> float:
        """Of a row, between and beyond the measured lengths by a n + b n^2: products with weights, and attention."""
        (short, fast), *more = sorted(self.rows.items())
        if not more:
            return fast * length / short
        long, slow = more[0]
        square = max(0.0, (slow / long - fast / short) / (long - short))
        return length * max(0.0, fast / short - square * short) + square * length**2


class Clock(TrainerCallback):
    """Seconds of each step, of its rows and of the optimizer."""

    def __init__(self):
        self.rows, self.optimizer, self.before = [], [], 0.0

    def lap(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.monotonic()
        lap, self.before = now - self.before, now
        return lap

    def on_step_begin(self, *_, **__) -> None:
        self.lap()

    def on_pre_optimizer_step(self, *_, **__) -> None:
        self.rows.append(self.lap())

    def on_optimizer_step(self, *_, **__) -> None:
        self.optimizer.append(self.lap())

    def on_step_end(self, args, state, control, **_) -> None:
        control.should_training_stop |= len(self.rows) == 2 and self.rows[0] > LONG


class Tokenized(DSADPOTrainer):
    def _prepare_dataset(self, dataset, *_, **__) -> Dataset:
        return dataset


def model_of(config: PreTrainedConfig, indexer: Indexer, topk: int, **changes) -> DSAForCausalLM:
    """A dense model's DSA model with random weights, float32, on the device. Raises ValueError for what has no DSA."""
    fields = {"index_n_heads": indexer.n_heads, "index_head_dim": indexer.head_dim, "index_topk": topk}
    new = config_of(config, **fields | changes)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return family(config.model_type)(new)


def random_ids(config: PreTrainedConfig, length: int) -> list[int]:
    return torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def random_pair(config: PreTrainedConfig, length: int) -> dict[str, list[int]]:
    """Half of each row is its answer."""
    ids, half = random_ids(config, length), length // 2
    return {"prompt_ids": ids[:half], "chosen_ids": ids[half:], "rejected_ids": ids[half:][::-1]}


def trainer_of(kind: str, model: DSAForCausalLM, section: Training, lengths: list[int], folder: Path) -> Trainer:
    """A step a length, in this order, of as many rows as a forward pass has, without checkpoints."""
    micro, _ = split_batch(section.batch_size)
    section = section.model_copy(update={"steps": len(lengths), "batch_size": micro})
    options = trainer_options(section, folder, 0)
    options |= {"save_strategy": "no", "train_sampling_strategy": "sequential", "disable_tqdm": True}
    if kind.startswith("dpo"):
        options |= {"max_length": max(lengths), "precompute_ref_log_probs": True, "disable_dropout": True}
    args = (DPOConfig if kind.startswith("dpo") else TrainingArguments)(**options)
    args._n_gpu = 1  # without a launcher a Trainer would spread its rows over all that it sees
    of_rows = [length for length in lengths for _ in range(micro)]
    if kind.startswith("dpo"):
        pairs = Dataset.from_list([random_pair(model.config, length) for length in of_rows])
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        return Tokenized(model, args=args, train_dataset=pairs, processing_class=tokenizer)
    ids = [random_ids(model.config, length) for length in of_rows]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return DSATrainer(model, args, train_dataset=rows, data_collator=Collator(0))


def training(kind: str, make: Callable[..., DSAForCausalLM], section: Training, mean: int, longest: int) -> Cost:
    """Of one of KINDS. The first step warms up and the longest follows: then the optimizer has its state."""
    changes, frozen = KINDS[kind]
    forget_peak()
    model = make(**changes)
    freeze(model, **frozen)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(kind, model, section, [mean, longest, mean], Path(folder))
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock := Clock())
        trainer.train()
    first, second, *third = (seconds / trainer.args.per_device_train_batch_size for seconds in clock.rows)
    return Cost({longest: second, mean: third[0] if third else first}, clock.optimizer[-1], peak_memory())


@torch.no_grad()
def seconds(call: Callable[[], object]) -> float:
    """Of the second call, or of a long first one."""
    clock = Clock()
    for _ in range(2):
        clock.lap()
        call()
        if (lap := clock.lap()) > LONG:
            break
    return lap


def evaluation(make: Callable[..., DSAForCausalLM], mean: int, longest: int) -> dict[str, Cost]:
    """By CHOICES, a row's forward pass in float32; `token`: one that is generated, of dense attention and DSA."""
    forget_peak()
    model, found = make().eval(), {}
    for name, changes in CHOICES.items():
        with changed(model.config, **changes):
            rows = {n: seconds(lambda n=n: predict(model, random_ids(model.config, n))) for n in {mean, longest}}
            found[name] = Cost(rows, peak=peak_memory())
    prompt = random_ids(model.config, 64)
    found["token"] = Cost({1: seconds(lambda: greedy(model, prompt, GENERATED)) / GENERATED})
    return found


def scoring(make: Callable[..., DSAForCausalLM], mean: int) -> Cost:
    """A held-out pair by policy and reference."""
    model = make(**DENSE).eval()
    return Cost({mean: seconds(lambda: score_pair(model, model, random_pair(model.config, mean)))})


def if_it_fits(call: Callable[..., Cost], *args) -> Cost | None:
    """None where memory does not suffice, which has been given back."""
    try:
        return call(*args)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return None


def settings_that_fit(kind: str, make: Callable[..., DSAForCausalLM], p: Params) -> list[str]:
    """Where a step does not: with activation checkpointing, and with rows of half the length, and what each costs."""
    stage, found = {"window": "sparse"}.get(kind, kind.partition("@")[0]), []
    section, where = getattr(p, stage), "preference" if stage == "dpo" else "data"
    longest, checkpointed = getattr(p, where).max_length, stage != "warmup" and not section.gradient_checkpointing
    for length in (longest, longest // 2, longest // 4):
        for checkpointing in (False, True) if checkpointed else (section.gradient_checkpointing,):
            if (length, checkpointing) == (longest, section.gradient_checkpointing):
                continue  # what was tried
            tried = section.model_copy(update={"gradient_checkpointing": checkpointing})
            if cost := if_it_fits(training, kind, make, tried, length // 2, length):
                names = [f"{where}.max_length: {length}"] if length < longest else []
                names += [f"{stage}.gradient_checkpointing: true"] if checkpointing and checkpointed else []
                memory = f"{cost.peak / 2**30:.1f} GB, " if cost.peak else ""
                found.append(f"{' and '.join(names)} ({memory}{cost.rows[length]:.2f} s a row of {length} tokens)")
        if found:
            break
    return found
