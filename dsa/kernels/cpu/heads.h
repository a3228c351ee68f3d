// The heads of one query and the keys that it selected: products, weighted sums and gradients, one row of memory a key.
//
// A row is [TENSORS][D][HKV]: for each d the numbers of its HKV key heads are neighbours. The query's heads are the lanes
// of a vector, lane g * HKV + h for the g-th query head of key head h, so that nothing is summed across lanes and a
// softmax goes lane by lane.
//
// Compiled for one shape: -DHQ= query heads, -DHKV= key heads (1, 2, 4 or 8), -DD= their width.
#pragma once
#define LN (HQ <= 4 ? 4 : HQ <= 8 ? 8 : 16)  // lanes for heads; those past HQ hold zeros
#include "columns.h"
#include "lanes.h"
#include "number.h"

#define G (HQ / HKV)           // query heads that share a key head
#define WIDTH (D * HKV)        // numbers of a part of a row: of K, or of V
#define ROW (TENSORS * WIDTH)
#define COLS (WIDTH / LANES)   // vectors in a part
#define AHEAD 8                // keys between a prefetch and its use
#define SLACK (2 * AHEAD)      // entries behind a list of keys that may be read
#define LIST(K) ((K) + LANES + SLACK)  // numbers in a list of up to K keys
#define PADDED(K) (((K) + 15) / 16 * 16)  // in whole vectors, whatever their lanes
_Static_assert(HQ <= 16 && HQ % HKV == 0 && 8 % HKV == 0 && WIDTH % LANES == 0, "shape not supported");

// HKV neighbouring numbers over and over: what the lanes of a vector V see of one d of a key, or of one g of a weight.
#define REPEAT(V, p) ({ V r_; const float *p_ = (p); \
    UNROLL for (unsigned i_ = 0; i_ < sizeof(V) / 4; i_++) r_[i_] = p_[i_ % HKV]; r_; })

#define HEAD_OF(c) ((c) * LANES % HKV)  // key head of the first lane of column c: 0, unless a vector is narrower than HKV

static inline const float *row_of(const float *rows, int32_t key) { return rows + key * (int64_t)ROW; }

static inline void fetch(const float *part) {
    UNROLL for (int c = 0; c < WIDTH; c += 16) __builtin_prefetch(part + c);
}

// out [PADDED(n)][LN] = for each key of ix [n] its part . x [D][LN]. NB keys share each load of x, in eight accumulators.
#if LANES == 16 && !defined __znver4__
#define DOT LN
#else
#define DOT (LN < 8 ? LN : 8)  // lanes at once: Zen 4 broadcasts to half a register twice as fast as to a whole one
#endif
#define NB (8 * DOT / LN)
typedef VECTOR(float, DOT) vd __attribute__((may_alias));
static inline void rows_dot(const float *part, const int32_t *ix, int n, const vh *x, vh *out) {
    for (int i = 0; i < n; i += NB) {
        const float *row[NB];
        UNROLL for (int u = 0; u < NB; u++) {
            row[u] = row_of(part, ix[i + u]);
            fetch(row_of(part, ix[i + u + AHEAD]));
        }
        vd acc[NB][LN / DOT] = {};
#pragma clang loop unroll_count(4)
        for (int d = 0; d < D; d++)
            UNROLL for (int u = 0; u < NB; u++) {
                vd k = REPEAT(vd, row[u] + d * HKV);
                UNROLL for (int j = 0; j < LN / DOT; j++) acc[u][j] += k * ((const vd *)&x[d])[j];
            }
        UNROLL for (int u = 0; u < NB; u++)
            UNROLL for (int j = 0; j < LN / DOT; j++) ((vd *)&out[i + u])[j] = acc[u][j];
    }
}

// o [G][D][HKV] = o x keep [LN] + sum over ix [n] of p [n][LN] x part. Lanes are columns of a part; NG x NC accumulators.
#define NG (G <= REGISTERS - 6 ? G : (G + 1) / 2)
#define FIT(columns) (COLS % (columns) == 0 && (NG + 1) * (columns) <= REGISTERS - 2)
#define NC (FIT(8) ? 8 : FIT(4) ? 4 : FIT(2) ? 2 : 1)
static inline void rows_sum(const float *part, const int32_t *ix, int n, const vh *p, vh keep, float *o) {
    for (int c = 0; c < COLS; c += NC)
        UNROLL for (int g0 = 0; g0 < G; g0 += NG) {
            const int groups = G - g0 < NG ? G - g0 : NG;
            vf acc[NG][NC];
            UNROLL for (int g = 0; g < groups; g++)
                UNROLL for (int j = 0; j < NC; j++)
                    acc[g][j] = load(o + (g0 + g) * WIDTH + (c + j) * LANES) *
                                REPEAT(vf, (const float *)&keep + (g0 + g) * HKV + HEAD_OF(c + j));
            for (int i = 0; i < n; i++) {
                const float *row = row_of(part, ix[i]) + c * LANES, *w = (const float *)&p[i] + g0 * HKV;
                const float *later = row_of(part, ix[i + AHEAD]) + c * LANES;
                vf v[NC];
                UNROLL for (int j = 0; j < NC; j++) {
                    v[j] = load(row + j * LANES);
                    __builtin_prefetch(later + j * LANES);
                }
                UNROLL for (int g = 0; g < groups; g++)
                    UNROLL for (int j = 0; j < NC; j++) acc[g][j] += REPEAT(vf, w + g * HKV + HEAD_OF(c + j)) * v[j];
            }
            UNROLL for (int g = 0; g < groups; g++)
                UNROLL for (int j = 0; j < NC; j++) store(o + (g0 + g) * WIDTH + (c + j) * LANES, acc[g][j]);
        }
}

