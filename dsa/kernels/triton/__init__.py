"""Triton kernels: sparse attention, index scores and the indexer's loss, forward and backward.

Every gradient is deterministic (no atomics), and nothing of size T x S is stored but the slab of index scores that a
caller asks for.

    attention.py    forward and the query-owned half of the backward
    decode.py       few queries, many keys: split the keys over programs, then merge
    inverse.py      which queries selected a key: the key-owned half of every sparse backward
    indexer.py      index scores
    losses.py       the indexer's KL: over all visible keys in dense_kl.py, over the selected ones in sparse_kl.py
"""
