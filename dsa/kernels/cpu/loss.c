// The indexer's loss over the selected keys, KL(p || softmax(I)), and its gradients.
//
// p is the heads' sum of target.c over their number. With index scores I[s] = sum_h w[h] relu(q[h] . k[s]) and dI = softmax(I) - p:
//     dw[h] = sum_s dI[s] relu(q[h] . k[s])
//     r[s, h] = dI[s] w[h] where q[h] . k[s] > 0, else 0;    dq[h] = sum_s r[s, h] k[s];    dk[s] += sum_h r[s, h] q[h].
// These are the sums of attention with one key head, so index heads go where heads.h has query heads: HKV = 1.
#define TENSORS 1  // index keys
#include "heads.h"

int64_t dsa_loss_scratch(int64_t K) {
    return PADDED(K + 1) * sizeof(vh) + 2 * PADDED(K) * sizeof(float) + LIST(K) * sizeof(int32_t);
}

// Queries t0 .. t1 - 1 of index queries q [T][HQ][D] and weights w [T][HQ], which `scale` multiplies, at indices [T][K]
// of index keys k [S][D], against sums [t1 - t0][stride] over so many heads. Of the queries that are valid [T] the loss
// is added to total, and unless they are NULL dq and dw are written and dk [S][D] is added to; those of the others are
// zeros.
void dsa_loss(const float *q, const float *w, const float *k, const int32_t *indices, int64_t K, int64_t t0, int64_t t1,
              const uint8_t *valid, float scale, const float *sums, int64_t stride, int64_t heads, double *total,
              float *dq, float *dw, float *dk, void *scratch) {
    vh qt[D], *dots = scratch, zero = {};
    _Alignas(64) float o[HQ][D];
    float *score = (float *)(dots + PADDED(K + 1)), *p = score + PADDED(K);  // [PADDED(K)] each
    int32_t *ix = (int32_t *)(p + PADDED(K));
    for (int64_t t = t0; t < t1; t++, sums += stride) {
        int n = valid[t] ? copy_indices(indices + t * K, K, ix) : 0;
        vh weight = {}, dweight = {};
        __builtin_memset(o, 0, sizeof o);
        for (int h = 0; h < HQ; h++) weight[h] = w[t * HQ + h] * scale;
        turn(q + t * HQ * D, qt);
        rows_dot(k, ix, n, qt, dots);
        __builtin_memset(score, 0, PADDED(n) * sizeof *score);
        for (int i = 0; i < n; i++) dots[i] = relu(dots[i]);
        sum_heads(dots, n, weight, score);
        for (int i = 0; i < n; i++) p[i] = sums[i] / heads;
        for (int i = n; i < PADDED(n); i++) score[i] = -3e38f, p[i] = 0;

        // From here to the gradients lanes are keys.
        const vh *s = (const vh *)score, *want = (const vh *)p;
        int vectors = PADDED(n) / LN;
        vh max = zero - 3e38f, sum = zero, loss = zero;
        for (int i = 0; i < vectors; i++) max = maximum(max, s[i]);
        max = zero + max_lanes(max);
        for (int i = 0; i < vectors; i++) sum += exponential(s[i] - max);
        vh log_sum = max + logarithm(zero + sum_lanes(sum));
        for (int i = 0; i < vectors; i++) loss += want[i] * (logarithm(want[i]) - (s[i] - log_sum));
        if (n) *total += sum_lanes(loss);
        if (!dq) continue;

        for (int i = 0; i < vectors; i++) ((vh *)score)[i] = exponential(s[i] - log_sum) - want[i];
        for (int i = 0; i < n; i++) {
            dweight += score[i] * dots[i];
            dots[i] = (vh)((vhi)(score[i] * weight) & (dots[i] > 0));
        }
        dots[n] = zero;
        rows_sum(k, ix, n, dots, zero + 1, o[0]);
        rows_add(dk, ix, n, dots, q + t * HQ * D);
        write_heads(o[0], zero + 1, dq + t * HQ * D);
        for (int h = 0; h < HQ; h++) dw[t * HQ + h] = dweight[h] * scale;
    }
}
