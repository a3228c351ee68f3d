// The k best keys of each query by its index score  sum_h w[h] relu(q[h] . key):  exact, indices ascending, ties to the
// lower index, NaN as -inf.
//
// Scores never go to memory: each tile of them is made in registers and compared there with the query's floor, the
// k-th best score so far. The few that pass are appended to the query's list; a list that is nearly full is cut back to
// its k best, which raises the floor. A score is summed over d, then over heads, each in order, whatever else is
// computed beside it: prefill, chunks of it and decoding have the same bits.
//
// Compiled for one shape: -DH= index heads and -DD= their width, and one type of keys (tile.h).
#include "tile.h"

#define BLOCK 16                         // queries that share a tile while it is in L1
#define HEADS (H < 4 ? H : 4)            // heads at once
#define QUERIES (H < 3 ? 4 / H : 1)      // queries at once: as many rows of accumulators as four heads
#define AHEAD (2 * NT)                   // keys between what decoding reads and what it prefetches
#define INFINITY __builtin_inff()

// What one query has found. scores, keys [cap + LANES]
struct list {
    int32_t first, last;  // the keys that it sees, but for padding
    float floor;          // NaN: there are fewer than k so far, and all are welcome
    int32_t n;
    float *scores;
    int32_t *keys;
};

static inline void append(struct list *list, vf scores, vi keys, uint32_t which) {
    compress(list->scores + list->n, (vi)scores, which);
    compress(list->keys + list->n, keys, which);
    list->n += __builtin_popcount(which);
}

static inline vi seen(const struct list *list, vi position) {
    return (position >= list->first) & (position <= list->last);
}

static inline vf relu(vf x) { return (vf)((vi)x & ~(x < 0)); }  // keeps NaN

// `dots` with one vector of keys that are not packed.
INLINE void dots_of_rows(const int rows, vn acc[][NV], const number *const q[], const struct rows *keys,
                         struct tile *tile, int c) {
    const char *later = keys->at + (c + AHEAD) * keys->stride;
    const int64_t share = LANES * keys->stride * 4 / WORDS;
    const char *row[LANES];
    find(row, keys, c);
    vi bias = {};
    for (int word = 0; word < WORDS; word += 4) {
        vi x[4];
        load_columns(x, row, word);
        for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(later + i, 0, 1);
        later += share;
        UNROLL for (int i = 0; i < 4; i++) {
            vn numbers[PER_WORD];
            unpack(numbers, x[i]);
            UNROLL for (int j = 0; j < PER_WORD; j++)
                UNROLL for (int r = 0; r < rows; r++)
                    acc[r][0] = add_product(acc[r][0], q[r][(word + i) * PER_WORD + j], numbers[j]);
            bias = add_bias(bias, x[i]);
        }
    }
    store_int(tile->bias + c, bias);
}

// `queries` queries against one tile, whose keys are in it, or still in `keys`. q [queries][H][STEPS], w [queries][H]
INLINE void rank(const int queries, const number *q, const float *w, struct tile *tile, const struct rows *keys,
                 struct list *lists) {
    const int rows = queries * HEADS;
    const int nv = keys ? 1 : VECTORS(rows);
    for (int c = 0; c < NT; c += nv * LANES) {
        vf sum[QUERIES][NV] = {};
        UNROLL for (int h = 0; h < H; h += HEADS) {
            const int heads = H - h < HEADS ? H - h : HEADS;
            const number *qs[QUERIES * HEADS];
            vn acc[QUERIES * HEADS][NV] = {};
            UNROLL for (int r = 0; r < queries * heads; r++) qs[r] = q + (r / heads * H + h + r % heads) * STEPS;
            if (keys) dots_of_rows(queries * heads, acc, qs, keys, tile, c);
            else dots(queries * heads, nv, STEPS, acc, qs, tile->k, c);

            UNROLL for (int r = 0; r < queries * heads; r++)
                UNROLL for (int j = 0; j < nv; j++) {
#ifdef BYTES
                    vf x = __builtin_convertvector(acc[r][j] - load_int(tile->bias + c + j * LANES), vf);
#else
                    vf x = acc[r][j];
#endif
                    sum[r / heads][j] += w[r / heads * H + h + r % heads] * relu(x);
                }
        }
        UNROLL for (int m = 0; m < queries; m++)
            UNROLL for (int j = 0; j < nv; j++) {
                vf score = sum[m][j];
#ifdef INT8
                score *= load(tile->scale + c + j * LANES);
#endif
                vi key = load_int(tile->position + c + j * LANES);
                // Not at the floor either: a later score equal to it loses to the lower index anyway.
                uint32_t which = bits_of(~(score <= lists[m].floor) & seen(&lists[m], key));
                if (which) append(&lists[m], (vf)blend(score == score, (vi)score, (vi)all(-INFINITY)), key, which);
            }
    }
}