// The part of each key of ix [n] += sum over g of w [n][LN] x x [G][D][HKV]. Two keys share each load of x: n is rounded
// up to 2, and w has a row of zeros behind it.
#define SC (COLS < REGISTERS / 4 ? COLS : REGISTERS / 4)  // columns at once: 2 x SC accumulators
static inline void rows_add(float *part, const int32_t *ix, int n, const vh *w, const float *x) {
    for (int i = 0; i < n; i += 2) {
        fetch(row_of(part, ix[i + AHEAD - 2]));
        fetch(row_of(part, ix[i + AHEAD - 1]));
        for (int c = 0; c < COLS; c += SC) {
            vf acc[2][SC] = {};
            UNROLL for (int g = 0; g < G; g++) {
                const float *w0 = (const float *)&w[i] + g * HKV, *w1 = w0 + LN;
                UNROLL for (int j = 0; j < SC; j++) {
                    vf v = load(x + g * WIDTH + (c + j) * LANES);
                    acc[0][j] += REPEAT(vf, w0 + HEAD_OF(c + j)) * v;
                    acc[1][j] += REPEAT(vf, w1 + HEAD_OF(c + j)) * v;
                }
            }
            UNROLL for (int u = 0; u < 2; u++) {
                float *row = (float *)row_of(part, ix[i + u]) + c * LANES;
                UNROLL for (int j = 0; j < SC; j++) store(row + j * LANES, load(row + j * LANES) + acc[u][j]);
            }
        }
    }
}

// Part of the rows s0 .. s1 - 1 from x [HKV][S][D] with strides between heads and tokens.
static inline void pack(const number *x, int64_t head, int64_t token, int64_t s0, int64_t s1, float *restrict part) {
    for (int64_t s = s0; s < s1; s++)
        for (int d = 0; d < D; d++)
            UNROLL for (int h = 0; h < HKV; h++) part[s * ROW + d * HKV + h] = widen(x[h * head + s * token + d]);
}

// A query's heads in their own order, as floats: x [HQ][D] x scale.
static inline void read_heads(const number *x, float scale, float *restrict out) {
    for (int i = 0; i < HQ * D; i++) out[i] = widen(x[i]) * scale;
}

// x [HQ][D] so that lanes are heads: [D][LN].
static inline void turn(const float *x, vh *out) {
    static const float none[D];
    enum { WORDS = LN < LANES ? LN : LANES };
    for (int first = 0; first < LN; first += LANES) {
        const char *row[LANES];
        for (int i = 0; i < LANES; i++) {
            int lane = first + i;
            row[i] = (const char *)(lane < HQ ? x + (lane % HKV * G + lane / HKV) * D : none);
        }
        for (int d = 0; d < D; d += 4) {
            vi columns[4];
            load_columns(columns, row, d);
            UNROLL for (int j = 0; j < 4; j++) __builtin_memcpy((float *)&out[d + j] + first, &columns[j], 4 * WORDS);
        }
    }
}

// x [HQ][D] so that lanes are columns: [G][D][HKV].
static inline void spread(const float *x, float *restrict out) {
    for (int g = 0; g < G; g++)
        for (int d = 0; d < D; d++)
            UNROLL for (int h = 0; h < HKV; h++) out[(g * D + d) * HKV + h] = x[(h * G + g) * D + d];
}

// And back: o [G][D][HKV] x scale [LN] -> [HQ][D].
static inline void write_heads(const float *o, vh scale, number *restrict out) {
    for (int g = 0; g < G; g++)
        for (int d = 0; d < D; d++)
            UNROLL for (int h = 0; h < HKV; h++)
                out[(h * G + g) * D + d] = narrow(o[(g * D + d) * HKV + h] * scale[g * HKV + h]);
}

// out [PADDED(n)] += sum over the heads of x [PADDED(n)][LN] x weight, LANES keys at once.
static inline void sum_heads(const vh *x, int n, vh weight, float *out) {
    for (int i = 0; i < n; i += LANES) {
        const char *row[LANES];
        UNROLL for (int l = 0; l < LANES; l++) row[l] = (const char *)&x[i + l];
        vf sum = load(out + i);
        UNROLL for (int h = 0; h < HQ; h += 4) {
            vi columns[4];
            load_columns(columns, row, h);
            UNROLL for (int j = 0; j < 4; j++) sum += weight[h + j] * (vf)columns[j];
        }
        store(out + i, sum);
    }
}

// The keys among indices [K], -1 for none, side by side at to [LIST(K)]; their number.
static inline int copy_indices(const int32_t *indices, int64_t K, int32_t *to) {
    int n = 0;
    int64_t i = 0;
    for (; i + LANES <= K; i += LANES) {
        vi key = load_int(indices + i);
        uint32_t some = bits_of(key >= 0);
        compress(to + n, key, some);
        n += __builtin_popcount(some);
    }
    for (; i < K; i++)
        if (indices[i] >= 0) to[n++] = indices[i];
    for (int j = 0; j < SLACK; j++) to[n + j] = n ? to[n - 1] : 0;
    return n;
}
