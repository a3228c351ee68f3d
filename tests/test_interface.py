"""What transformers decides by looking at `forward`: a parameter hidden behind **kwargs is one that it does not use."""

import inspect

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments, default_data_collator

from dsa import from_dense, modeling

CLASSES = ("Qwen2DSAAttention", "Qwen2DSADecoderLayer", "Qwen2DSAModel", "Qwen2DSAForCausalLM")
MORE = {
    "Qwen2DSAAttention": ["position_ids", "observer", "index_rotation"],
    "Qwen2DSAForCausalLM": ["output_indexer_kl"],
}


@pytest.fixture(params=["sparse", "dense"])
def model(request, dense_model):
    return from_dense(dense_model, topk=6, n_heads=4, head_dim=8, attention_mode=request.param)


@pytest.mark.parametrize("name", CLASSES)
def test_forward_shows_every_parameter_of_the_base(name):
    def shown(cls):
        return [(p.name, p.kind, p.default) for p in inspect.signature(cls.forward).parameters.values()]

    ours = getattr(modeling, name)
    theirs = getattr(modeling, name.replace("DSA", ""))
    *named, rest = shown(theirs)
    assert shown(ours)[: len(named)] == named and shown(ours)[-1] == rest
    more = [parameter for parameter, *_ in shown(ours)[len(named) : -1]]
    assert more == MORE.get(name, [])


def test_generate_computes_no_logits_of_the_prompt_but_the_last(model, ids):
    """transformers #31292. With 151,936 ids and a prompt of 32K they would be 20 GB."""
    positions = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: positions.append(inputs[0].shape[1]))
    model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert positions == [1, 1, 1]


def test_generate_infers_left_padding_without_a_mask(dense_model, model, ids):
    """transformers #47530: as Qwen2's own does, from the padding token."""
    ids[0, :7] = dense_model.config.pad_token_id

    def logits(model, **kwargs):
        options = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        return torch.stack(model.generate(ids, **options, **kwargs).logits)

    inferred = logits(model)
    assert torch.equal(inferred, logits(model, attention_mask=(ids != 0).long()))
    if model.config.attention_mode == "dense":
        assert torch.equal(inferred, logits(dense_model))


def test_a_plain_trainer_keeps_the_models_columns_and_drops_others(model, ids, tmp_path):
    """transformers #17426: it keeps what `forward` names."""
    rows = {"input_ids": ids.tolist(), "labels": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    dataset = Dataset.from_dict(rows | {"source": ["a", "b"]})
    trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=default_data_collator)
    (batch,) = trainer.get_train_dataloader()
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert trainer.train().training_loss > 0


def test_a_tuple_holds_the_indexers_loss_last(model, ids):
    """transformers #27106."""
    whole = model(ids, labels=ids, output_indexer_kl=True)
    *_, kl = model(ids, labels=ids, output_indexer_kl=True, return_dict=False)
    assert torch.equal(kl, whole.indexer_kl)
    loss, logits, *_ = model(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, whole.loss) and torch.equal(logits, whole.logits)
