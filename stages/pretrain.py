"""Stage `pretrain` (frozen): the embedded base model of the cpu profile, from the training side of the corpus.

A byte-level BPE tokenizer with ChatML tokens, then a Qwen2 of a few million parameters on the same text, at growing
context lengths. Run it again with `dvc repro --single-item pretrain` after unfreezing it; nothing else does.
"""

import json
import random
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

from dsa.data import corpus
from dsa.data.corpus import SourceFile
from dsa.data.rows import encode, messages_of, render
from stages import params as params_module
from stages.params import Phase, Pretrain

OUT = Path("data/base")
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


class Blocks(Dataset):
    """One optimiser step an item: `batch_tokens` token ids in rows of the phase's length.

    A row is text from a random place, or (`lookup_share`) a look-up conversation filled up with such text.
    """

    def __init__(self, text: torch.Tensor, lookups: list[list[torch.Tensor]], cfg: Pretrain, seed: int):
        rng = random.Random(seed)
        self.steps = []
        for phase, conversations in zip(cfg.phases, lookups, strict=True):
            for _ in range(phase.steps):
                rows = []
                for _ in range(cfg.batch_tokens // phase.length):
                    head = text[:0]
                    if conversations and rng.random() < phase.lookup_share:
                        head = conversations.pop()
                    at = rng.randrange(len(text) - phase.length)
                    rows.append(torch.cat([head, text[at : at + phase.length - len(head)]]))
                self.steps.append(torch.stack(rows))

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.steps[i]


def lookup_tokens(tokenizer, files: list[SourceFile], phase: Phase, cfg: Pretrain, seed: int) -> list[torch.Tensor]:
    """Enough look-up conversations of at most the phase's length."""
    count = int(phase.lookup_share * phase.steps * cfg.batch_tokens / phase.length)
    chars = (phase.length, 3 * phase.length, int(2.5 * phase.length))
    rows = corpus.rows([files], [1.0], int(1.3 * count), seed, chars, lookup_share=1.0)
    rendered = [render(tokenizer, messages_of(row)) for row in rows]
    encoded = encode(tokenizer, rendered) if rendered else []
    return [torch.tensor(e["input_ids"]) for e in encoded if len(e["input_ids"]) <= phase.length]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the layers' matrices, AdamW for embeddings and vectors, behind one optimizer's face.

    With the same tokens it is well ahead of AdamW alone on a model of this size.
    """

    def __init__(self, model: Qwen2ForCausalLM, learning_rate: float):
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and "embed_tokens" not in name]
        others = [p for name, p in named if not (p.ndim == 2 and "embed_tokens" not in name)]
        self.parts = (
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=learning_rate / 2, betas=(0.9, 0.95), weight_decay=0.0),
        )
        super().__init__([{"params": matrices}, {"params": others}], {"lr": learning_rate})
        self.param_groups = [group for part in self.parts for group in part.param_groups]  # a scheduler reaches both

    def step(self, closure=None):
        for part in self.parts:
            part.step()


def collate(items: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    (ids,) = items
    return {"input_ids": ids, "labels": ids}


def tokens_of(tokenizer, files: list[SourceFile], end: int) -> torch.Tensor:
    """All files one after the other, `end` behind each."""
    encoded = tokenizer([f.text for f in files], add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([t for ids in encoded for t in [*ids, end]])


def new_model(cfg: Pretrain, tokenizer, longest: int, end: int) -> Qwen2ForCausalLM:
    shape = cfg.model_dump(exclude={"learning_rate", "batch_tokens", "phases", "rope_theta"})
    return Qwen2ForCausalLM(
        Qwen2Config(
            **shape,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
            max_position_embeddings=longest,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=end,
        )
    )


class InOrder(Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(model: Qwen2ForCausalLM, blocks: Blocks, learning_rate: float, seed: int) -> list[dict]:
    """Returns the Trainer's log."""
    arguments = TrainingArguments(
        output_dir="scratch/pretrain",
        seed=seed,
        max_steps=len(blocks),
        per_device_train_batch_size=1,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.02},
        warmup_steps=50,
        max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    optimizers = MuonWithAdamW(model, learning_rate), None
    trainer = InOrder(model, arguments, train_dataset=blocks, data_collator=collate, optimizers=optimizers)
    trainer.train()
    return trainer.state.log_history


def held_out_loss(model: Qwen2ForCausalLM, rows: torch.Tensor) -> float:
    """Mean over rows [rows, length], nats a token."""
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    return sum(losses) / len(losses)


def main() -> None:
    params = params_module.load("pretrain", profile="cpu")  # whatever profile is set
    cfg, data = params.pretrain, params.data
    files, test, _ = corpus.separate(corpus.source_files(data.packages), data.test_fraction)
    random.Random(params.seed).shuffle(files)
    tokenizer = train_tokenizer([f.text for f in files[::4]], cfg.vocab_size)
    tokenizer.save_pretrained(OUT)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    text, held_out = (tokens_of(tokenizer, side, end) for side in (files, test))
    # Other seeds than that of `download`: the base has not seen the very rows of the experiment.
    lookups = [lookup_tokens(tokenizer, files, phase, cfg, seed=1_000 + i) for i, phase in enumerate(cfg.phases)]
    blocks = Blocks(text, lookups, cfg, params.seed)
    print(f"{len(files)} files, {len(text):,} tokens of text, {len(blocks)} steps", flush=True)

    torch.manual_seed(params.seed)
    longest = max(phase.length for phase in cfg.phases)
    model = new_model(cfg, tokenizer, longest, end)
    history = train(model, blocks, cfg.learning_rate, params.seed)

    rows = held_out[: len(held_out) // longest * longest].view(-1, longest)[:64]
    loss = held_out_loss(model, rows)
    chars = len(tokenizer.decode(rows.flatten()))
    summary = {
        "parameters": model.num_parameters(),
        "train_tokens": len(blocks) * cfg.batch_tokens,
        "held_out_tokens": rows.numel(),
        "held_out_loss": round(loss, 4),
        "held_out_bits_per_char": round(loss / 0.6931 * rows.numel() / chars, 4),
        "train_files": len(files),
        "held_out_families": sorted({f.family for f in test}),
    }
    print(summary)
    model.to(torch.bfloat16).save_pretrained(OUT)
    (OUT / "pretrain.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    log = pd.DataFrame([entry for entry in history if "loss" in entry], columns=["step", "loss", "learning_rate"])
    log = log.astype(float)
    log.insert(1, "tokens", log["step"] * cfg.batch_tokens)
    log.to_csv(OUT / "pretrain.csv", index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
