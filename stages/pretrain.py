"""Stage `pretrain` (frozen): the embedded base model of the cpu profile, one that retrieves.

A byte-level BPE tokenizer with ChatML tokens, then a Qwen2 of a few million parameters at growing lengths: text of the
training side of the corpus in import order, look-ups, and rows that can only be solved by reaching back
(dsa/data/recall.py). Its weights start from a constructed induction circuit (dsa/training/induction.py).
Run it again with `dvc repro --single-item pretrain` after unfreezing it; nothing else does. A run that was killed goes
on from its last checkpoint.
"""

import json
import math
import random
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dsa.data import corpus
from dsa.data.corpus import SourceFile
from dsa.data.import_order import in_import_order
from dsa.data.recall import Recall, Row, positions
from dsa.data.rows import encode, messages_of, render
from dsa.evaluation.exact import exact
from dsa.machine import supports_bf16
from dsa.training.induction import induction
from dsa.training.muon import MuonWithAdamW
from stages import params as params_module
from stages.checkpoints import Seal, last_checkpoint
from stages.common import owned, scratch
from stages.params import Pretrain

OUT = Path("data/base")
LENGTHS, ROWS = [512, 2048, 4096, 8192], 4  # of what the result is measured with: tokens, and rows of either test
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen2's own split: contractions, words, single digits, punctuation, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        model_max_length=32768,
    )


def tokens_of(tokenizer, files: list[SourceFile]) -> torch.Tensor:
    """All files one after the other, in import order, an end of text behind each: int64 [N]."""
    texts = [f.text for f in in_import_order(files)]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([t for ids in encoded for t in [*ids, tokenizer.pad_token_id]])


def new_model(cfg: Pretrain, tokenizer) -> Qwen2ForCausalLM:
    shape = cfg.model_dump(exclude={"rope_theta", "mixes", "phases", "last_learning_rate"})
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **shape,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
            max_position_embeddings=max(phase.length for phase in cfg.phases),
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    induction(model)
    return model


class Steps(Dataset):
    """One optimiser step an item, made from its number alone: a run goes on anywhere."""

    def __init__(self, recall: Recall, lookup, cfg: Pretrain, seed: int):
        self.make = recall.kinds | {"lookup": lookup}
        self.cfg, self.phases, self.seed = cfg, cfg.phases, seed
        self.ends = torch.tensor([p.steps for p in cfg.phases]).cumsum(0).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def tokens(self) -> list[int]:
        """Of each step."""
        return [p.length * p.rows for p in self.phases for _ in range(p.steps)]

    def phase(self, step: int) -> tuple[int, float]:
        """Its number, and how much of it is done."""
        i = next((i for i, end in enumerate(self.ends) if step < end), len(self.ends) - 1)
        return i, (step - self.ends[i] + self.phases[i].steps) / self.phases[i].steps

    def __getitem__(self, step: int) -> dict:
        rng, phase = random.Random(f"{self.seed}-{step}"), self.phases[self.phase(step)[0]]
        mix = self.cfg.mixes[phase.mix]
        kinds = rng.choices(list(mix), list(mix.values()), k=phase.rows)
        rows = [self.make[kind](rng, phase.length + 1, phase.most) for kind in kinds]
        span = [phase.far if rng.random() < phase.gaps else 0 for _ in rows]
        return {
            "input_ids": torch.tensor([row.ids for row in rows]),
            "weights": torch.tensor([row.weights for row in rows]),
            "position_ids": torch.stack([positions(rng, phase.length, far) for far in span]),
            "kinds": kinds,
        }

    def learning_rate(self, step: int) -> float:
        """Of Muon: from a phase's own to the next one's, after 60 steps of warm-up."""
        i, done = self.phase(step)
        rates = [p.learning_rate for p in self.phases] + [self.cfg.last_learning_rate]
        return rates[i] ** (1 - done) * rates[i + 1] ** done * min(1.0, (step + 1) / 60)


def lookup_rows(tokenizer, files: list[corpus.SourceFile], text):
    """Look-up conversations, filled up with text in front; answers have half of the row's weight."""
    weights = [len(f.text) ** 0.5 for f in files]

    def make(rng: random.Random, length: int, most: int) -> Row:
        while True:
            chars = int(rng.uniform(0.5, 0.95) * 2.7 * min(length, 2200))
            row = corpus.lookup_row(rng.choices(files, weights)[0], chars, rng)
            if row is None:
                continue
            (example,) = encode(tokenizer, [render(tokenizer, messages_of(row))])
            if len(example["input_ids"]) < length:
                break
        filled = Row()
        filled.add(text(rng, length - len(example["input_ids"])), 1.0)
        answers = sum(label >= 0 for label in example["labels"])
        for token, label in zip(example["input_ids"], example["labels"], strict=True):
            filled.add([token], 1.0 if label < 0 else (length - answers) / answers)
        return filled

    return make


