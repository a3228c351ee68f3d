// The dense warm-up's loss over all the keys that a query sees, KL(p || softmax(I)), and its gradients, by tiles of keys.
//
// p is the sum over the heads of softmax(q . k), over their number. With I[s] = sum_h w[h] relu(q[h] . k[s]) and
// dI = softmax(I) - p:
//     dw[h] = sum_s dI[s] relu(q[h] . k[s])
//     r[h, s] = dI[s] w[h] where q[h] . k[s] > 0, else 0;    dq[h] = sum_s r[h, s] k[s];    dk[s] += sum_h r[h, s] q[h].
// A few queries at a time share each tile; what is kept of them is their logits, over all keys and a few heads.
//
// Compiled for one shape: -DH= index heads, and -DD= the width of heads: attention's for dsa_target, the
// indexer's for dsa_loss.
#include "tile.h"
#define LN LANES
#include "lanes.h"

#define QUERIES 4                 // at once
#define HEADS 8                   // of a group, whose logits exist at once
#define NC (D / LANES < REGISTERS / 8 ? D / LANES : REGISTERS / 8)  // columns at once: QUERIES x NC accumulators
#define HIDDEN -3e38f             // the score of a key that a query does not see

// QUERIES queries, n of them real; query m sees the keys first[m] .. last[m] but padding, all of them in the
// tiles from .. to - 1.
struct block {
    int64_t from, to;
    int n;
    int32_t first[QUERIES], last[QUERIES];
};

static struct block block_at(int64_t t, int64_t t1, const int32_t *first, int64_t offset) {
    struct block b = {.from = INT64_MAX, .n = t1 - t < QUERIES ? t1 - t : QUERIES};
    b.to = (offset + t + b.n - 1) / NT + 1;
    for (int m = 0; m < QUERIES; m++) {
        b.first[m] = m < b.n && first ? first[t + m] : 0;
        b.last[m] = m < b.n ? offset + t + m : -1;
        if (m < b.n && b.first[m] / NT < b.from) b.from = b.first[m] / NT;
    }
    return b;
}

static inline vi seen(const struct block *b, int m, const struct tile *tile, int c) {
    vi position = load_int(tile->position + c);
    return (position >= b->first[m]) & (position <= b->last[m]);
}

static int see_all(const struct block *b, const struct tile *tile) {
    vi all_seen = ~(vi){};
    for (int c = 0; c < NT; c += LANES)
        for (int m = 0; m < b->n; m++) all_seen &= seen(b, m, tile, c);
    return !bits_of(~all_seen);
}

static inline vf hide(vi seen, vf x) { return (vf)blend(seen, (vi)x, (vi)all(HIDDEN)); }

// x [n], whole vectors -> max_lanes of x, and the sum of exp(x - max), which takes the place of x where `keep`
static float sum_exponentials(float *x, int64_t n, float *max, int keep) {
    vf most = all(HIDDEN), sum = {};
    for (int64_t i = 0; i < n; i += LANES) most = maximum(most, load(x + i));
    *max = max_lanes(most);
    for (int64_t i = 0; i < n; i += LANES) {
        vf e = exponential(load(x + i) - *max);
        if (keep) store(x + i, e);
        sum += e;
    }
    return sum_lanes(sum);
}

int64_t dsa_target_scratch(int64_t count) { return HEADS * QUERIES * count * NT * sizeof(float); }

// logits [QUERIES][NT], rows `stride` apart, = x [QUERIES][D] . the keys of a tile, where the block's queries see them
static void logits_of_tile(const struct block *b, const struct tile *tile, int whole, float x[QUERIES][D], float *logits,
                           int64_t stride) {
    const int nv = VECTORS(QUERIES);
    for (int c = 0; c < NT; c += nv * LANES) {
        vf acc[QUERIES][NV] = {};
        dots(QUERIES, nv, D, acc, (const float *[]){x[0], x[1], x[2], x[3]}, tile->k, c);
        UNROLL for (int m = 0; m < QUERIES; m++)
            UNROLL for (int j = 0; j < nv; j++) {
                int at = c + j * LANES;
                store(logits + m * stride + at, whole ? acc[m][j] : hide(seen(b, m, tile, at), acc[m][j]));
            }
    }
}

