// Functions of a vector of LN floats, lane by lane and over the lanes. LN is defined before.
#pragma once
#include "vec.h"

typedef VECTOR(float, LN) vh;
typedef VECTOR(int32_t, LN) vhi;

static inline vh maximum(vh a, vh b) {  // b where one is NaN; as a choice it is one instruction
    vhi a_wins = a > b;
    return (vh)((a_wins & (vhi)a) | (~a_wins & (vhi)b));
}

static inline vh relu(vh x) { return (vh)((vhi)x & ~(x < 0)); }  // keeps NaN

static inline float sum_lanes(vh x) {
    float half[LN];
    __builtin_memcpy(half, &x, sizeof x);
    UNROLL for (int n = LN / 2; n; n /= 2)
        UNROLL for (int i = 0; i < n; i++) half[i] += half[i + n];
    return half[0];
}

static inline float max_lanes(vh x) {
    float max = x[0];
    for (int i = 1; i < LN; i++) max = max > x[i] ? max : x[i];
    return max;
}

// e^x for x <= 88 (Cephes: 2^round(x / ln 2) times a polynomial of the rest); below -87 about 0.
static inline vh exponential(vh x) {
    x = maximum((vh){} - 87.33654f, x);
    vh n = __builtin_elementwise_rint(x * 1.44269504f);
    x = x - n * 0.693145751953125f;
    x = x - n * 1.428606765330187e-06f;
    vh y = x * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * (x * x) + x + 1.0f;
    return y * (vh)((__builtin_convertvector(n, vhi) + 127) << 23);
}

// ln x for normal x > 0 (Cephes: of x = m 2^e, sqrt(1/2) <= m < sqrt(2), a polynomial of m - 1).
static inline vh logarithm(vh x) {
    vhi bits = (vhi)x - 0x3f3504f3, e = bits >> 23;  // sqrt(1/2)
    vh m = (vh)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f, n = __builtin_convertvector(e, vh), z = m * m;
    vh y = m * 7.0376836292e-2f - 1.1514610310e-1f;
    y = y * m + 1.1676998740e-1f;
    y = y * m - 1.2420140846e-1f;
    y = y * m + 1.4249322787e-1f;
    y = y * m - 1.6668057665e-1f;
    y = y * m + 2.0000714765e-1f;
    y = y * m - 2.4999993993e-1f;
    y = y * m + 3.3333331174e-1f;
    y = y * m * z - 2.12194440e-4f * n - 0.5f * z;
    return m + y + 0.693359375f * n;
}
