// Index keys in tiles: lanes are keys, so that a score is a sum over rows of a tile and needs no sum over lanes.
//
// Compiled for keys of -DD= numbers: float32, -DBF16, or -DINT8 with a float32 scale behind each key's bytes
// (dsa/indexer.py, pack_int8). Products of int8 are exact in whatever they are computed: as bytes where the processor
// multiplies them four at once, else as floats.
#pragma once
#include "vec.h"

#define NT 96              // keys in a tile: at D = 64 of floats 24 KB, which stays in L1 while many queries pass over it
#define NOWHERE INT32_MAX  // position of what is no key

#if defined INT8
#define PER_WORD 4  // numbers in 32 bits of a row
#elif defined BF16
#define PER_WORD 2
#else
#define PER_WORD 1
#endif
#define WORDS (D / PER_WORD)

#if defined INT8 && defined __AVX512VNNI__
#define BYTES
#define STEPS (D / 4)
typedef int32_t number;  // four signed bytes of a key; of a query, four unsigned ones: itself + 128
#else
#define STEPS D
typedef float number;
#endif
typedef VECTOR(number, LANES) vn;

struct tile {
    number k[STEPS][NT];
    int32_t position[NT];  // of the key in its row; NOWHERE for padding and beyond the last key
#ifdef INT8
    float scale[NT];
#endif
#ifdef BYTES
    int32_t bias[NT];  // 128 * sum(key): what the queries' + 128 adds to a product
#endif
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

// The numbers of one word of LANES keys: rows of the tile from column i on.
static inline void unpack(struct tile *tile, int word, int i, vi x) {
    number *to = &tile->k[word * STEPS / WORDS][i];
#if defined BYTES
    store_int(to, x);
    store_int(tile->bias + i, add_product(load_int(tile->bias + i), (int32_t)0x80808080, x));
#elif defined INT8
    UNROLL for (int b = 0; b < 4; b++) store(to + b * NT, __builtin_convertvector(x << (24 - 8 * b) >> 24, vf));
#elif defined BF16
    store(to, (vf)(x << 16));
    store(to + NT, (vf)(x & (int32_t)0xffff0000));
#else
    store(to, (vf)x);
#endif
}

// Keys first .. first + NT - 1 of rows [S], `stride` bytes apart. real [S]: 0 at padding; NULL where there is none.
static void pack(struct tile *tile, const char *rows, int64_t stride, const uint8_t *real, int64_t first, int64_t S) {
    enum { AT_ONCE = WORDS < LANES ? WORDS : LANES };
    for (int i = 0; i < NT; i += LANES) {
        const char *row[LANES];
        for (int l = 0; l < LANES; l++) {
            int64_t s = first + i + l, in = s < S ? s : S - 1;
            row[l] = rows + in * stride;
            tile->position[i + l] = s < S && (!real || real[s]) ? s : NOWHERE;
#ifdef INT8
            __builtin_memcpy(&tile->scale[i + l], row[l] + D, sizeof(float));
#endif
        }
#ifdef BYTES
        store_int(tile->bias + i, (vi){});
#endif
        for (int word = 0; word < WORDS; word += AT_ONCE) {
            vi x[LANES] = {};
            UNROLL for (int l = 0; l < LANES; l++) __builtin_memcpy(&x[l], row[l] + 4 * word, 4 * AT_ONCE);
            transpose(x);
            UNROLL for (int w = 0; w < AT_ONCE; w++) unpack(tile, word + w, i, x[w]);
        }
    }
}
