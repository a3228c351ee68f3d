// Attention of one query a row over the keys that it selected, read where the cache has them.
//
// The work is cut into shares: the query heads of one key head, and SHARE of the selected keys. Each has a softmax of its
// own; then the shares of a head are added up in order. How they are dealt out to threads changes no bit.
//
// Compiled for one shape: -DG= query heads on a key head and -DD= their width; float32, or -DBF16 for bfloat16 in memory.
#include "vec.h"
#define LN LANES
#include "columns.h"
#include "lanes.h"
#include "number.h"

#define SHARE 512
#define AHEAD (2 * LANES)                                  // keys between a prefetch and its use
#define HEADS (G < REGISTERS / 2 ? G : REGISTERS / 2)      // at once: accumulators of the products with keys
#define COLUMNS (D / LANES)                                // vectors of a value
#define FIT(n) (COLUMNS % (n) == 0 && HEADS * (n) <= REGISTERS - 4)
#define NC (FIT(8) ? 8 : FIT(4) ? 4 : FIT(2) ? 2 : 1)      // columns at once: HEADS x NC accumulators of values

#ifdef BF16
#define WORDS (D / 2)  // of 32 bits, of a row
static inline vf load_value(const number *p) { return load_bf16(p); }
#else
#define WORDS D
static inline vf load_value(const number *p) { return load(p); }
#endif

struct share {
    float max[G], sum[G];  // of exp(logit - max)
    float o[G][D];         // sum of exp(logit - max) v
};

static inline const number *find(const number *x, int64_t token, const int32_t *keys, int i, int n) {
    return x + keys[i < n ? i : n - 1] * token;  // past the end: the last, so that it can be read
}

// p [G][SHARE] = q [G][D] . the keys [n] of k, in whole vectors.
static void products(const float q[G][D], const number *k, int64_t token, const int32_t *keys, int n, float p[G][SHARE]) {
    for (int i = 0; i < n; i += LANES) {
        const char *row[LANES];
        UNROLL for (int l = 0; l < LANES; l++) row[l] = (const char *)find(k, token, keys, i + l, n);
        UNROLL for (int g0 = 0; g0 < G; g0 += HEADS) {
            const int heads = G - g0 < HEADS ? G - g0 : HEADS;
            vf acc[HEADS] = {};
            for (int word = 0; word < WORDS; word += 4) {
                vi x[4];
                load_columns(x, row, word);
                UNROLL for (int at = 0; at < 16 * LANES; at += 64) {  // as many bytes of later keys as are read
                    int l = (4 * word * LANES + at) / (4 * WORDS), byte = (4 * word * LANES + at) % (4 * WORDS);
                    __builtin_prefetch((const char *)find(k, token, keys, i + AHEAD + l, n) + byte);
                }
                UNROLL for (int w = 0; w < 4; w++)
                    UNROLL for (int g = 0; g < heads; g++) {
#ifdef BF16
                        acc[g] += q[g0 + g][2 * (word + w)] * (vf)(x[w] << 16);
                        acc[g] += q[g0 + g][2 * (word + w) + 1] * (vf)(x[w] & (int32_t)0xffff0000);
#else
                        acc[g] += q[g0 + g][word + w] * (vf)x[w];
#endif
                    }
            }
            UNROLL for (int g = 0; g < heads; g++) store(&p[g0 + g][i], acc[g]);
        }
    }
}

