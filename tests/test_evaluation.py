import torch

from dsa import from_dense
from dsa.data.rows import IGNORE
from dsa.evaluation.predictions import answer_spans, attention_mass, correct, evidence_distance, predict
from dsa.reference import attention_target
from stages.evaluate import selection


def test_predictions_are_those_of_the_model(dense_model, ids):
    model = from_dense(dense_model, topk=6, n_heads=2, head_dim=8)
    got = predict(model, ids[0].tolist())
    out = model(ids[:1], labels=ids[:1])
    assert abs(got.nll.mean().item() - out.loss.item()) < 1e-5
    assert torch.equal(got.argmax, out.logits[0, :-1].argmax(-1))


def test_distance_is_to_the_nearest_place_of_the_same_text():
    pieces = ["a", "  def", " f(x):\n", "z", "?", "def", " f(", "x):", "<|im_end|>"]  # cut into other tokens
    assert evidence_distance(pieces, (5, 9)) == 5 - 1
    assert evidence_distance(["a", "b", "c", "<|im_end|>"], (2, 4)) is None
    assert evidence_distance(["c", "c", "b", "c", "<|im_end|>"], (3, 5)) == 2
    assert evidence_distance(["a", "<|im_end|>"], (1, 2)) is None


def test_all_correct_is_what_greedy_decoding_gives(dense_model, ids):
    model = from_dense(dense_model, topk=6, n_heads=2, head_dim=8)
    greedy = model.generate(ids[:1, :10], max_new_tokens=5, do_sample=False, eos_token_id=-1)[0].tolist()
    assert correct(predict(model, greedy), greedy, (10, 15)).all()
    other = [*greedy[:12], (greedy[12] + 1) % 97, *greedy[13:]]
    assert correct(predict(model, other), other, (10, 13)).tolist() == [True, True, False]


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

    monkeypatch.setattr("dsa.evaluation.predictions.attention_target", target)
    monkeypatch.setattr("dsa.evaluation.predictions.index_scores", perfect)
    best = attention_mass(model, ids, 6)
    assert best["mass"] == best["oracle_mass"] and best["recall"] == [1.0] * 3


def test_rows_that_are_not_longer_than_k_do_not_count_as_missed(dense_model, ids):
    model = from_dense(dense_model, topk=6, n_heads=2, head_dim=8)
    long, short = {"input_ids": ids[0].tolist()}, {"input_ids": ids[1, :6].tolist()}
    assert selection(model, [long, short], 6) == selection(model, [long], 6)
    assert selection(model, [short, short], 6) == {name: [1.0] * 3 for name in ("mass", "oracle_mass", "recall")}