// Queries t0 .. t1 - 1 of q [T][heads][D]; tiles [heads / group][count] of keys. Query t sees the keys first[t] (or 0,
// where first is NULL) .. offset + t but padding. p [t1 - t0][count * NT]: the sum over the heads, and anything at keys
// that are hidden.
void dsa_target(const float *q, int64_t heads, int64_t group, const struct tile *tiles, int64_t count,
                const int32_t *first, int64_t offset, int64_t t0, int64_t t1, float scale, float *p, float *logits) {
    const int64_t stride = count * NT;
    __builtin_memset(p, 0, (t1 - t0) * stride * sizeof *p);
    for (int64_t t = t0; t < t1; t += QUERIES) {
        struct block b = block_at(t, t1, first, offset);
        const int64_t begin = b.from * NT, width = (b.to - b.from) * NT;
        for (int64_t h0 = 0, n; h0 < heads; h0 += n) {
            n = group - h0 % group < HEADS ? group - h0 % group : HEADS;
            float x[HEADS][QUERIES][D] = {};
            for (int h = 0; h < n; h++)
                for (int m = 0; m < b.n; m++)
                    for (int d = 0; d < D; d++) x[h][m][d] = q[((t + m) * heads + h0 + h) * D + d] * scale;
            for (int64_t i = b.from; i < b.to; i++) {
                const struct tile *tile = &tiles[h0 / group * count + i];
                int whole = see_all(&b, tile);
                for (int h = 0; h < n; h++)
                    logits_of_tile(&b, tile, whole, x[h], logits + h * QUERIES * stride + i * NT, stride);
            }
            for (int m = 0; m < b.n; m++)
                for (int h = 0; h < n; h++) {
                    float max, *e = logits + (h * QUERIES + m) * stride + begin;
                    float *to = p + (t - t0 + m) * stride + begin, share = 1 / sum_exponentials(e, width, &max, 1);
                    for (int64_t i = 0; i < width; i += LANES) store(to + i, load(to + i) + share * load(e + i));
                }
        }
    }
}

// The products relu(q[h] . k) of a block with a tile, r [H][QUERIES][NT], from x [H][QUERIES][D], and their sums weighed by
// w [H][QUERIES] to score [QUERIES], rows `stride` apart.
static void score_tile(const struct block *b, const struct tile *tile, float x[H][QUERIES][D], float w[H][QUERIES],
                       float r[H][QUERIES][NT], float *score, int64_t stride) {
    const int nv = VECTORS(QUERIES);
    for (int h = 0; h < H; h++)
        for (int c = 0; c < NT; c += nv * LANES) {
            vf acc[QUERIES][NV] = {};
            dots(QUERIES, nv, D, acc, (const float *[]){x[h][0], x[h][1], x[h][2], x[h][3]}, tile->k, c);
            UNROLL for (int m = 0; m < QUERIES; m++)
                UNROLL for (int j = 0; j < nv; j++) {
                    int at = c + j * LANES;
                    float *to = score + m * stride + at;
                    vf positive = relu(acc[m][j]), sum = (h ? load(to) : (vf){}) + w[h][m] * positive;
                    store(&r[h][m][at], positive);
                    store(to, h < H - 1 ? sum : hide(seen(b, m, tile, at), sum));
                }
        }
}

// score [n] -> dI = softmax(score) - p, zeros where hidden; p [n] are sums over `heads`. Returns the loss. The tiles say
// what query m sees.
static float differ(const struct block *b, int m, const struct tile *tiles, float *score, const float *p, int64_t heads) {
    const int64_t n = (b->to - b->from) * NT;
    vf loss = {};
    float max, log_sum = logarithm(all(sum_exponentials(score, n, &max, 0)))[0] + max;
    for (int64_t i = 0; i < n; i += LANES) {
        vi in = seen(b, m, &tiles[i / NT], i % NT);
        vf want = (vf)((vi)(load(p + i) / (float)heads) & in), s = load(score + i) - log_sum;
        loss += want * (logarithm(want) - s);
        store(score + i, (vf)((vi)exponential(s) & in) - want);
    }
    return sum_lanes(loss);
}

// Products r [H][QUERIES][NT] with a tile -> dI w where they are positive, from dI [QUERIES], rows `stride` apart. What
// the weights' gradient gets is added to dw [H][QUERIES].
static void turn_back(float r[H][QUERIES][NT], const float *dI, int64_t stride, float w[H][QUERIES],
                      vf dw[H][QUERIES]) {
    for (int h = 0; h < H; h++)
        for (int m = 0; m < QUERIES; m++)
            for (int c = 0; c < NT; c += LANES) {
                vf d = load(dI + m * stride + c), positive = load(&r[h][m][c]);
                dw[h][m] += d * positive;
                store(&r[h][m][c], (vf)((vi)(d * w[h][m]) & (positive > 0)));
            }
}

