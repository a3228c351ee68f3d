"""DPO under TRL: the loss is the brief's, the forward is the DSA one, what is frozen stays frozen."""

import copy
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig

from dsa import from_dense
from dsa.data.rows import pair_of, tokenize_pair
from dsa.modeling import Qwen2DSAAttention
from dsa.training.dpo import DSADPOTrainer, answer_log_probs, as_dataset, score_pair
from dsa.training.trainer import freeze
from stages import training
from stages.dpo import on_disk
from stages.params import ParamsError
from tests.conftest import ROOT, error_ratio
from tests.test_epochs import fed

BETA = 0.3
PAIRS = [
    ("def f(a):\n    return a\n\nWhat is the signature of `f`?", "def f(a):", "def f(b, c):"),
    ("X = 3\n\nWhat is the value of the constant `X`?", "X = 3", "X = 4000"),
    ("class A(B):\n    pass\n\nWhat is the base class of `A`?", "class A(B):", "class A:"),
    ("Write one word.", "one", "two words"),
]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data/base")


@pytest.fixture
def model(dense_model, tokenizer):
    dense_model.resize_token_embeddings(len(tokenizer))
    return from_dense(dense_model, topk=7, n_heads=2, head_dim=8)


def pairs(count=4):
    rows = [
        {
            "conversations": [{"from": "human", "value": prompt}],
            "chosen": {"from": "gpt", "value": chosen},
            "rejected": {"from": "gpt", "value": rejected},
        }
        for prompt, chosen, rejected in PAIRS
    ]
    return [pair_of(row) for row in rows][:count]


def trainer(model, tokenizer, tmp_path, steps=2, max_length=512, indexer_learning_rate=None, count=4, **options):
    config = DPOConfig(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        beta=BETA,
        max_length=max_length,
        precompute_ref_log_probs=True,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=False,
        dataloader_pin_memory=False,
        activation_checkpointing=False,
        **options,
    )
    return DSADPOTrainer(
        model,
        args=config,
        train_dataset=as_dataset(pairs(count)),
        processing_class=tokenizer,
        indexer_learning_rate=indexer_learning_rate,
    )


def sequence_log_likelihood(model, prompt, answer, max_length):
    """By the definition, one unpadded sequence at a time."""
    ids = torch.tensor([(prompt + answer)[:max_length]])
    log_probs = model(ids, use_cache=False).logits.log_softmax(-1)
    at = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return log_probs[0, at, ids[0, at + 1]].sum()


@pytest.mark.parametrize("max_length", [512, 49])
def test_loss_and_gradient_are_the_briefs_formula(model, tokenizer, tmp_path, max_length):
    """float64; rows of a batch differ in length (padding), and 49 tokens cut some answers short (truncation)."""
    freeze(model, backbone=False, indexer=True)
    model = model.double()
    reference = copy.deepcopy(model)
    dpo = trainer(model, tokenizer, tmp_path, max_length=max_length)
    with torch.no_grad():  # move the policy away from its reference
        for i, parameter in enumerate(model.backbone_parameters()):
            g = torch.Generator().manual_seed(i)
            parameter += 0.02 * torch.randn(parameter.shape, generator=g, dtype=parameter.dtype)
    examples = list(dpo.train_dataset)
    if max_length == 49:
        whole = [len(e["prompt_ids"]) + max(len(e["chosen_ids"]), len(e["rejected_ids"])) for e in examples]
        assert max(whole) > max_length > max(len(e["prompt_ids"]) for e in examples)
    loss = dpo.compute_loss(model, dpo.data_collator(examples))
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    def ratio(m, e):
        likelihoods = [sequence_log_likelihood(m, e["prompt_ids"], e[f"{a}_ids"], max_length) for a in ANSWERS]
        return likelihoods[0] - likelihoods[1]

    with torch.no_grad():
        anchors = [ratio(reference, e) for e in examples]
    margins = torch.stack([ratio(model, e) - anchor for e, anchor in zip(examples, anchors, strict=True)])
    expected = -torch.nn.functional.logsigmoid(BETA * margins).mean()
    expected.backward()
    assert abs(expected.item() - 0.6931) > 0.01
    # TRL keeps the reference's log-probabilities in float32.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert error_ratio(ours[name], parameter.grad) < 1e-5, name


ANSWERS = ("chosen", "rejected")


@pytest.mark.parametrize("indexer", ["frozen", "kl"])
def test_what_is_frozen_does_not_change_by_a_bit(model, tokenizer, tmp_path, indexer):
    freeze(model, backbone=False, indexer=indexer == "frozen")
    before = copy.deepcopy(model.state_dict())
    dpo = trainer(model, tokenizer, tmp_path)
    dpo.train()
    for name, value in model.state_dict().items():
        changes = ".indexer." not in name or indexer == "kl"
        assert torch.equal(value, before[name]) is not changes, name
    logged = [log for log in dpo.state.log_history if "loss" in log]
    assert all(("kl" in log) is (indexer == "kl") for log in logged) and len(logged) == 2
    held = {id(p) for group in dpo.optimizer.param_groups for p in group["params"]}
    assert bool(held & {id(p) for p in model.indexer_parameters()}) is (indexer == "kl")


