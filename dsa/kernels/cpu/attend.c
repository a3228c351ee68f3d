// Attention of each query over its own selected keys, and its gradients: O(L k), whatever the length of the row.
//
// Forward: softmax online in blocks of keys. Backward: logits again from q and k, P = exp(logits - lse), dP = dout . v,
// dS = P (dP - delta) with delta = dout . out; then  dq = sum dS k,  dk += dS q,  dv += P dout,  key by key.
#define TENSORS 2  // K, V
#include "heads.h"

#define BLOCK 64                // keys in a block of logits; a short last one joins the one before it
#define MOST (BLOCK * 3 / 2)
#define QUERIES 64   // queries that go through a range of keys together,
#define RANGE 2048   // so that what neighbours both selected is still in a cache

static inline int block_of(int left) { return left < MOST ? left : BLOCK; }

// Rows s0 .. s1 - 1 of kv [S][K, V][D][HKV] from k and v [HKV][S][D] with strides between heads and tokens.
void dsa_pack(const number *k, int64_t k_head, int64_t k_token, const number *v, int64_t v_head, int64_t v_token,
              int64_t s0, int64_t s1, float *kv) {
    pack(k, k_head, k_token, s0, s1, kv);
    pack(v, v_head, v_token, s0, s1, kv + WIDTH);
}

// dkv [S][K, V][D][HKV] -> dk and dv [S][heads][D], of which this is HKV heads.
void dsa_unpack(const float *dkv, int64_t heads, int64_t S, number *dk, number *dv) {
    for (int64_t s = 0; s < S; s++)
        for (int h = 0; h < HKV; h++)
            for (int d = 0; d < D; d++) {
                dk[(s * heads + h) * D + d] = narrow(dkv[s * ROW + d * HKV + h]);
                dv[(s * heads + h) * D + d] = narrow(dkv[s * ROW + WIDTH + d * HKV + h]);
            }
}

struct query {
    vh q[D], max, sum;
    _Alignas(64) float o[G][D][HKV];
    int32_t n, done;  // selected keys, and how many of them are attended
};

// n keys of a query: o, max and sum move on. p: scratch.
static void attend(const float *kv, const int32_t *ix, int n, struct query *a, vh *p) {
    rows_dot(kv, ix, n, a->q, p);
    vh max = a->max;
    for (int i = 0; i < n; i++) max = maximum(max, p[i]);
    vh shrink = exponential(a->max - max), sum = a->sum * shrink;
    for (int i = 0; i < n; i++) {
        p[i] = exponential(p[i] - max);
        sum += p[i];
    }
    a->max = max;
    a->sum = sum;
    rows_sum(kv + WIDTH, ix, n, p, shrink, a->o[0][0]);
}

// The first i of from .. to whose ix[i] >= key, else `to`. In a list that does not ascend, some i; and `to`, where no
// key is so large.
static int first_from(const int32_t *ix, int from, int to, int64_t key) {
    while (from < to) {
        int middle = (from + to) / 2;
        if (ix[middle] < key) from = middle + 1;
        else to = middle;
    }
    return from;
}

int64_t dsa_attend_scratch(int64_t K) { return QUERIES * (sizeof(struct query) + LIST(K) * sizeof(int32_t)); }

// Queries t0 .. t1 - 1 of q [T][heads][D], of which these are HQ heads, at indices [T][K] of kv [S][K, V][D][HKV].
// out as q, lse [T][heads]; a query without any key gets zeros. scratch: on 64 bytes.
void dsa_attend(const number *q, int64_t heads, const float *kv, const int32_t *indices, int64_t K, int64_t S,
                int64_t t0, int64_t t1, float scale, number *out, float *lse, void *scratch) {
    struct query *queries = scratch;
    int32_t *lists = (int32_t *)(queries + QUERIES);  // [QUERIES][LIST(K)]
    float x[HQ * D];
    vh p[PADDED(MOST)];
    for (int64_t t = t0; t < t1; t += QUERIES) {
        int n = t1 - t < QUERIES ? t1 - t : QUERIES;
        for (int i = 0; i < n; i++) {
            struct query *a = &queries[i];
            __builtin_memset(a, 0, sizeof *a);
            a->max -= 3e38f;
            a->n = copy_indices(indices + (t + i) * K, K, lists + i * LIST(K));
            read_heads(q + (t + i) * heads * D, scale, x);
            turn(x, a->q);
        }
        for (int64_t end = RANGE; end < S + RANGE; end += RANGE)
            for (int i = 0; i < n; i++) {
                struct query *a = &queries[i];
                const int32_t *ix = lists + i * LIST(K);
                int stop = first_from(ix, a->done, a->n, end);
                while (a->done < stop) {
                    int keys = block_of(stop - a->done);
                    attend(kv, ix + a->done, keys, a, p);
                    a->done += keys;
                }
            }
        for (int i = 0; i < n; i++) {
            struct query *a = &queries[i];
            if (a->n == 0) a->max = (vh){}, a->sum = (vh){} + 1;
            write_heads(a->o[0][0], 1 / a->sum, out + (t + i) * heads * D);
            vh log_sum = a->max + logarithm(a->sum);
            for (int h = 0; h < HQ; h++) lse[(t + i) * heads + h] = log_sum[h % G * HKV + h / G];
        }
    }
}

int64_t dsa_backward_scratch(int64_t K) { return LIST(K) * sizeof(int32_t); }

// q, out, dout, dq [T][heads][D] and lse [T][heads], of which these are HQ heads; indices [T][K]; kv, dkv
// [S][K, V][D][HKV]. Of the queries t0 .. t1 - 1 dq is written, and their share is added to dkv.
void dsa_backward(const number *q, const number *out, const float *lse, const number *dout, int64_t heads,
                  const float *kv, const int32_t *indices, int64_t K, int64_t t0, int64_t t1, float scale, number *dq,
                  float *dkv, int32_t *list) {
    vh qt[D], dt[D], ot[D], p[PADDED(MOST + 1)], dp[PADDED(MOST + 1)], zero = {};
    _Alignas(64) float x[HQ * D], qs[G][D][HKV], ds[G][D][HKV], o[G][D][HKV];
    for (int64_t t = t0; t < t1; t++) {
        vh log_sum = {}, delta = {};
        read_heads(q + t * heads * D, scale, x);
        turn(x, qt);
        spread(x, qs[0][0]);
        read_heads(dout + t * heads * D, 1, x);
        turn(x, dt);
        spread(x, ds[0][0]);
        read_heads(out + t * heads * D, 1, x);
        turn(x, ot);
        for (int d = 0; d < D; d++) delta += dt[d] * ot[d];
        for (int h = 0; h < HQ; h++) log_sum[h % G * HKV + h / G] = lse[t * heads + h];
        __builtin_memset(o, 0, sizeof o);
        int left = copy_indices(indices + t * K, K, list);
        for (const int32_t *ix = list; left > 0;) {
            int n = block_of(left);
            rows_dot(kv, ix, n, qt, p);
            rows_dot(kv + WIDTH, ix, n, dt, dp);
            for (int i = 0; i < n; i++) {
                p[i] = exponential(p[i] - log_sum);
                dp[i] = p[i] * (dp[i] - delta);
            }
            p[n] = dp[n] = zero;  // rows_add takes two keys at a time
            rows_sum(kv, ix, n, dp, zero + 1, o[0][0]);
            rows_add(dkv, ix, n, dp, qs[0][0]);
            rows_add(dkv + WIDTH, ix, n, p, ds[0][0]);
            ix += n;
            left -= n;
        }
        write_heads(o[0][0], zero + scale, dq + t * heads * D);
    }
}