class PretrainTrainer(Trainer):
    """The mean over rows of each row's weighted loss; logits are computed where there is a weight."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sums: dict[str, tuple[float, float]] = {}

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, weights = inputs["input_ids"], inputs["weights"][:, 1:]
        # Without a mask, positions that jump would be read as packed documents.
        hidden = model.model(
            ids[:, :-1],
            attention_mask=torch.ones_like(ids[:, :-1]),
            position_ids=inputs["position_ids"],
            use_cache=False,
        ).last_hidden_state
        at = weights > 0
        losses = F.cross_entropy(model.lm_head(hidden[at]).float(), ids[:, 1:][at], reduction="none")
        weighted = torch.zeros_like(weights).masked_scatter(at, losses * weights[at])
        rows = weighted.sum(1) / weights.sum(1)
        for row, kind in enumerate(inputs["kinds"]):
            heavy = weights[row] > 1 if kind in ("needles", "lookup") else weights[row] > 0
            with torch.no_grad():
                total = (weighted[row] / weights[row].clamp(min=1e-9))[heavy].sum().item()
            before = self.sums.get(kind, (0.0, 0.0))
            self.sums[kind] = before[0] + total, before[1] + heavy.sum().item()
        return rows.mean()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs |= {f"loss_{kind}": round(total / max(1, n), 4) for kind, (total, n) in sorted(self.sums.items())}
            self.sums.clear()
        super().log(logs, *args, **kwargs)


@torch.no_grad()
def bits_per_char(model: Qwen2ForCausalLM, tokenizer, text: torch.Tensor, length: int, rows: int) -> float:
    blocks = text[: len(text) // length * length].view(-1, length)
    blocks = blocks[:: max(1, len(blocks) // rows)][:rows].to(model.device)
    losses = []
    for row in blocks:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=supports_bf16()):
            losses.append(model(input_ids=row[None], labels=row[None], use_cache=False).loss.item())
    chars = len(tokenizer.decode(blocks.flatten()))
    return sum(losses) / len(losses) * (length - 1) * len(losses) / math.log(2) / chars


def measure(model, tokenizer, held_out: Recall, lengths: list[int], rows: int) -> dict:
    """Of held-out families: bits a character, and exact values of pairs that fill the row and of needles."""
    model.eval()
    result = {"held_out_bits_per_char": round(bits_per_char(model, tokenizer, held_out.text, 2048, 4 * rows), 4)}
    for name, make in held_out.tests.items():
        for length in lengths:
            right = [r for seed in range(rows) for r in exact(model, make(f"base-{seed}", length))]
            result[f"{name}_{length}"] = round(sum(right) / len(right), 4)
    model.train()
    return result


class Probe(TrainerCallback):
    """Measures at every checkpoint, in a few seconds."""

    def __init__(self, dataset: Steps, tokenizer, held_out: Recall):
        self.dataset, self.tokenizer, self.held_out = dataset, tokenizer, held_out

    def on_save(self, args, state, control, model=None, **kwargs):
        longest = self.dataset.phases[self.dataset.phase(state.global_step)[0]].length
        lengths = sorted({512, 2048, max(512, longest)})
        found = measure(model, self.tokenizer, self.held_out, lengths, 2)
        print(json.dumps({"step": state.global_step} | found), flush=True)


def train(model: Qwen2ForCausalLM, dataset: Steps, probe: Probe, folder: Path) -> list[dict]:
    """Returns the Trainer's log."""
    optimizer = MuonWithAdamW(model, 1.0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=len(dataset),
        per_device_train_batch_size=1,
        max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(),
        bf16=supports_bf16(),
        logging_steps=25,
        save_steps=150,
        save_total_limit=2,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = PretrainTrainer(
        model,
        arguments,
        train_dataset=dataset,
        data_collator=lambda items: items[0],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, dataset.learning_rate)),
        callbacks=[probe, Seal()],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    return trainer.state.log_history


def main() -> None:
    params = params_module.load("pretrain", profile="cpu")  # whatever profile is set
    cfg, data = params.pretrain, params.data
    files, test, _ = corpus.separate(corpus.source_files(data.packages), data.test_fraction)
    shuffled = list(files)
    random.Random(params.seed).shuffle(shuffled)
    tokenizer = train_tokenizer([f.text for f in shuffled[::4]], cfg.vocab_size)
    recall, held_out = Recall(tokenizer, tokens_of(tokenizer, files)), Recall(tokenizer, tokens_of(tokenizer, test))
    dataset = Steps(recall, lookup_rows(tokenizer, files, recall.snippet), cfg, params.seed)
    print(f"{len(files)} files, {len(recall.text):,} tokens of text, {len(dataset)} steps", flush=True)
    torch.manual_seed(params.seed)
    model = new_model(cfg, tokenizer)
    sources = [Path(dep) for dep in params_module.entry("pretrain", "cpu")["deps"]]
    with owned(scratch("pretrain", cfg.model_dump(), sources)) as folder:
        history = train(model, dataset, Probe(dataset, tokenizer, held_out), folder)
    about = {"train_files": len(files), "held_out_families": sorted({f.family for f in test})}
    write(model, tokenizer, dataset, history, measure(model, tokenizer, held_out, LENGTHS, ROWS) | about)


def write(model, tokenizer, dataset: Steps, history: list[dict], about: dict) -> None:
    """The model in bfloat16, its tokenizer, its curve and what is known of it."""
    summary = {"parameters": model.num_parameters(), "train_tokens": sum(dataset.tokens), **about}
    print(summary)
    model.to(torch.bfloat16).save_pretrained(OUT)
    tokenizer.save_pretrained(OUT)
    (OUT / "pretrain.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    curve = pd.DataFrame([entry for entry in history if "loss" in entry])
    curve = curve[["step", *sorted(c for c in curve if c.startswith("loss")), "learning_rate"]].astype(float)
    after = torch.tensor(dataset.tokens).cumsum(0)
    curve.insert(1, "tokens", [after[int(step) - 1].item() for step in curve["step"]])
    curve.to_csv(OUT / "pretrain.csv", index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
