"""Preference optimisation (DPO) of dense and DSA models by TRL, and its evaluation pair by pair.

loss = -log sigmoid(beta * ((log pi_c - log pi_r) - (log ref_c - log ref_r))), on sequence log-likelihoods of the chosen
and the rejected answer, averaged over pairs (Rafailov et al. 2023, eq. 7).
"""

from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import DynamicCache
from trl import DPOTrainer

from dsa.modeling import DSAForCausalLM, IndexerLoss
from dsa.training.trainer import SplitOptimizer, WholeBatches


class DSADPOTrainer(WholeBatches, SplitOptimizer, DPOTrainer):
    """TRL's DPOTrainer, which trains whatever of the model is not frozen.

    TRL runs the backbone and scores the LM head in tiles itself: the layers, and with them sparse attention, are the
    model's own in policy and reference, but `DSAForCausalLM.forward` is passed by. So where the indexer is
    trained, its loss is collected here. DPO's own loss gives it no gradient.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.trains_indexer:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        indexer_loss = IndexerLoss()
        inputs = dict(inputs) | {"observer": indexer_loss}  # TRL hands what it does not know to the model
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        kl = torch.stack(indexer_loss.kl)
        kl_everywhere = self.accelerator.gather(kl.detach().mean()).mean().item()
        self._metrics["train" if model.training else "eval"]["kl"].append(kl_everywhere)
        return (result[0] + kl.sum(), result[1]) if return_outputs else result + kl.sum()


def as_dataset(pairs: list[dict]) -> Dataset:
    """Pairs of `dsa.data.rows.pair_of` with the columns that TRL knows."""
    return Dataset.from_list([{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in pairs])


@dataclass
class PairScores:
    """Of one pair, in nats: log-likelihoods of its answers, and the policy's drift from the reference on them.

    kl: KL(policy || reference) of the next-token distribution, summed over the `tokens` positions of both answers.
    """

    policy_chosen: float
    policy_rejected: float
    reference_chosen: float
    reference_rejected: float
    kl: float
    tokens: int

    @property
    def margin(self) -> float:
        """Of the implicit rewards, over beta: how much more the policy prefers the chosen answer than the reference."""
        policy, reference = self.policy_chosen - self.policy_rejected, self.reference_chosen - self.reference_rejected
        return policy - reference


@torch.no_grad()
def answer_log_probs(
    model: DSAForCausalLM, prompt: list[int], answers: list[list[int]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Next-token log-probabilities at every position of each answer, [L, V], and those of its own tokens, [L].

    The prompt runs once; the answers go on from its cache together, padded on the right, where no token sees it.
    """
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([prompt], device=model.device)
    head = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits  # (1, 1, V)
    cache.batch_repeat_interleave(len(answers))
    longest = max(map(len, answers))
    ids = torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers], device=model.device)
    tail = model(ids, past_key_values=cache, use_cache=True).logits[:, :-1]
    log_probs = torch.cat([head.expand(len(answers), -1, -1), tail], dim=1).float().log_softmax(-1)
    own = log_probs.gather(2, ids[..., None])[..., 0]
    return [(log_probs[i, : len(answer)], own[i, : len(answer)]) for i, answer in enumerate(answers)]


def score_pair(policy: DSAForCausalLM, reference: DSAForCausalLM, example: dict) -> PairScores:
    """Score a pair of `dsa.data.rows.tokenize_pair`."""
    answers = [example["chosen_ids"], example["rejected_ids"]]
    ours = answer_log_probs(policy, example["prompt_ids"], answers)
    theirs = answer_log_probs(reference, example["prompt_ids"], answers)
    kl = sum((p.exp() * (p - q)).sum().item() for (p, _), (q, _) in zip(ours, theirs, strict=True))
    sums = [own.double().sum().item() for _, own in (*ours, *theirs)]
    return PairScores(*sums, kl=kl, tokens=sum(map(len, answers)))