// All keys of a tile that the query sees, whatever their scores.
static void take(const struct tile *tile, struct list *list) {
    for (int c = 0; c < NT; c += LANES) {
        vi key = load_int(tile->position + c);
        append(list, (vf){}, key, bits_of(seen(list, key)));
    }
}

static void sort(float *x, int n) {
    for (int i = 1; i < n; i++) {
        float v = x[i];
        int j = i;
        for (; j > 0 && x[j - 1] > v; j--) x[j] = x[j - 1];
        x[j] = v;
    }
}

// The k-th largest of x[n]. Quickselect: all above and all below a pivot go to two new arrays, one of them is searched
// on. The pivot is the one of 15 samples whose rank fits k best, so about two rounds are enough. scratch [4][stride]
static float kth_largest(const float *x, int n, int k, float *scratch, int64_t stride) {
    enum { SAMPLES = 15, FEW = 24 };
    for (int round = 0; n > FEW; round ^= 1) {
        float sample[SAMPLES];
        for (int i = 0; i < SAMPLES; i++) sample[i] = x[i * (n / SAMPLES) + n / (2 * SAMPLES)];
        sort(sample, SAMPLES);
        float pivot = sample[(int64_t)SAMPLES * (n - k) / n];
        float *above = scratch + 2 * round * stride, *below = above + stride;
        int a = 0, b = 0;
        for (int i = 0; i < n; i += LANES) {
            vf v = load(x + i);
            vi live = count_up(i) < n;
            uint32_t up = bits_of((v > pivot) & live), down = bits_of((v < pivot) & live);
            compress(above + a, (vi)v, up);
            compress(below + b, (vi)v, down);
            a += __builtin_popcount(up);
            b += __builtin_popcount(down);
        }
        if (k <= a) x = above, n = a;
        else if (k > n - b) k -= n - b, x = below, n = b;
        else return pivot;
    }
    float last[FEW];
    __builtin_memcpy(last, x, n * sizeof *x);
    sort(last, n);
    return last[n - k];
}

// Cut a list to its k best in place, order kept; the k-th score is its floor from now on.
static void shrink(struct list *list, int k, float *scratch, int64_t stride) {
    float floor = kth_largest(list->scores, list->n, k, scratch, stride);
    int n = list->n, equal = k;  // how many of those equal to the floor still fit: the first, whose index is lower
    for (int i = 0; i < n; i++) equal -= list->scores[i] > floor;
    list->n = 0;
    list->floor = floor;
    for (int i = 0; i < n; i += LANES) {
        vf score = load(list->scores + i);
        vi key = load_int(list->keys + i), live = count_up(i) < n;
        uint32_t tied = bits_of((score == floor) & live);
        while (__builtin_popcount(tied) > equal) tied ^= 1u << (31 - __builtin_clz(tied));
        equal -= __builtin_popcount(tied);
        append(list, score, key, bits_of((score > floor) & live) | tied);
    }
}

// The list's k best to keys [k] and scores [k] (or NULL); -1 and 0 in the places that stay empty.
static void finish(struct list *list, int k, int32_t *keys, float *scores, float *scratch, int64_t stride) {
    if (list->n > k) shrink(list, k, scratch, stride);
    __builtin_memcpy(keys, list->keys, list->n * sizeof *keys);
    for (int i = list->n; i < k; i++) keys[i] = -1;
    if (!scores) return;
    __builtin_memcpy(scores, list->scores, list->n * sizeof *scores);
    for (int i = list->n; i < k; i++) scores[i] = 0;
}

static struct list new_list(int32_t first, int32_t last, int m, float *scratch, int64_t stride) {
    scratch += 2 * m * stride;
    return (struct list){first, last, __builtin_nanf(""), 0, scratch, (int32_t *)(scratch + stride)};
}

#ifdef INT8
// A head's query q [D], rounded to int8 as in dsa/indexer.py, quantize; its scale.
static float quantize(const float *q, int8_t to[D]) {
    float max = 1e-30f, finite = 0;
    for (int d = 0; d < D; d++) {
        float size = q[d] < 0 ? -q[d] : q[d];
        max = size > max ? size : max;
        finite += q[d] - q[d];  // NaN, where one is NaN or infinite
    }
    float scale = max / 127 + finite;
    for (int d = 0; d < D; d++) to[d] = finite == 0 ? (int8_t)__builtin_elementwise_rint(q[d] / scale) : 0;
    return scale;
}
#endif

// Queries t .. t + n - 1 of q [T][H][D] and w [T][H].
static void load_queries(number *to, float *to_w, const float *q, const float *w, float scale, int64_t t, int n) {
    q += t * H * D;
    w += t * H;
    for (int i = 0; i < n * H; i++, q += D, to += STEPS) {
#ifdef INT8
        int8_t rounded[D];
        to_w[i] = w[i] * quantize(q, rounded) * scale;
#ifdef BYTES
        __builtin_memcpy(to, rounded, D);
        for (int d = 0; d < STEPS; d++) to[d] ^= 0x80808080;  // + 128 in each byte
#else
        for (int d = 0; d < D; d++) to[d] = rounded[d];
#endif
#else
        to_w[i] = w[i] * scale;
        __builtin_memcpy(to, q, D * sizeof *q);
#endif
    }
}

