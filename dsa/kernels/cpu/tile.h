// Index keys in tiles: lanes are keys, so that a score is a sum over rows of a tile and needs no sum over lanes.
//
// Compiled for keys of -DD= numbers: float32, -DBF16, or -DINT8 with a float32 scale behind each key's bytes
// (dsa/indexer.py, pack_int8). Products of int8 are exact in whatever they are computed: as bytes where the processor
// multiplies them four at once, else as floats.
#pragma once
#include "columns.h"

#define NT 96              // keys in a tile: at D = 64 of floats 24 KB, which stays in L1 while many queries pass over it
#define NV 6               // vectors of keys in registers at once, at most
#define NOWHERE INT32_MAX  // position of what is no key

#if defined INT8 && defined __AVX512VNNI__
#define BYTES
typedef int32_t number;  // four signed bytes of a key; of a query, four unsigned ones: itself + 128
#define STEPS (D / 4)    // numbers of a key
#else
typedef float number;
#define STEPS D
#endif
typedef VECTOR(number, LANES) vn;

#if defined INT8
#define WORDS (D / 4)              // 32 bits each, of a key in memory
#define ROW_BYTES (D + 4)
#elif defined BF16
#define WORDS (D / 2)
#define ROW_BYTES (2 * D)
#else
#define WORDS D
#define ROW_BYTES (4 * D)
#endif
#define PER_WORD (STEPS / WORDS)

struct tile {
    number k[STEPS][NT];
    int32_t position[NT];  // of the key in its row; NOWHERE for padding and beyond the last key
    float scale[NT];       // int8
    int32_t bias[NT];      // BYTES: 128 * sum(key), what the queries' + 128 adds to a product
};

// Keys first .. first + NT - 1 where they are in memory.
struct rows {
    const char *at;
    int64_t stride;
    char copy[NT][ROW_BYTES];  // of the last rows, where they are fewer than NT
};

static inline vn load_numbers(const number *p) { return (vn)load_int((const int32_t *)p); }

// acc + q . key for LANES keys
static inline vn add_product(vn acc, number q, vn k) {
#ifdef BYTES
    return (vn)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(q), (__m512i)k);
#else
    return acc + q * k;
#endif
}

static inline vi add_bias(vi bias, vi word) {
#ifdef BYTES
    return add_product(bias, (int32_t)0x80808080, word);
#else
    return bias;
#endif
}

// The numbers in a word of LANES keys.
static inline void unpack(vn numbers[PER_WORD], vi word) {
#if defined INT8 && !defined BYTES
    UNROLL for (int b = 0; b < 4; b++) numbers[b] = __builtin_convertvector(word << (24 - 8 * b) >> 24, vf);
#elif defined BF16
    numbers[0] = (vf)(word << 16);
    numbers[1] = (vf)(word & (int32_t)0xffff0000);
#else
    numbers[0] = (vn)word;
#endif
}

// All of a tile but the keys' numbers, and where these are: keys [S] are `stride` bytes apart. real [S]: 0 at padding; or
// NULL, where there is none.
static inline void describe(struct tile *tile, struct rows *rows, const char *keys, int64_t stride, const uint8_t *real,
                            int64_t first, int64_t S) {
    int n = S - first < NT ? S - first : NT;
    rows->at = keys + first * stride;
    rows->stride = stride;
    if (n < NT) {
        for (int i = 0; i < n; i++) __builtin_memcpy(rows->copy[i], rows->at + i * stride, ROW_BYTES);
        __builtin_memset(rows->copy[n], 0, (NT - n) * ROW_BYTES);
        rows->at = rows->copy[0];
        rows->stride = ROW_BYTES;
    }
    for (int i = 0; i < NT; i++) tile->position[i] = first + i;
    for (int i = 0; i < n && real; i++)
        if (!real[first + i]) tile->position[i] = NOWHERE;
    for (int i = n; i < NT; i++) tile->position[i] = NOWHERE;
#ifdef INT8
    for (int i = 0; i < NT; i++) __builtin_memcpy(&tile->scale[i], rows->at + i * rows->stride + D, sizeof(float));
#endif
}

static inline void find(const char *row[LANES], const struct rows *rows, int c) {  // keys c .. c + LANES - 1
    UNROLL for (int l = 0; l < LANES; l++) row[l] = rows->at + (c + l) * rows->stride;
}

static void pack(struct tile *tile, const char *keys, int64_t stride, const uint8_t *real, int64_t first, int64_t S) {
    struct rows rows;
    describe(tile, &rows, keys, stride, real, first, S);
    for (int c = 0; c < NT; c += LANES) {
        const char *row[LANES];
        find(row, &rows, c);
        vi bias = {};
        for (int word = 0; word < WORDS; word += 4) {
            vi x[4];
            load_columns(x, row, word);
            UNROLL for (int i = 0; i < 4; i++) {
                vn numbers[PER_WORD];
                unpack(numbers, x[i]);
                UNROLL for (int j = 0; j < PER_WORD; j++)
                    store_int((int32_t *)&tile->k[(word + i) * PER_WORD + j][c], (vi)numbers[j]);
                bias = add_bias(bias, x[i]);
            }
        }
        store_int(tile->bias + c, bias);
    }
}

#define INLINE static inline __attribute__((always_inline))  // for each number of rows anew
#define VECTORS(rows) (REGISTERS == 32 || (rows) == 1 ? NV : (rows) == 2 ? 4 : 2)  // of keys, whose sums registers hold

// acc[r][j] += q[r] [steps] . columns c + j * LANES .. of k [steps][NT], for rows r and nv vectors j
INLINE void dots(const int rows, const int nv, const int steps, vn acc[][NV], const number *const q[],
                 const number (*k)[NT], int c) {
#pragma clang loop unroll_count(2)
    for (int d = 0; d < steps; d++)
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int j = 0; j < nv; j++)
                acc[r][j] = add_product(acc[r][j], q[r][d], load_numbers(k[d] + c + j * LANES));
}

int dsa_tile_keys(void) { return NT; }
int dsa_tile_bytes(void) { return sizeof(struct tile); }

// Tiles from .. to - 1 of rows [S], see pack.
void dsa_pack(const char *rows, int64_t stride, const uint8_t *real, int64_t S, int64_t from, int64_t to,
              struct tile *tiles) {
    for (int64_t i = from; i < to; i++) pack(&tiles[i], rows, stride, real, i * NT, S);
}
