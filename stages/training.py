"""What the training stages share: rows in, Trainer, checkpoints, a model and its curve out."""

import gc
import os
import sys
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments

from dsa.data.rows import Collator, end_ids, examples
from dsa.machine import cores, supports_bf16
from dsa.modeling import DSAForCausalLM
from dsa.training.trainer import DSATrainer, MassProbe, StopOnSignal, TokenProgress
from stages.checkpoints import Seal, last_checkpoint
from stages.common import measured, owned, scratch, versions
from stages.files import read_rows, write_json
from stages.params import ParamsError, Training, dependencies
from stages.unattended import GO_ON

LONG = Path("data/long")
CHECKPOINTS = 5  # a run
PRECISIONS = {"bf16": "bfloat16 autocast", "no": "float32"}
LOGGED = ("lm_loss", "kl", "learning_rate", "grad_norm")


def split_batch(batch_size: int) -> tuple[int, int]:
    """Rows a forward pass, and forward passes a step, of each process.

    The first is DSA_MICRO_BATCH or 1: what fits is the machine's business, the global batch the params'.
    """
    asked, world = os.environ.get("DSA_MICRO_BATCH", "1"), int(os.environ.get("WORLD_SIZE", 1))
    if not asked.isdecimal() or not (micro := int(asked)):
        raise ParamsError(f"DSA_MICRO_BATCH: {asked!r} is not a number of rows")
    if batch_size % (micro * world):
        raise ParamsError(f"batch_size: {batch_size} rows cannot be split over {world} processes of {micro} rows")
    return micro, batch_size // (micro * world)


def threads_asked() -> str | None:
    """OMP_NUM_THREADS as the user has set it. `accelerate launch` sets it to 1 for its processes where nobody has."""
    launcher = Path("/proc", str(os.getppid()))
    if launcher.exists() and b"accelerate" in (launcher / "cmdline").read_bytes():
        variables = (launcher / "environ").read_bytes().split(b"\0")
        return next((v.partition(b"=")[2].decode() for v in variables if v.startswith(b"OMP_NUM_THREADS=")), None)
    return os.environ.get("OMP_NUM_THREADS")


def use_all_cores() -> None:
    """Share this machine's cores among its processes, unless OMP_NUM_THREADS says how many threads each has."""
    if not torch.cuda.is_available() and not threads_asked():
        torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def checkpoints(stage: str) -> Path:
    """The folder of a stage's checkpoints. A rerun finds them if nothing has changed that DVC counts as a dependency,
    nor what it does not see: the libraries, and the precision, which is this machine's."""
    counted = dependencies(stage)
    settings = counted | {"versions": versions(), "bf16": supports_bf16()}
    return scratch(stage.replace("@", "-"), settings, map(Path, counted["deps"]))