// dq [QUERIES][D] += r [QUERIES][NT] . keys [n] of k [S][D]
static void add_to_queries(float dq[QUERIES][D], float r[QUERIES][NT], const float *k, int n) {
    for (int c = 0; c < D; c += NC * LANES) {
        vf acc[QUERIES][NC];
        UNROLL for (int m = 0; m < QUERIES; m++)
            UNROLL for (int j = 0; j < NC; j++) acc[m][j] = load(&dq[m][c + j * LANES]);
        for (int s = 0; s < n; s++)
            UNROLL for (int m = 0; m < QUERIES; m++)
                UNROLL for (int j = 0; j < NC; j++) acc[m][j] += r[m][s] * load(k + s * D + c + j * LANES);
        UNROLL for (int m = 0; m < QUERIES; m++)
            UNROLL for (int j = 0; j < NC; j++) store(&dq[m][c + j * LANES], acc[m][j]);
    }
}

// dk [D][NT] += x [D][rows] . r [rows][NT]
static void add_to_keys(float dk[D][NT], const float *x, const float (*r)[NT], int rows) {
    const int nd = 4, nv = VECTORS(nd);
    for (int d = 0; d < D; d += nd)
        for (int c = 0; c < NT; c += nv * LANES) {
            vf acc[nd][NV];
            UNROLL for (int i = 0; i < nd; i++)
                UNROLL for (int j = 0; j < nv; j++) acc[i][j] = load(&dk[d + i][c + j * LANES]);
            const float *row = x + d * rows;
            dots(nd, nv, rows, acc, (const float *[]){row, row + rows, row + 2 * rows, row + 3 * rows}, r, c);
            UNROLL for (int i = 0; i < nd; i++)
                UNROLL for (int j = 0; j < nv; j++) store(&dk[d + i][c + j * LANES], acc[i][j]);
        }
}

int64_t dsa_loss_scratch(int64_t count) { return (H + 1) * QUERIES * count * NT * sizeof(float); }

// Queries t0 .. t1 - 1 of index queries q [T][H][D] and weights w [T][H], which `scale` multiplies; index keys k [S][D],
// and in tiles [count]. What a query sees is as in dsa_target; p [t1 - t0][count * NT] are sums over so many heads.
// Of the queries that are valid [T] the loss is added to total, and unless they are NULL dq and dw are written and
// dk [count][D][NT] is added to; those of the others are zeros.
void dsa_loss(const float *q, const float *w, const struct tile *tiles, const float *k, int64_t S, int64_t count,
              const int32_t *first, int64_t offset, int64_t t0, int64_t t1, const uint8_t *valid, float scale,
              const float *p, int64_t heads, double *total, float *dq, float *dw, float (*dk)[D][NT], void *scratch) {
    const int64_t stride = count * NT;
    float(*products)[H][QUERIES][NT] = scratch, *score = (float *)(products + count);  // [count], [QUERIES][stride]
    for (int64_t t = t0; t < t1; t += QUERIES) {
        struct block b = block_at(t, t1, first, offset);
        float x[H][QUERIES][D] = {}, across[D][H][QUERIES] = {}, weight[H][QUERIES] = {}, o[H][QUERIES][D] = {};
        vf dweight[H][QUERIES] = {};
        for (int m = 0; m < b.n; m++)
            for (int h = 0; h < H; h++) {
                weight[h][m] = w[(t + m) * H + h] * scale;
                for (int d = 0; d < D; d++) x[h][m][d] = across[d][h][m] = q[((t + m) * H + h) * D + d];
            }
        for (int64_t i = b.from; i < b.to; i++) score_tile(&b, &tiles[i], x, weight, products[i], score + i * NT, stride);
        for (int m = 0; m < QUERIES; m++) {
            int64_t begin = m * stride + b.from * NT;
            if (m < b.n && valid[t + m])
                *total += differ(&b, m, tiles + b.from, score + begin, p + (t - t0) * stride + begin, heads);
            else __builtin_memset(score + begin, 0, (b.to - b.from) * NT * sizeof *score);
        }
        if (!dq) continue;
        for (int64_t i = b.from; i < b.to; i++) {
            turn_back(products[i], score + i * NT, stride, weight, dweight);
            for (int h = 0; h < H; h++)
                add_to_queries(o[h], products[i][h], k + i * NT * D, S - i * NT < NT ? S - i * NT : NT);
            add_to_keys(dk[i], across[0][0], products[i][0], H * QUERIES);
        }
        for (int m = 0; m < b.n; m++)
            for (int h = 0; h < H; h++) {
                __builtin_memcpy(dq + ((t + m) * H + h) * D, o[h][m], sizeof o[h][m]);
                dw[(t + m) * H + h] = sum_lanes(dweight[h][m]) * scale;
            }
    }
}