def test_the_indexers_loss_gives_the_backbone_no_gradient(model, tokenizer, tmp_path):
    """The backbone's gradient is DPO's alone, whether or not the indexer learns beside it."""
    grads = []
    for frozen in (True, False):
        policy = copy.deepcopy(model)
        freeze(policy, backbone=False, indexer=frozen)
        dpo = trainer(policy, tokenizer, tmp_path)
        dpo.compute_loss(policy.train(), dpo.data_collator(list(dpo.train_dataset))).backward()
        grads.append({n: p.grad for n, p in policy.named_parameters() if ".indexer." not in n})
        assert all((p.grad is None) is frozen for p in policy.indexer_parameters())
    assert all(torch.equal(g, grads[1][n]) for n, g in grads[0].items())


def test_sparse_attention_is_on_in_policy_and_reference(model, tokenizer, tmp_path, monkeypatch):
    """TRL replaces the model's forward by one with a fused LM head: the layers must still select."""
    freeze(model, backbone=False, indexer=True)
    calls = []
    select = Qwen2DSAAttention.select

    def counted(self, index, q, k, visible):
        calls.append(self.training)
        return select(self, index, q, k, visible)

    monkeypatch.setattr(Qwen2DSAAttention, "select", counted)
    dpo = trainer(model, tokenizer, tmp_path, steps=1)
    layers = model.config.num_hidden_layers
    assert len(calls) == layers * len(PAIRS) // 2  # the reference, precomputed in batches of two pairs
    dpo.train()
    assert len(calls) == layers * (len(PAIRS) // 2 + 1)

    batch = dpo.data_collator(list(dpo.train_dataset))
    losses = []
    for mode in ("sparse", "dense"):
        model.config.attention_mode = mode
        with torch.no_grad():
            losses.append(dpo.compute_loss(model.eval(), batch).item())
    assert losses[0] != losses[1]


def test_a_batch_of_pairs_stays_whole_where_an_epoch_ends_within_it(model, tokenizer, tmp_path):
    freeze(model, backbone=False, indexer=True)
    dpo = trainer(model, tokenizer, tmp_path, steps=3, count=3, include_num_input_tokens_seen="non_padding")
    seen = fed(dpo)
    result = training.run(dpo, tmp_path)
    assert [len(rows) for rows in seen] == [2 * 2] * 3  # a chosen and a rejected answer for each of two pairs
    dealt = Counter(length for rows in seen for length in rows)
    assert sum(n * length for length, n in dealt.items()) == result["tokens"]
    assert set(dealt.values()) <= {2, 4}


def test_pairs_are_tokenised_as_trl_does(model, tokenizer, tmp_path):
    freeze(model, backbone=False, indexer=True)
    for example, pair in zip(trainer(model, tokenizer, tmp_path).train_dataset, pairs(), strict=True):
        ids = tokenize_pair(tokenizer, pair)
        assert {name: example[name] for name in ids} == ids


def test_a_save_that_is_cut_short_is_made_again(tmp_path, monkeypatch):
    folder, save = tmp_path / "pairs", Dataset.save_to_disk

    def cut_short(self, path):
        save(self, path)
        next(path.glob("*.arrow")).write_bytes(b"")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Dataset, "save_to_disk", cut_short)
        on_disk(pairs(), folder)
    for _ in range(2):  # made, then found
        assert on_disk(pairs(), folder).to_list() == as_dataset(pairs()).to_list()


def test_a_node_of_its_own_file_system_says_so_and_writes_nothing(tmp_path, monkeypatch):
    """Its processes would all write the same files at once, and TRL would miss the log-probabilities afterwards."""
    other = SimpleNamespace(is_main_process=False, main_process_first=nullcontext)
    monkeypatch.setattr("stages.dpo.PartialState", lambda: other)
    with pytest.raises(ParamsError, match="DSA_SCRATCH"):
        on_disk(pairs(), tmp_path / "pairs")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_scores_of_a_pair_are_those_of_the_uncached_forward(model, tokenizer, mode):
    model = model.double().eval()
    model.config.attention_mode = mode
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.backbone_parameters():
            parameter.mul_(1.05)
    example = tokenize_pair(tokenizer, pairs()[0])
    scores = score_pair(model, reference, example)
    with torch.no_grad():
        for m, name in ((model, "policy"), (reference, "reference")):
            for answer in ANSWERS:
                want = sequence_log_likelihood(m, example["prompt_ids"], example[f"{answer}_ids"], None)
                assert getattr(scores, f"{name}_{answer}") == pytest.approx(want.item(), abs=1e-4)
    assert scores.kl > 0 and scores.tokens == len(example["chosen_ids"]) + len(example["rejected_ids"])
    assert score_pair(model, model, example).kl == pytest.approx(0, abs=1e-9)
    assert score_pair(model, model, example).margin == 0
    (whole, own), _ = answer_log_probs(model, example["prompt_ids"], [example["chosen_ids"], [3]])
    assert whole.shape == (len(example["chosen_ids"]), len(tokenizer)) and own.shape == whole.shape[:1]
