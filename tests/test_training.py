"""What is frozen, which loss, and that nothing depends on how a batch is cut."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from transformers import TrainingArguments

from dsa import from_dense
from dsa.data.rows import IGNORE, Collator
from dsa.machine import supports_bf16
from dsa.training.trainer import DSATrainer, freeze
from stages import training
from stages.params import ParamsError, Training
from stages.training import split_batch


def examples(count=8):
    g = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        length = 20 + 3 * i  # padding differs from row to row
        ids = torch.randint(2, 97, (length,), generator=g).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE] * (5 + i) + ids[5 + i :]})
    return rows


def trainer_for(
    model, tmp_path, micro=4, accumulate=1, steps=2, rows=8, callbacks=(), save_steps=None, bf16=False, **kwargs
):
    arguments = TrainingArguments(
        bf16=bf16,
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 1,
        include_num_input_tokens_seen="non_padding",
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=False,
        seed=3,
    )
    kwargs |= {"train_dataset": examples(rows), "data_collator": Collator(0), "callbacks": list(callbacks)}
    return DSATrainer(model, arguments, **kwargs)


def train(*args, **kwargs):
    trainer = trainer_for(*args, **kwargs)
    trainer.train()
    return trainer


def model_for(dense_model, stage):
    if stage == "dense":
        return from_dense(dense_model, topk=1, n_heads=0, head_dim=8, attention_mode="dense")
    if stage == "window":
        return from_dense(dense_model, topk=6, n_heads=0, head_dim=8, selector="window")
    model = from_dense(
        dense_model, topk=6, n_heads=4, head_dim=8, attention_mode="dense" if stage == "warmup" else "sparse"
    )
    freeze(model, backbone=stage == "warmup", indexer=False)
    return model


@pytest.mark.parametrize("stage", ["dense", "warmup", "sparse", "window"])
def test_each_stage_trains_its_part_and_nothing_else(dense_model, tmp_path, stage):
    model = model_for(dense_model, stage)
    before = copy.deepcopy(model.state_dict())
    trainer = train(model, tmp_path)
    for name, value in model.state_dict().items():
        trained = (".indexer." in name) if stage == "warmup" else True
        assert torch.equal(value, before[name]) is not trained, name
    (first, *_) = (log for log in trainer.state.log_history if "loss" in log)
    assert ("lm_loss" in first) is (stage != "warmup")
    assert ("kl" in first) is (stage in ("warmup", "sparse"))


def test_warmup_keeps_no_optimizer_state_of_the_backbone(dense_model, tmp_path):
    model = model_for(dense_model, "warmup")
    trainer = train(model, tmp_path)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.indexer_parameters()}
    assert {id(p) for p in trainer.optimizer.state} == held


def test_sparse_has_separate_groups_and_learning_rates(dense_model, tmp_path):
    model = model_for(dense_model, "sparse")
    trainer = train(model, tmp_path, indexer_learning_rate=5e-2)
    groups = trainer.optimizer.param_groups
    indexer = {id(p) for p in model.indexer_parameters()}
    (own,) = [g for g in groups if {id(p) for p in g["params"]} & indexer]
    assert {id(p) for p in own["params"]} == indexer and own["weight_decay"] == 0
    assert own["initial_lr"] == 5e-2 and all(g["initial_lr"] == 1e-2 for g in groups if g is not own)


def test_the_two_gradients_are_clipped_apart(dense_model, tmp_path):
    model = model_for(dense_model, "sparse")
    trainer = train(model, tmp_path, steps=1)
    for parameters, scale in ((model.backbone_parameters(), 1e3), (model.indexer_parameters(), 1e-3)):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, scale / sum(p.numel() for p in parameters) ** 0.5)
    trainer._clip_grad_norm(model)

    def norm(parameters):
        return torch.stack([p.grad.norm() for p in parameters]).norm().item()

    assert norm(model.backbone_parameters()) == pytest.approx(1.0, rel=1e-3)
    assert norm(model.indexer_parameters()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("stage", ["dense", "warmup", "sparse"])
def test_losses_and_steps_do_not_depend_on_how_the_batch_is_cut(dense_model, tmp_path, stage):
    runs = []
    for micro, accumulate in ((4, 1), (2, 2), (1, 4)):
        model = model_for(dense_model, stage)
        trainer = train(model, tmp_path, micro, accumulate, steps=2)
        logs = [log for log in trainer.state.log_history if "loss" in log]
        runs.append((logs, model.state_dict()))
    for logs, state in runs[1:]:
        for log, reference in zip(logs, runs[0][0], strict=True):
            for key in reference:
                if key == "loss" or "kl" in key or "lm_loss" in key:
                    assert log[key] == pytest.approx(reference[key], rel=1e-4), key
        for name, value in state.items():
            torch.testing.assert_close(value, runs[0][1][name], rtol=1e-2, atol=2e-4, msg=name)


def test_without_indexer_training_no_indexer_gradient_exists(dense_model, ids):
    model = model_for(dense_model, "sparse")
    freeze(model, backbone=False, indexer=True)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in model.indexer_parameters())


def test_a_processor_without_mkldnn_trains_in_float32(monkeypatch):
    """PyTorch for Apple's or Arm's processors is built without it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert not supports_bf16()