int dsa_block(void) { return BLOCK; }

// Queries t0 .. t1 - 1 of q [T][H][D] and w [T][H], the heads' weights, which `scale` multiplies. Query t
// sees the keys first[t] (or 0, where first is NULL) .. offset + t.
// keys int32 [T][k], scores float [T][k] or NULL; scratch [2 BLOCK + 4][cap + LANES], cap >= k + NT.
void dsa_select(const float *q, const float *w, float scale, struct tile *tiles, const int32_t *first, int64_t offset,
                int64_t t0, int64_t t1, int64_t k, int64_t cap, int32_t *keys, float *scores, float *scratch) {
    int64_t stride = cap + LANES;
    float *rest = scratch + 2 * BLOCK * stride;
    number qs[BLOCK][H][STEPS] = {};  // zeros behind the last query
    float ws[BLOCK][H] = {};
    for (int64_t t = t0; t < t1; t += BLOCK) {
        int n = t1 - t < BLOCK ? t1 - t : BLOCK;
        load_queries(qs[0][0], ws[0], q, w, scale, t, n);
        struct list lists[BLOCK];
        int64_t begin = INT32_MAX;
        int all_fit = !scores;  // no query sees more than k keys: nothing to rank
        for (int m = 0; m < BLOCK; m++) {
            int64_t from = m >= n ? INT32_MAX : first ? first[t + m] : 0, last = offset + t + m;
            lists[m] = new_list(from, last, m, scratch, stride);
            begin = from < begin ? from : begin;
            all_fit &= last - from < k;
        }
        for (int64_t i = begin / NT; i * NT < offset + t + n; i++)
            for (int m = 0; m < n; m += all_fit ? 1 : QUERIES) {
                if (all_fit) {
                    take(&tiles[i], &lists[m]);
                    continue;
                }
                rank(QUERIES, qs[m][0], ws[m], &tiles[i], 0, &lists[m]);
                for (int j = m; j < m + QUERIES; j++)
                    if (lists[j].n > cap - NT) shrink(&lists[j], k, rest, stride);
            }
        for (int m = 0; m < n; m++)
            finish(&lists[m], k, keys + (t + m) * k, scores ? scores + (t + m) * k : 0, rest, stride);
    }
}

// One query a row, q [B][H][D] and w [B][H], all keys up to `last` but padding, read from rows [B][S] as they are: strides
// in bytes, see pack. real [B][S] or NULL. The keys of a row are cut into `parts` of `length`, a multiple of NT; this call
// is for parts from .. to - 1 of the B * parts.  keys, scores [B][parts][k]; scratch [6][cap + LANES].
void dsa_select_one(const float *q, const float *w, float scale, const char *rows, int64_t row_stride, int64_t key_stride,
                    const uint8_t *real, int64_t S, int64_t last, int64_t parts, int64_t length, int64_t from, int64_t to,
                    int64_t k, int64_t cap, int32_t *keys, float *scores, float *scratch) {
    int64_t stride = cap + LANES;
    float *rest = scratch + 2 * stride;
    number qs[H][STEPS];
    float ws[H];
    struct tile tile;
    struct rows here;
    for (int64_t u = from; u < to; u++) {
        int64_t b = u / parts, begin = u % parts * length, end = begin + length;
        load_queries(qs[0], ws, q, w, scale, b, 1);
        struct list list = new_list(0, last, 0, scratch, stride);
        for (int64_t s = begin; s < end && s <= last; s += NT) {
            describe(&tile, &here, rows + b * row_stride, key_stride, real ? real + b * S : 0, s, S);
            if (!scores && last < k) take(&tile, &list);  // nothing to rank
            else rank(1, qs[0], ws, &tile, &here, &list);
            if (list.n > cap - NT) shrink(&list, k, rest, stride);
        }
        finish(&list, k, keys + u * k, scores ? scores + u * k : 0, rest, stride);
    }
}

// The k best of what was found in the parts of each of B rows. keys, scores [B][k]; scratch [6][parts * k + LANES]
void dsa_merge(const int32_t *part_keys, const float *part_scores, int64_t B, int64_t parts, int64_t k, int32_t *keys,
               float *scores, float *scratch) {
    int64_t stride = parts * k + LANES;
    for (int64_t b = 0; b < B; b++) {
        struct list list = new_list(0, 0, 0, scratch, stride);
        for (int64_t p = b * parts; p < (b + 1) * parts; p++)
            for (int64_t i = p * k; i < (p + 1) * k && part_keys[i] >= 0; i++) {
                list.scores[list.n] = part_scores[i];
                list.keys[list.n++] = part_keys[i];
            }
        finish(&list, k, keys + b * k, scores ? scores + b * k : 0, scratch + 2 * stride, stride);
    }
}
