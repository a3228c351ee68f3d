"""What the training stages share: rows in, Trainer, checkpoints, a model and its curve out."""

import gc
import json
import os
import shutil
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoTokenizer, TrainingArguments

from dsa.data import Collator, encode, messages_of, render
from dsa.modeling import Qwen2DSAForCausalLM
from dsa.training import DSATrainer, MassProbe, Rows, TokenProgress, supports_bf16
from stages.common import measured, read_rows, scratch, write_json
from stages.params import ParamsError, Training

LONG = Path("data/long")
CHECKPOINTS = 5  # a run
LOGGED = ("lm_loss", "kl", "learning_rate", "grad_norm")


def examples(tokenizer, path: Path, max_length: int) -> list[dict]:
    """The rows of a split as token ids and labels. `filter` has left no row without an answer token."""
    conversations = [render(tokenizer, messages_of(row)) for row in read_rows(path)]
    return encode(tokenizer, conversations, max_length)


def micro_batch(batch_size: int) -> int:
    """Rows a forward pass, DSA_MICRO_BATCH or 1: what fits is the machine's business, the global batch the params'."""
    wanted, world = int(os.environ.get("DSA_MICRO_BATCH", 1)), int(os.environ.get("WORLD_SIZE", 1))
    if batch_size % (wanted * world):
        raise ParamsError(f"batch_size: {batch_size} rows cannot be split over {world} processes of {wanted} rows")
    return wanted


def use_all_cores() -> None:
    """Share this machine's cores among its processes: `accelerate launch` leaves each with a single thread."""
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; one that a kill cut short is deleted."""
    complete = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors")
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True):
        if all((path / name).exists() for name in complete):
            try:
                json.loads((path / "trainer_state.json").read_text())
            except ValueError:
                pass
            else:
                return str(path)
        shutil.rmtree(path)
    return None


def train(
    stage: str,
    model: Qwen2DSAForCausalLM,
    section: Training,
    *,
    seed: int,
    max_length: int,
    inputs: list[Path],
    out: Path,
    indexer_learning_rate: float | None = None,
) -> None:
    """Train what of `model` is not frozen on data/long, and write `out` and reports/train/<stage>.{json,csv}.

    A run that was killed goes on from its last checkpoint.
    """
    metrics: dict = {}
    use_all_cores()
    settings = section.model_dump() | {"seed": seed, "max_length": max_length, "model": model.config.to_dict()}
    folder = scratch(stage, settings, [LONG, *inputs])
    with measured(metrics):
        tokenizer = AutoTokenizer.from_pretrained(inputs[0])
        rows = examples(tokenizer, LONG / "train.jsonl.gz", max_length)
        held_out = examples(tokenizer, LONG / "test.jsonl.gz", max_length)
        tokens = section.batch_size * sum(len(row["input_ids"]) for row in rows) / len(rows)
        micro = micro_batch(section.batch_size)
        arguments = TrainingArguments(
            output_dir=str(folder),
            seed=seed,
            max_steps=section.steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=section.batch_size // (micro * int(os.environ.get("WORLD_SIZE", 1))),
            learning_rate=section.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, section.steps // 10),
            weight_decay=section.weight_decay,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            use_cpu=not torch.cuda.is_available(),
            bf16=supports_bf16(),
            gradient_checkpointing=section.gradient_checkpointing,
            logging_steps=1,
            save_steps=max(1, section.steps // CHECKPOINTS),
            save_total_limit=2,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=False,
            report_to="none",
        )
        trainer = DSATrainer(
            model,
            arguments,
            train_dataset=Rows(rows),
            data_collator=Collator(tokenizer.pad_token_id),
            indexer_learning_rate=indexer_learning_rate,
        )
        trainer.pop_callback(next(c for c in trainer.callback_handler.callbacks if "Progress" in type(c).__name__))
        trainer.add_callback(TokenProgress(tokens))
        if trainer.trains_indexer:
            trainer.add_callback(MassProbe(held_out[0], every=max(1, section.steps // 10)))
        resume = last_checkpoint(folder)
        result = trainer.train(resume_from_checkpoint=resume)
    if not trainer.is_world_process_zero():
        return
    trainer.model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    curve = write_curve(trainer.state.log_history, Path(f"reports/train/{stage}.csv"))
    seconds = result.metrics["train_runtime"]
    metrics |= {
        "rows": section.steps * section.batch_size,
        "tokens": round(section.steps * tokens),
        "tokens_per_second": round(
            (section.steps - (int(resume.rsplit("-", 1)[1]) if resume else 0)) * tokens / seconds
        ),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "resumed_at_step": int(resume.rsplit("-", 1)[1]) if resume else 0,
        "precision": "bfloat16 autocast" if arguments.bf16 else "float32",
        "first": curve.iloc[: max(1, len(curve) // 10)].mean().drop("step").round(4).to_dict(),
        "last": curve.iloc[-max(1, len(curve) // 10) :].mean().drop("step").round(4).to_dict(),
    }
    write_json(Path(f"reports/train/{stage}.json"), metrics)
    shutil.rmtree(folder, ignore_errors=True)
    gc.collect()


def write_curve(history: list[dict], path: Path) -> pd.DataFrame:
    """One line an optimiser step: the loss's parts, learning rate, gradient norm, and mass where it was probed."""
    steps = pd.DataFrame(history).groupby("step").first().reset_index()
    # Sorted: a history that went through a checkpoint has its keys in another order.
    names = ["step", *sorted(c for c in steps if c in LOGGED or "_layer_" in c)]
    curve = steps[steps["learning_rate"].notna()][names]
    path.parent.mkdir(parents=True, exist_ok=True)
    curve.to_csv(path, index=False, float_format="%.6g")
    return curve.drop(columns=[c for c in names if "_layer_" in c])