@pytest.mark.parametrize("asked", ["0", "two", "-1", ""])
def test_a_micro_batch_that_is_no_number_of_rows_is_named(monkeypatch, asked):
    monkeypatch.setenv("DSA_MICRO_BATCH", asked)
    with pytest.raises(ParamsError, match="DSA_MICRO_BATCH"):
        split_batch(4)


def test_the_global_batch_is_split_over_processes(monkeypatch):
    monkeypatch.setenv("DSA_MICRO_BATCH", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert split_batch(16) == (2, 2)
    with pytest.raises(ParamsError, match="12 rows cannot be split over 4 processes of 2"):
        split_batch(12)


@pytest.fixture
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("launcher,supported", [("bf16", False), ("no", True), ("fp16", False)])
def test_accelerates_own_config_sets_no_precision(
    dense_model, tmp_path, monkeypatch, fresh_accelerate, launcher, supported
):
    """transformers #32622: `mixed_precision` of the user's default config came in by the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setattr(training, "supports_bf16", lambda: supported)
    model, seen = model_for(dense_model, "dense"), set()
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    options = training.trainer_options(Training(steps=1, batch_size=2, learning_rate=0.01), tmp_path, seed=0)
    arguments = TrainingArguments(**options)
    trainer = DSATrainer(model, arguments, train_dataset=examples(), data_collator=Collator(0))
    result = training.run(trainer, tmp_path)
    assert seen == {torch.bfloat16 if supported else torch.float32}
    assert result["precision"] == ("bfloat16 autocast" if supported else "float32")
    assert trainer.accelerator.state.dynamo_plugin.backend == DynamoBackend.NO


@pytest.mark.parametrize("name", ["USE_DEEPSPEED", "USE_PARALLELISM_CONFIG", "USE_MEGATRON_LM", "USE_CPU"])
def test_what_accelerates_config_asks_for_in_vain_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_{name}", "True")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ParamsError, match=f"accelerate's config: {name.lower()}"):
        training.trainer_options(Training(steps=1, batch_size=2, learning_rate=0.01), tmp_path, seed=0)


@pytest.mark.parametrize("name,value", [("FSDP_VERSION", "1"), ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")])
def test_fsdp_of_another_kind_than_was_tried_is_named(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    section = Training(steps=1, batch_size=2, learning_rate=0.01)
    training.trainer_options(section, tmp_path, seed=0)
    monkeypatch.setenv(name, value)
    with pytest.raises(ParamsError, match=f"accelerate's config: {name.lower()}: {value} is not"):
        training.trainer_options(section, tmp_path, seed=0)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_a_trained_model_has_nothing_left_of_the_trainings_autocast(dense_model, tmp_path, fresh_accelerate, stage):
    """accelerate wraps `forward` for good: DPO would score the policy in bfloat16 and its reference in float32."""
    trainer = trainer_for(model_for(dense_model, stage), tmp_path, bf16=True)
    trainer.train()
    ids = torch.arange(3, 15)[None]
    trained = training.whole(trainer).eval()
    again = type(trained)(trained.config).eval()
    again.load_state_dict(trained.state_dict())
    with torch.no_grad():
        assert torch.equal(trained(ids).logits, again(ids).logits)