// o [G][D] = p [G][SHARE] . the values [n] of v
static void mean(float p[G][SHARE], const number *v, int64_t token, const int32_t *keys, int n, float o[G][D]) {
    UNROLL for (int g0 = 0; g0 < G; g0 += HEADS)
        for (int c = 0; c < COLUMNS; c += NC) {
            const int heads = G - g0 < HEADS ? G - g0 : HEADS;
            vf acc[HEADS][NC] = {};
            for (int i = 0; i < n; i++) {
                const number *row = find(v, token, keys, i, n), *later = find(v, token, keys, i + AHEAD, n);
                UNROLL for (int j = 0; j < NC; j++) {
                    vf x = load_value(row + (c + j) * LANES);
                    __builtin_prefetch(later + (c + j) * LANES);
                    UNROLL for (int g = 0; g < heads; g++) acc[g][j] += p[g0 + g][i] * x;
                }
            }
            UNROLL for (int g = 0; g < heads; g++)
                UNROLL for (int j = 0; j < NC; j++) store(&o[g0 + g][(c + j) * LANES], acc[g][j]);
        }
}

int dsa_share_keys(void) { return SHARE; }
int dsa_share_bytes(void) { return sizeof(struct share); }

// Shares from .. to - 1 of those of [B][heads][ceil(K / SHARE)].
// q [B][heads][G][D]; k and v [B][heads][S][D] by their strides; indices [B][K], -1 for none. Returns the number of
// indices beyond S, whose keys are left out.
int dsa_decode(const number *q, float scale, const number *k, int64_t k_row, int64_t k_head, int64_t k_token,
               const number *v, int64_t v_row, int64_t v_head, int64_t v_token, int64_t heads, int64_t S,
               const int32_t *indices, int64_t K, int64_t from, int64_t to, struct share *shares) {
    int64_t count = (K + SHARE - 1) / SHARE;
    int beyond = 0;
    for (int64_t u = from; u < to; u++) {
        int64_t first = u % count * SHARE, head = u / count % heads, b = u / count / heads;
        struct share *share = &shares[u];
        float qs[G][D], p[G][SHARE];
        int32_t keys[SHARE];
        int n = 0;
        for (int64_t i = first; i < first + SHARE && i < K; i++) {
            int32_t key = indices[b * K + i];
            keys[n] = key;
            n += key >= 0 && key < S;
            beyond += key >= S;
        }
        for (int g = 0; g < G; g++)
            for (int d = 0; d < D; d++) qs[g][d] = widen(q[(u / count * G + g) * D + d]) * scale;
        products(qs, k + b * k_row + head * k_head, k_token, keys, n, p);
        for (int g = 0; g < G; g++) {
            vf max = all(-3e38f), sum = {};
            for (int i = 0; i < n; i += LANES) {
                vf x = (vf)blend(count_up(i) < n, (vi)load(&p[g][i]), (vi)all(-3e38f));
                store(&p[g][i], x);
                max = maximum(max, x);
            }
            share->max[g] = max_lanes(max);
            for (int i = 0; i < n; i += LANES) {
                vf e = exponential(load(&p[g][i]) - share->max[g]);
                store(&p[g][i], e);
                sum += (vf)((vi)e & (count_up(i) < n));
            }
            share->sum[g] = sum_lanes(sum);
        }
        mean(p, v + b * v_row + head * v_head, v_token, keys, n, share->o);
    }
    return beyond;
}

// out [heads][G][D] of shares [heads][count]; zeros for a query without any key.
void dsa_merge_shares(const struct share *shares, int64_t heads, int64_t count, number *out) {
    for (int64_t h = 0; h < heads; h++, shares += count, out += G * D)
        for (int g = 0; g < G; g++) {
            float max = -3e38f, sum = 0;
            vf o[COLUMNS] = {};
            for (int64_t i = 0; i < count; i++) max = shares[i].max[g] > max ? shares[i].max[g] : max;
            for (int64_t i = 0; i < count; i++) {
                vf weight = exponential(all(shares[i].max[g] - max));
                sum += shares[i].sum[g] * weight[0];
                for (int c = 0; c < COLUMNS; c++) o[c] += weight * load(&shares[i].o[g][c * LANES]);
            }
            for (int d = 0; d < D; d++) out[g * D + d] = narrow(sum > 0 ? o[d / LANES][d % LANES] / sum : 0);
        }
}
