"""Two processes, started as a user starts them, take the steps of one.

accelerate shards nothing on a CPU by itself: for FSDP2 the processes tell it that they are GPUs, and all
that follows is what runs on them, over gloo.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig

from dsa import Qwen2DSAForCausalLM, from_dense
from dsa.data.rows import Collator
from dsa.training import tiles
from dsa.training.dpo import DSADPOTrainer
from dsa.training.trainer import DSATrainer
from stages import training
from stages.dpo import on_disk
from stages.params import Training
from tests.conftest import ROOT, small_model
from tests.test_preference import pairs
from tests.test_training import examples, model_for

STEPS, STAGES = 4, {"ddp": ("warmup", "sparse", "dpo"), "fsdp2": ("warmup", "sparse")}
SHOWN = ("rows", "lm_loss", "kl", "rewards/margins", "grad_norm")


def arguments(kind: type[TrainingArguments], options: dict, sharded: bool) -> TrainingArguments:
    found = kind(**options)
    assert found.device.type == "cpu"  # from here on its processes know each other
    if sharded:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return found


def model_of(stage: str) -> Qwen2DSAForCausalLM:
    if stage != "dpo":
        return model_for(small_model(), stage)
    dense = small_model()
    dense.resize_token_embeddings(4096)
    return from_dense(dense, topk=7, n_heads=2, head_dim=8)


def trainer_of(stage: str, folder: Path, sharded: bool) -> Trainer:
    section = Training(steps=STEPS, batch_size=4, learning_rate=1e-2)
    options = training.trainer_options(section, folder, seed=3)
    options |= {"save_steps": 2, "save_total_limit": None, "bf16": False}
    if stage != "dpo":
        rows = {"train_dataset": examples(11), "data_collator": Collator(0)}
        return DSATrainer(
            model_of(stage), arguments(TrainingArguments, options, sharded), indexer_learning_rate=2e-2, **rows
        )
    options |= {"precompute_ref_log_probs": True, "max_length": 512}
    config = arguments(DPOConfig, options, sharded)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/base")
    return DSADPOTrainer(
        model_of(stage), args=config, train_dataset=on_disk(pairs(), folder / "pairs"), processing_class=tokenizer
    )


class Kill(TrainerCallback):
    """Of the second process, in the middle of the third step."""

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def run(stage: str, folder: Path, sharded: bool, killed: bool = False) -> None:
    """Train, twice: once through, and on from the checkpoint in the middle. Leaves results and the whole model."""
    for name in ("through", "resumed"):
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = trainer_of(stage, folder / stage, sharded)
        assert trainer.is_fsdp_enabled == sharded
        if killed:
            trainer.add_callback(Kill())
        result = training.run(trainer, folder / stage)
        model = training.whole(trainer)
        if model is not None:
            logs = [log for log in trainer.state.log_history if "loss" in log]
            result["losses"] = [[log[key] for key in SHOWN if key in log] for log in logs]
            model.save_pretrained(folder / f"{stage}-{name}")
            (folder / f"{stage}-{name}.json").write_text(json.dumps(result), encoding="utf-8")
            shutil.rmtree(folder / stage / f"checkpoint-{STEPS}")
        trainer.accelerator.wait_for_everyone()


def results(folder: Path, stage: str, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    found = json.loads((folder / f"{stage}-{name}.json").read_text(encoding="utf-8"))
    return found, load_file(folder / f"{stage}-{name}" / "model.safetensors")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What a single process does."""
    return launched(tmp_path_factory.mktemp("one"), None)


def start(folder: Path, config: str | None, *stages: str) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--quiet"]
    if config:
        command += ["--config_file", f"configs/accelerate/{config}.yaml", "--num_processes", "2"]
    command += ["--main_process_port", "0"] if config else ["--cpu"]
    command += ["-m", "tests.test_processes", str(folder), str(config), *stages]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def launched(folder: Path, config: str | None, *stages: str) -> Path:
    done = start(folder, config, *stages)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_two_processes_take_the_steps_of_one(config, one, tmp_path):
    two = launched(tmp_path, config)
    for stage in STAGES[config]:
        expected, weights = results(one, stage, "through")
        for name in ("through", "resumed"):
            found, ours = results(two, stage, name)
            assert found["resumed_at_step"] == (2 if name == "resumed" else 0)
            torch.testing.assert_close(
                torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=1e-4, atol=1e-6
            )
            assert found["tokens"] == expected["tokens"]
            assert found["trained_parameters"] == expected["trained_parameters"]
            assert ours.keys() == weights.keys()
            for key, value in weights.items():
                assert ours[key].shape == value.shape and (ours[key] - value).norm() <= 2e-2 * value.norm(), key
        before = model_of(stage).state_dict()
        if stage == "warmup":
            frozen = [key for key in ours if ".indexer." not in key]
            assert frozen and all(torch.equal(ours[key], before[key]) for key in frozen)


@pytest.mark.slow
def test_where_one_of_two_is_killed_both_end_and_the_next_run_goes_on(one, tmp_path):
    first = start(tmp_path, "ddp", "sparse", "killed")
    assert first.returncode != 0 and not (tmp_path / "sparse-through").exists()
    found, ours = results(launched(tmp_path, "ddp", "sparse"), "sparse", "through")
    expected, weights = results(one, "sparse", "through")
    assert found["resumed_at_step"] == 2 and found["tokens"] == expected["tokens"]
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=1e-4, atol=1e-6)
    assert all((ours[key] - value).norm() <= 2e-2 * value.norm() for key, value in weights.items())


if __name__ == "__main__":
    if sys.argv[2] != "None":
        tiles.LOGITS_BYTES, tiles.DEVICES = (
            0,
            ("cpu",),
        )  # two processes compute the loss in tiles, of a sharded head too; one does not
    asked = [name for name in sys.argv[3:] if name != "killed"]
    for stage in asked or STAGES.get(sys.argv[2], STAGES["ddp"]):
        run(stage, Path(sys.argv[1]), sys.argv[2] == "fsdp2", "killed" in sys.argv)
