"""Where an epoch ends within a batch: the batch stays whole, and what is reported is what was trained on.

11 rows in batches of 4. accelerate #684 and #776, transformers #14309: a last step of 3 rows, or of 4 with one taken
twice where there are two processes, and all of them counted as full.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from stages import training
from stages.checkpoints import Seal
from tests.conftest import ROOT, small_model
from tests.test_training import examples, model_for, train, trainer_for

ROWS, BATCH, STEPS = 11, 4, 6  # two epochs and two rows
SHOWN = ("rows", "lm_loss", "kl", "grad_norm")


def losses(trainer) -> list[list[float]]:
    return [[log[key] for key in SHOWN] for log in trainer.state.log_history if "loss" in log]


def fed(trainer) -> list[list[int]]:
    """The lengths of the rows of each forward pass, filled in while it trains."""
    seen, compute_loss = [], trainer.compute_loss

    def spy(model, inputs, *args, **kwargs):
        seen.append(inputs["attention_mask"].sum(-1).tolist())
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = spy
    return seen


@pytest.mark.parametrize("micro,accumulate", [(4, 1), (2, 2), (1, 4)])
def test_every_step_has_the_whole_batch_and_every_epoch_all_rows(dense_model, tmp_path, micro, accumulate):
    trainer = trainer_for(model_for(dense_model, "sparse"), tmp_path, micro, accumulate, STEPS, ROWS)
    seen = fed(trainer)
    result = training.run(trainer, tmp_path)
    assert [len(rows) for rows in seen] == [micro] * (STEPS * accumulate)
    dealt = [length for rows in seen for length in rows]  # each row has a length of its own
    lengths = sorted(len(row["input_ids"]) for row in examples(ROWS))
    assert sorted(dealt[:ROWS]) == sorted(dealt[ROWS : 2 * ROWS]) == lengths
    assert dealt[:ROWS] != dealt[ROWS : 2 * ROWS]
    assert result["tokens"] == sum(dealt) and [rows for rows, *_ in losses(trainer)] == [BATCH] * STEPS


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(dense_model, tmp_path):
    one = losses(train(model_for(dense_model, "sparse"), tmp_path, BATCH, 1, STEPS, ROWS))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--module", "tests.test_epochs", str(tmp_path / "two.json")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two.json").read_text(encoding="utf-8"))
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(one), rtol=1e-3, atol=1e-5)
    lengths = [len(row["input_ids"]) for row in examples(ROWS)]
    assert 2 * sum(lengths) < two["tokens"] < 2 * sum(lengths) + 2 * max(lengths)


@pytest.mark.parametrize("killed_at,resumed_at", [(3, 2), (4, 2), (6, 6)])
def test_a_run_that_was_killed_counts_what_came_before(dense_model, tmp_path, killed_at, resumed_at):
    class Kill(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):  # before a checkpoint is saved
            if state.global_step == killed_at < STEPS:
                raise KeyboardInterrupt

        def on_save(self, args, state, control, **kwargs):
            if state.global_step == killed_at:
                raise KeyboardInterrupt

    whole = trainer_for(model_for(dense_model, "sparse"), tmp_path / "a", 2, 2, STEPS, ROWS, save_steps=2)
    expected = training.run(whole, tmp_path / "a")
    setup = (tmp_path / "b", 2, 2, STEPS, ROWS)
    with pytest.raises(KeyboardInterrupt):
        train(model_for(dense_model, "sparse"), *setup, save_steps=2, callbacks=[Seal(), Kill()])
    again = trainer_for(model_for(dense_model, "sparse"), *setup, save_steps=2)
    result = training.run(again, tmp_path / "b")
    assert result["resumed_at_step"] == resumed_at
    assert result["tokens"] == expected["tokens"] and losses(again) == losses(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


if __name__ == "__main__":
    out = Path(sys.argv[1])
    trainer = trainer_for(model_for(small_model(), "sparse"), out.parent, 2, 1, STEPS, ROWS)
    result = training.run(trainer, out.parent / "none")
    if trainer.is_world_process_zero():
        out.write_text(json.dumps({"losses": losses(trainer), "tokens": result["tokens"]}), encoding="utf-8")
