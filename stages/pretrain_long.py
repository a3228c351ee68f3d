"""The next base model: one that retrieves to 16,384 tokens. No stage yet; data/base is that of stages/pretrain.py.

    python -m stages.pretrain_long --scratch FOLDER        # goes on from the last checkpoint there

A plain Qwen2 of 4.5 million parameters, trained at growing lengths on text in import order, look-ups and rows that can
only be solved by reaching back (dsa/data/recall.py). It starts from a constructed induction circuit (`induction`):
layer 0 looks one and two tokens back, the later layers look for what came before the current token. Probes go to
FOLDER/probes.jsonl at every checkpoint.
"""

import argparse
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from dsa.data import corpus
from dsa.data.import_order import in_import_order
from dsa.data.recall import Recall, Row, positions
from dsa.data.rows import encode, messages_of, render
from dsa.evaluation.retrieval import exact
from stages import params
from stages.pretrain import MuonWithAdamW

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
THETA = 1.0e6


@dataclass
class Phase:
    """Steps of rows of one length. `mix`: how often each kind of row; `far`: the most positions that a row spans by
    jumps, which a share `gaps` of the rows has; the learning rate (of Muon) goes from `lr` to the next phase's."""

    length: int
    rows: int
    steps: int
    mix: dict[str, float]
    lr: float
    far: int = 0
    gaps: float = 0.0
    most: int = 10**9


FIRST = {"stream": 0.4, "table": 0.15, "copy": 0.2, "needles": 0.1, "text": 0.15}
RECALL = {"stream": 0.35, "table": 0.3, "needles": 0.2, "copy": 0.05, "text": 0.1}
TEXT = {"text": 0.55, "lookup": 0.12, "stream": 0.11, "table": 0.11, "needles": 0.09, "copy": 0.02}
LONG = {"text": 0.2, "lookup": 0.1, "stream": 0.25, "table": 0.25, "needles": 0.18, "copy": 0.02}
PHASES = [
    Phase(
        256, 16, 450, {"stream": 0.4, "table": 0.15, "copy": 0.2, "needles": 0.1, "text": 0.15}, 3e-3, 16384, 0.3, 32
    ),
    Phase(512, 8, 450, RECALL, 3e-3, 16384, 0.4),
    Phase(1024, 4, 4200, TEXT, 3e-3, 20480, 0.4),
    Phase(1024, 6, 300, LONG, 1.5e-3, 20480, 0.9),
    Phase(4096, 1, 700, LONG, 8e-4, 20480, 0.6),
    Phase(16384, 1, 60, LONG, 4e-4),
]
LAST_LR = 5e-5


class Steps(Dataset):
    """One optimiser step an item, made from its number alone: a run goes on anywhere."""

    def __init__(self, recall: Recall, lookup, phases: list[Phase], seed: int):
        self.recall, self.lookup, self.phases, self.seed = recall, lookup, phases, seed
        self.ends = torch.tensor([p.steps for p in phases]).cumsum(0).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def phase(self, step: int) -> tuple[int, float]:
        """Its number, and how much of it is done."""
        i = next((i for i, end in enumerate(self.ends) if step < end), len(self.ends) - 1)
        return i, (step - self.ends[i] + self.phases[i].steps) / self.phases[i].steps

    def __getitem__(self, step: int) -> dict:
        rng, phase = random.Random(f"{self.seed}-{step}"), self.phases[self.phase(step)[0]]
        make = self.recall.kinds | {"lookup": self.lookup}
        kinds = rng.choices(list(phase.mix), list(phase.mix.values()), k=phase.rows)
        rows = [make[kind](rng, phase.length + 1, phase.most) for kind in kinds]
        span = [phase.far if rng.random() < phase.gaps else 0 for _ in rows]
        return {
            "input_ids": torch.tensor([row.ids for row in rows]),
            "weights": torch.tensor([row.weights for row in rows]),
            "position_ids": torch.stack([positions(rng, phase.length, far) for far in span]),
            "kinds": kinds,
        }

    def learning_rate(self, step: int) -> float:
        i, done = self.phase(step)
        rates = [p.lr for p in self.phases] + [LAST_LR]
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


