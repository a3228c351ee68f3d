// Rows of numbers as columns: lanes are rows, so that a product with a row needs no sum over lanes.
//
// Each vector is loaded in parts of four words, of rows i, i + 4, ..; then fours are turned within the parts, which is
// cheap everywhere.
#pragma once
#include "vec.h"

// Four words of LANES rows, turned: lane l of out[i] is word first + i of row[l].
static inline void load_columns(vi out[4], const char *const row[LANES], int first) {
    typedef VECTOR(int32_t, 4) v4;
    typedef v4 v4_at __attribute__((aligned(1), may_alias));
#define PART(i, part) (*(const v4_at *)(row[i + 4 * (part)] + 4 * first))
#define PAIR(i, part) __builtin_shufflevector(PART(i, part), PART(i, part + 1), 0, 1, 2, 3, 4, 5, 6, 7)
#if LANES == 16
#define EACH(at) at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), \
                 at(8), at(9), at(10), at(11), at(12), at(13), at(14), at(15)
#define SAME(l) l
#define PARTS(i) __builtin_shufflevector(PAIR(i, 0), PAIR(i, 2), EACH(SAME))
#elif LANES == 8
#define EACH(at) at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)
#define PARTS(i) PAIR(i, 0)
#else
#define EACH(at) at(0), at(1), at(2), at(3)
#define PARTS(i) PART(i, 0)
#endif
// Of two vectors, part by part: the lower two words of each in turn, the upper two; the lower two of each side by side..
#define LOW(l) (((l) & 1) * LANES + ((l) & ~3) + ((l) & 2) / 2)
#define HIGH(l) (LOW(l) + 2)
#define LOW_PAIRS(l) (((l) & 2) / 2 * LANES + ((l) & ~3) + ((l) & 1))
#define HIGH_PAIRS(l) (LOW_PAIRS(l) + 2)
    vi a = PARTS(0), b = PARTS(1), c = PARTS(2), d = PARTS(3);
    vi ab = __builtin_shufflevector(a, b, EACH(LOW)), ab2 = __builtin_shufflevector(a, b, EACH(HIGH));
    vi cd = __builtin_shufflevector(c, d, EACH(LOW)), cd2 = __builtin_shufflevector(c, d, EACH(HIGH));
    out[0] = __builtin_shufflevector(ab, cd, EACH(LOW_PAIRS));
    out[1] = __builtin_shufflevector(ab, cd, EACH(HIGH_PAIRS));
    out[2] = __builtin_shufflevector(ab2, cd2, EACH(LOW_PAIRS));
    out[3] = __builtin_shufflevector(ab2, cd2, EACH(HIGH_PAIRS));
}
