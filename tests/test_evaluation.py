import torch

from dsa import from_dense
from dsa.data import IGNORE
from dsa.evaluation import Predictions, answer_spans, attention_mass, evidence_distance, exact_match, predict
from dsa.losses import attention_target


def test_predictions_are_those_of_the_model(dense_model, ids):
    model = from_dense(dense_model, topk=6, n_heads=2, head_dim=8)
    got = predict(model, ids[0].tolist())
    out = model(ids[:1], labels=ids[:1])
    assert abs(got.nll.mean().item() - out.loss.item()) < 1e-5
    assert torch.equal(got.argmax, out.logits[0, :-1].argmax(-1))


def test_spans_distances_and_exact_match():
    ids = [9, 4, 5, 6, 1, 2, 3, 4, 5, 6, 8]  # "4 5 6" stands at 1, is answered at 7, ends with 8
    labels = [IGNORE] * 7 + ids[7:]
    (span,) = answer_spans(labels)
    assert span == (7, 11)
    assert evidence_distance(ids, span) == 8 - 2
    assert evidence_distance([9, 9, 9, 9, 1, 2, 3, 4, 5, 6, 8], span) is None
    argmax = torch.tensor([*ids[1:]])
    assert exact_match(Predictions(torch.zeros(10), argmax), ids, span)
    for wrong in (6, 9):  # the first answer token, the end of the turn
        worse = argmax.clone()
        worse[wrong] = 0
        assert not exact_match(Predictions(torch.zeros(10), worse), ids, span)
    worse = argmax.clone()
    worse[5] = 0  # a prompt token
    assert exact_match(Predictions(torch.zeros(10), worse), ids, span)


def test_exact_match_is_what_greedy_decoding_gives(dense_model, ids):
    model = from_dense(dense_model, topk=6, n_heads=2, head_dim=8)
    greedy = model.generate(ids[:1, :10], max_new_tokens=5, do_sample=False, eos_token_id=-1)[0].tolist()
    assert exact_match(predict(model, greedy), greedy, (10, 15))
    other = [*greedy[:12], (greedy[12] + 1) % 97, *greedy[13:]]
    assert not exact_match(predict(model, other), other, (10, 15))


def test_answer_spans_of_several_turns():
    assert answer_spans([IGNORE, 1, 2, IGNORE, 3]) == [(1, 3), (4, 5)]
    assert answer_spans([IGNORE]) == []


def test_mass_of_a_perfect_indexer_is_the_oracles(dense_model, ids, monkeypatch):
    model = from_dense(dense_model, topk=6, n_heads=2, head_dim=8)
    plain = attention_mass(model, ids, 6)
    assert all(0 < m < o <= 1 for m, o in zip(plain["mass"], plain["oracle_mass"], strict=True))
    assert model.config.attention_mode == "sparse"
    seen = {}

    def perfect(index_q, index_k, weights):
        return seen["p"]

    def target(*args):
        seen["p"] = attention_target(*args)
        return seen["p"]

    monkeypatch.setattr("dsa.evaluation.attention_target", target)
    monkeypatch.setattr("dsa.evaluation.index_scores", perfect)
    best = attention_mass(model, ids, 6)
    assert best["mass"] == best["oracle_mass"] and best["recall"] == [1.0] * 3