@torch.no_grad()
def induction(model: Qwen2ForCausalLM, heads: int = 2, back=(1, 2), peak=14.0, match=2.5, copy=2.0) -> None:
    """Write an induction circuit into random weights.

    Layer 0: heads that look exactly so many tokens back, by the biases of q and k alone: in RoPE's fast pairs q is k's
    bias turned by the distance. Later layers: `heads` query heads of each key-value head, and its key, begin with one
    shared projection in the slow pairs, q of the token itself and k of what layer 0 wrote about the token before; layer
    1 also copies what it finds.
    """
    config, layers = model.config, [layer.self_attn for layer in model.model.layers]
    D, hidden = config.head_dim, config.hidden_size
    half, group = D // 2, config.num_attention_heads // config.num_key_value_heads
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    generator = torch.Generator().manual_seed(0)
    reads, writes, copied = (torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))[0] for _ in range(3))
    for name, p in model.named_parameters():
        if "embed" in name:
            p.mul_(hidden**-0.5 / config.initializer_range)  # tied: at 0.02 the largest logit would be about 5

    fast, first = min(10, half), layers[0]
    amplitude = min(12.0, math.sqrt(peak * math.sqrt(D) / (1 - frequency[:fast].cos()).sum().item()))
    first.k_proj.bias[:fast] = amplitude
    first.k_proj.weight[:D] *= 0.3
    first.v_proj.weight[:D] = reads[:D]
    for head, distance in enumerate(back):
        angle, rows = -frequency[:fast] * distance, slice(head * D, (head + 1) * D)
        first.q_proj.bias[rows.start : rows.start + fast] = amplitude * angle.cos()
        first.q_proj.bias[rows.start + half : rows.start + half + fast] = amplitude * angle.sin()
        first.q_proj.weight[rows] *= 0.3
        first.o_proj.weight[:, rows] = writes[:, rows] * (0.04 * math.sqrt(hidden / D))
    slow = torch.arange(half)[int(half * 3 / 8) :]
    slow = torch.cat([slow, slow + half])
    for number, layer in enumerate(layers[1:], 1):
        for kv in range(config.num_key_value_heads):
            layer.k_proj.weight[kv * D + slow] += match * writes[:, : len(slow)].T
            if number == 1:
                layer.v_proj.weight[kv * D : (kv + 1) * D] += copy / 2 * copied[kv * D : (kv + 1) * D]
            for head in range(kv * group, kv * group + heads):
                layer.q_proj.weight[head * D + slow] += match * reads[: len(slow)]
                if number == 1:
                    layer.o_proj.weight[:, head * D : (head + 1) * D] += copy / 4 * copied[kv * D : (kv + 1) * D].T


class ResumableMuon(MuonWithAdamW):
    """Its state can be saved and loaded, as a run that goes on from a checkpoint needs."""

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, of_part in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(of_part)
        self.param_groups[:] = [group for part in self.parts for group in part.param_groups]


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
        with torch.autocast(model.device.type, torch.bfloat16):
            losses.append(model(input_ids=row[None], labels=row[None], use_cache=False).loss.item())
    chars = len(tokenizer.decode(blocks.flatten()))
    return sum(losses) / len(losses) * (length - 1) * len(losses) / math.log(2) / chars


def measure(model, tokenizer, held_out: Recall, lengths: list[int], rows: int) -> dict:
    model.eval()
    result = {"bits_per_char": round(bits_per_char(model, tokenizer, held_out.text, 2048, 4 * rows), 4)}
    for length in lengths:
        for name, make in (("pairs", held_out.pairs_row), ("needles", held_out.needles_row)):
            right = [right for seed in range(rows) for right in exact(model, make(seed, length))]
            result[f"{name}_{length}"] = round(sum(right) / len(right), 3)
    model.train()
    return result


class Probe(TrainerCallback):
    """Measures at every checkpoint, in a few seconds."""

    def __init__(self, dataset: Steps, tokenizer, held_out: Recall, path: Path):
        self.dataset, self.tokenizer, self.held_out, self.path = dataset, tokenizer, held_out, path

    def on_save(self, args, state, control, model=None, **kwargs):
        longest = self.dataset.phases[self.dataset.phase(state.global_step)[0]].length
        lengths = sorted({512, 2048, max(512, longest)})
        result = {"step": state.global_step} | measure(model, self.tokenizer, self.held_out, lengths, 2)
        print(json.dumps(result), flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = params.load(profile="cpu").data
    tokenizer = AutoTokenizer.from_pretrained("data/base")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    train, test, _ = corpus.separate(corpus.source_files(data.packages), data.test_fraction)
    cached = args.scratch / "text.pt"
    args.scratch.mkdir(parents=True, exist_ok=True)
    if not cached.exists():

        def tokens(files):
            encoded = tokenizer([f.text for f in files], add_special_tokens=False, verbose=False)["input_ids"]
            return torch.tensor([t for ids in encoded for t in [*ids, end]])

        torch.save({"train": tokens(in_import_order(train)), "test": tokens(in_import_order(test))}, cached)
    text = torch.load(cached)
    recall, held_out = Recall(tokenizer, text["train"]), Recall(tokenizer, text["test"])
    dataset = Steps(recall, lookup_rows(tokenizer, train, recall.snippet), PHASES, seed=0)
    print(f"{len(train)} files, {len(text['train']):,} tokens, {len(dataset)} steps", flush=True)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **SHAPE,
            vocab_size=len(tokenizer),
            rope_parameters={"rope_type": "default", "rope_theta": THETA},
            max_position_embeddings=max(p.length for p in PHASES),
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=end,
        )
    )
    induction(model)
    optimizer = ResumableMuon(model, 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, dataset.learning_rate)
    arguments = TrainingArguments(
        output_dir=str(args.scratch / "run"),
        max_steps=len(dataset),
        per_device_train_batch_size=1,
        max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(),
        bf16=True,
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
        optimizers=(optimizer, scheduler),
        callbacks=[Probe(dataset, tokenizer, held_out, args.scratch / "probes.jsonl")],
    )
    last = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).exists() else None
    trainer.train(resume_from_checkpoint=last)


if __name__ == "__main__":
    main()
