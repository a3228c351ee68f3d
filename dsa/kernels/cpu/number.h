// The numbers of tensors that come and go: float, or with -DBF16 bfloat16. All that is computed is float.
#pragma once
#include <stdint.h>

#ifdef BF16
typedef uint16_t number;
static inline float widen(number x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}
static inline number narrow(float x) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40;
}
#else
typedef float number;
static inline float widen(number x) { return x; }
static inline number narrow(float x) { return x; }
#endif
