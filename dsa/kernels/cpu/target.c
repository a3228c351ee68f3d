// What attention wanted: the sum over the heads of its softmax over a query's selected keys.
#define TENSORS 1  // K
#include "heads.h"

// Rows s0 .. s1 - 1 of rows [S][D][HKV] from k [HKV][S][D] with strides between heads and tokens.
void dsa_pack_keys(const number *k, int64_t head, int64_t token, int64_t s0, int64_t s1, float *rows) {
    pack(k, head, token, s0, s1, rows);
}

int64_t dsa_target_scratch(int64_t K) { return PADDED(K) * sizeof(vh) + LIST(K) * sizeof(int32_t); }

// Queries t0 .. t1 - 1 of q [T][heads][D], of which these are HQ heads, at indices [T][K] of rows [S][D][HKV]. Their
// share of the sum is added to p [t1 - t0][stride], for the keys in order and without gaps; stride is PADDED(K) at least.
void dsa_target(const number *q, int64_t heads, const float *rows, const int32_t *indices, int64_t K, int64_t t0,
                int64_t t1, float scale, float *p, int64_t stride, void *scratch) {
    float x[HQ * D];
    vh qt[D], *e = scratch;
    int32_t *ix = (int32_t *)(e + PADDED(K));
    for (int64_t t = t0; t < t1; t++, p += stride) {
        int n = copy_indices(indices + t * K, K, ix);
        read_heads(q + t * heads * D, scale, x);
        turn(x, qt);
        rows_dot(rows, ix, n, qt, e);
        vh max = (vh){} - 3e38f, sum = {}, share = {};
        for (int i = 0; i < n; i++) max = maximum(max, e[i]);
        for (int i = 0; i < n; i++) {
            e[i] = exponential(e[i] - max);
            sum += e[i];
        }
        UNROLL for (int h = 0; h < HQ; h++) share[h] = 1 / sum[h];
        sum_heads(e, n, share, p);
    }
}
