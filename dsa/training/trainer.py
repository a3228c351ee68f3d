"""Training with transformers' Trainer: what is frozen, which loss, which parameter groups.

Three kinds of run share this one Trainer:
  dense, and control arms   backbone by the language-model loss
  dense warm-up             indexer by its KL under dense attention, backbone frozen
  sparse training           backbone by the language-model loss, indexer by its KL over the selected keys
Both losses are means over the global batch: they do not change with micro-batch, accumulation or number of processes.
"""

import signal
import time
from typing import TYPE_CHECKING

import torch
from torch.utils.data import RandomSampler
from transformers import ProgressCallback, Trainer, TrainerCallback

from dsa.evaluation.predictions import attention_mass
from dsa.modeling import DSAForCausalLM
from dsa.training import tiles

if TYPE_CHECKING:  # benchmarks/gpu does without
    from accelerate import Accelerator


def freeze(model: DSAForCausalLM, *, backbone: bool, indexer: bool) -> None:
    """Freeze (True) or train (False) the two halves of the model."""
    for parameter in model.backbone_parameters():
        parameter.requires_grad_(not backbone)
    for parameter in model.indexer_parameters():
        parameter.requires_grad_(not indexer)


class WholeBatches:
    """A Trainer's sampler for which every step has its whole batch, also where an epoch ends within it.

    Shuffled epochs follow each other without a break, `max_steps` batches of them. By itself a Trainer cuts the last
    batch of each epoch short, and on several processes accelerate fills it up with rows taken twice.
    """

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, RandomSampler) and self.args.max_steps > 0:
            rows = self.args.max_steps * self.get_total_train_batch_size(self.args)
            return RandomSampler(sampler.data_source, num_samples=rows)
        return sampler


class SplitOptimizer:
    """A Trainer's optimizer for a model in two halves: parameter groups, learning rates and gradient clipping apart.

    Only what is not frozen is trained, and only that has optimizer state.
    """

    def __init__(self, model: DSAForCausalLM, *args, indexer_learning_rate: float | None = None, **kwargs):
        self.trains_indexer = any(p.requires_grad for p in model.indexer_parameters())
        self.trains_backbone = any(p.requires_grad for p in model.backbone_parameters())
        self.indexer_learning_rate = indexer_learning_rate
        super().__init__(model, *args, **kwargs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Parameter groups: backbone with and without weight decay, indexer. Frozen parameters are in none."""
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            groups = {"decay": [], "no_decay": [], "indexer": []}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    kind = "indexer" if ".indexer." in name else "decay" if name in decayed else "no_decay"
                    groups[kind].append(parameter)
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            indexer_lr = self.indexer_learning_rate or self.args.learning_rate
            options = {
                "decay": {"weight_decay": self.args.weight_decay},
                "no_decay": {"weight_decay": 0.0},
                "indexer": {"weight_decay": 0.0, "lr": indexer_lr},
            }
            self.optimizer = cls([{"params": p, **options[kind]} for kind, p in groups.items() if p], **kwargs)
        return self.optimizer

    def _clip_grad_norm(self, model):
        """Clip backbone and indexer apart: a joint norm would let a large KL gradient shrink the backbone's step."""
        norms = [
            self.accelerator.clip_grad_norm_(half, self.args.max_grad_norm)
            for half in (self.model.backbone_parameters(), self.model.indexer_parameters())
            if any(p.requires_grad for p in half)
        ]
        return norms[0]


class DSATrainer(WholeBatches, SplitOptimizer, Trainer):
    """Trains whatever of the model is not frozen.

    Args:
        indexer_learning_rate: of the indexers' own parameter group; the backbone's is `args.learning_rate`.

    The logs hold, by optimiser step: `rows`; `lm_loss` if the backbone is trained, and `kl`, the layers' mean, with
    `kl_layer_<i>`, if the indexer is.
    """

    def __init__(self, *args, **kwargs):
        self.positions_in_batch = 1
        self.sums: dict[str, torch.Tensor] = {}
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = True  # `compute_loss` divides by the counts of the whole accumulated batch

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        positions = sum((b["attention_mask"].sum() for b in batches), torch.zeros((), dtype=torch.long)).to(device)
        self.positions_in_batch = self.accelerator.gather(positions).sum()
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        if self.trains_backbone:
            inputs["num_items_in_batch"] = num_items_in_batch
        else:
            inputs |= {"labels": None, "logits_to_keep": 1}
        own = self.accelerator.unwrap_model(model)
        with tiles.tiled_if_large(own, inputs["input_ids"].numel() if self.trains_backbone else 0):
            outputs = model(**inputs, output_indexer_kl=self.trains_indexer, use_cache=False)
        loss = outputs.logits.new_zeros(())
        self._note("rows", loss.new_tensor(len(inputs["input_ids"])))
        if self.trains_backbone:
            loss = loss + outputs.loss
            self._note("lm_loss", outputs.loss)
        if self.trains_indexer:
            kl = outputs.indexer_kl * (inputs["attention_mask"].sum() / self.positions_in_batch)
            loss = loss + kl.sum()
            self._note("kl", kl.mean())
            for i, value in enumerate(kl):
                self._note(f"kl_layer_{i}", value)
        loss = loss * self.accelerator.num_processes  # DDP takes the mean of the gradients
        return (loss, outputs) if return_outputs else loss

    def _note(self, name: str, value: torch.Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self.sums:
            # Each process summed its own shares of the global batch.
            totals = {name: self.accelerator.reduce(value, "sum").item() for name, value in self.sums.items()}
            logs |= {name: total / self.args.logging_steps for name, total in totals.items()}
            self.sums.clear()
        super().log(logs, *args, **kwargs)


class MassProbe(TrainerCallback):
    """Logs `mass_layer_<i>` every so many steps: the share of dense attention that the indexer's first eighth of the
    keys would hold, on one held-out row. An eighth, and not top-k: the warm-up does not depend on k."""

    def __init__(self, row: dict, every: int):
        self.ids = torch.tensor([row["input_ids"]])
        self.every = every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step in (1, state.max_steps):
            mass = attention_mass(model, self.ids.to(model.device), self.ids.shape[1] // 8)
            state.log_history.append(
                {"step": state.global_step} | {f"mass_layer_{i}": m for i, m in enumerate(mass["mass"])}
            )


class StopOnSignal(TrainerCallback):
    """On SIGTERM the step at hand is the last one: a checkpoint, and the end of the training, in all processes."""

    def __init__(self, accelerator: "Accelerator"):
        self.accelerator, self.asked = accelerator, False

    def ask(self, *_) -> None:
        self.asked = True

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = signal.signal(signal.SIGTERM, self.ask)

    def on_step_end(self, args, state, control, **kwargs):
        if self.asked:
            self.accelerator.set_trigger()
        if self.accelerator.check_trigger():  # some process was asked
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.previous)


class TokenProgress(ProgressCallback):
    """The Trainer's progress bar, with tokens/s beside steps and ETA."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.begun, self.tokens_before = time.monotonic(), state.num_input_tokens_seen

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if self.training_bar is not None:
            rate = (state.num_input_tokens_seen - self.tokens_before) / (time.monotonic() - self.begun)
            self.training_bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """A line a step belongs into the CSV, not between the bars."""