def ignore_launcher() -> None:
    """Let accelerate's launcher, and the user's config of it, say where to run and nothing about how.

    They speak by environment variables, which a Trainer takes for its defaults: without them what it is given holds.
    Raises ParamsError for what cannot be put aside, or would be true of this stage alone.
    """
    asked = {name.removeprefix("ACCELERATE_") for name, value in os.environ.items() if value.lower() in ("true", "1")}
    if untried := asked & {"USE_DEEPSPEED", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG"}:
        raise ParamsError(
            f"accelerate's config: {untried.pop().lower()}: not with these stages, see docs/distributed.md"
        )
    if "USE_FSDP" in asked:
        for name, needed in (("FSDP_VERSION", "2"), ("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")):
            if (given := os.environ.get(name)) != needed:
                raise ParamsError(
                    f"accelerate's config: {name.lower()}: {given} is not {needed}, see docs/distributed.md"
                )
    if "USE_CPU" in asked and torch.cuda.is_available():
        raise ParamsError("accelerate's config: use_cpu: hide the GPU from all stages, by CUDA_VISIBLE_DEVICES=")
    for name in list(os.environ):
        if name == "ACCELERATE_MIXED_PRECISION" or name.startswith("ACCELERATE_DYNAMO_"):
            del os.environ[name]


def trainer_options(section: Training, folder: Path, seed: int) -> dict:
    """What TrainingArguments, and TRL's configs on top of them, take from a stage's params and this machine."""
    ignore_launcher()
    micro, accumulation = split_batch(section.batch_size)
    return {
        "output_dir": str(folder),
        "seed": seed,
        "max_steps": section.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, section.steps // 10),
        "weight_decay": section.weight_decay,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": supports_bf16(),
        "activation_checkpointing": section.gradient_checkpointing,
        "logging_steps": 1,
        "include_num_input_tokens_seen": "non_padding",
        "save_steps": max(1, section.steps // CHECKPOINTS),
        "save_total_limit": 2,
        # Every trained parameter is used in every step; a search would miss an indexer whose loss leaves no output.
        "ddp_find_unused_parameters": False,
        # No batch is cut short (WholeBatches). It also keeps accelerate from taking the last rows for repeated ones,
        # as it does by the number of rows where their last epoch is not whole.
        "dataloader_drop_last": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": False,
        "report_to": "none",
    }


def run(trainer: Trainer, folder: Path) -> dict:
    """Train, from the last checkpoint in `folder` if there is one. Returns the run's metrics.

    Ends the process with the code GO_ON where SIGTERM cut the training short.
    """
    trainer.pop_callback(next(c for c in trainer.callback_handler.callbacks if "Progress" in type(c).__name__))
    trainer.add_callback(progress := TokenProgress())
    trainer.add_callback(StopOnSignal(trainer.accelerator))
    trainer.add_callback(Seal())
    tokens_per_second = resumed_at = 0
    if trainer.args.max_steps > 0:  # 0 is no limit to the Trainer
        checkpoint = last_checkpoint(folder)
        resumed_at = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
        seconds = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
        tokens_per_second = round((trainer.state.num_input_tokens_seen - progress.tokens_before) / seconds)
        if (step := trainer.state.global_step) < trainer.args.max_steps:
            if trainer.is_world_process_zero():
                print(f"SIGTERM: step {step} of {trainer.args.max_steps} is kept: run it again", file=sys.stderr)
            raise SystemExit(GO_ON)
    return {
        "tokens": trainer.state.num_input_tokens_seen,
        "tokens_per_second": tokens_per_second,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "resumed_at_step": resumed_at,
        "precision": PRECISIONS[trainer.accelerator.mixed_precision],
    }


def whole(trainer: Trainer) -> DSAForCausalLM | None:
    """The trained model, in the first process; None in the others. All call it: they may hold a shard each."""
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if not trainer.is_world_process_zero():
        return None
    if state is None:
        for name in ("forward", "_original_forward"):  # accelerate's own, under its autocast, would stay for good
            vars(trainer.model).pop(name, None)
        return trainer.model
    model = AutoModelForCausalLM.from_config(trainer.model.config, dtype=torch.float32)
    model.load_state_dict(state)
    model.generation_config = trainer.model.generation_config
    return model.to(trainer.args.device)


def first_and_last(curve: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Means of a curve's columns over its first and its last tenth; nothing of an empty one."""
    if curve.empty:
        return {}
    tenth = max(1, len(curve) // 10)
    ends = {"first": curve.iloc[:tenth], "last": curve.iloc[-tenth:]}
    return {name: end.mean().drop("step").round(4).to_dict() for name, end in ends.items()}


def train(
    stage: str,
    model: DSAForCausalLM,
    section: Training,
    *,
    seed: int,
    max_length: int,
    source: Path,
    out: Path,
    indexer_learning_rate: float | None = None,
) -> None:
    """Train what of `model` is not frozen on data/long, and write `out` and reports/train/<stage>.{json,csv}.

    A run that was killed goes on from its last checkpoint. source: the folder of the model that `model` was made from.
    """
    metrics: dict = {}
    use_all_cores()
    with owned(checkpoints(stage)) as folder:
        with measured(metrics):
            tokenizer = AutoTokenizer.from_pretrained(source)
            model.generation_config.eos_token_id = end_ids(tokenizer)
            model.generation_config.pad_token_id = tokenizer.pad_token_id
            rows = examples(tokenizer, read_rows(LONG / "train.jsonl.gz"), max_length)
            (held_out,) = examples(tokenizer, islice(read_rows(LONG / "test.jsonl.gz"), 1), max_length)
            trainer = DSATrainer(
                model,
                TrainingArguments(**trainer_options(section, folder, seed)),
                train_dataset=rows,
                data_collator=Collator(tokenizer.pad_token_id),
                indexer_learning_rate=indexer_learning_rate,
            )
            if trainer.trains_indexer:
                trainer.add_callback(MassProbe(held_out, every=max(1, section.steps // 10)))
            result = run(trainer, folder)
            trained = whole(trainer)
        if trained is None:
            return
        save(trained, tokenizer, out)
        curve = write_curve(trainer.state.log_history, Path(f"reports/train/{stage}.csv"), LOGGED)
        rows_seen = sum(log.get("rows", 0) for log in trainer.state.log_history)
        metrics |= {"rows": round(rows_seen)} | result | first_and_last(curve)
        write_json(Path(f"reports/train/{stage}.json"), metrics)
        gc.collect()


def save(model: DSAForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write a model's folder, the same bytes everywhere: transformers would add that HF_HUB_OFFLINE is set."""
    for name in ("is_local", "local_files_only"):  # how the tokenizer was loaded
        tokenizer.init_kwargs.pop(name, None)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_curve(history: list[dict], path: Path, logged: tuple[str, ...]) -> pd.DataFrame:
    """One line an optimiser step: what is `logged`, and a layer's KL, and its mass where it was probed."""
    steps = pd.DataFrame(history, columns=None if history else ["step", *logged]).groupby("step").first().reset_index()
    # Sorted: a history that went through a checkpoint has its keys in another order.
    names = ["step", *sorted(c for c in steps if c in logged or "_layer_" in c)]
    curve = steps[steps["learning_rate"].notna()][names]
    path.parent.mkdir(parents=True, exist_ok=True)
    curve.to_csv(path, index=False, float_format="%.6g")
    return curve.drop(columns=[c for c in names if "_layer_" in c])
