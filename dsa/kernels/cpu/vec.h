// Vectors as types of the language: + * < and & work lane by lane on AVX-512, AVX2, NEON and SSE alike, and
// `acc += scalar * vector` is one fused multiply-add wherever there is one.
//
// Functions that Python calls are named dsa_*; all their integers are int64_t and their numbers float.
#pragma once
#include <stdint.h>

#ifdef __x86_64__
#include <immintrin.h>  // compress, and products of bytes
#endif

#if defined __AVX512F__
#define LANES 16
#define REGISTERS 32
#elif defined __AVX2__ && defined __BMI2__
#define LANES 8
#define REGISTERS 16
#else  // NEON, and whatever else there is
#define LANES 4
#define REGISTERS 32
#endif

#define VECTOR(type, lanes) type __attribute__((vector_size(sizeof(type) * (lanes))))
typedef VECTOR(float, LANES) vf;
typedef VECTOR(int32_t, LANES) vi;
typedef VECTOR(uint16_t, LANES) vbf16;  // bfloat16: the upper halves of floats
// In memory: of any type, and only as aligned as its elements.
typedef vf vf_at __attribute__((aligned(4), may_alias));
typedef vi vi_at __attribute__((aligned(4), may_alias));
typedef vbf16 vbf16_at __attribute__((aligned(2), may_alias));

// An array of accumulators lives in registers only if every loop over it is unrolled completely.
#define UNROLL _Pragma("clang loop unroll(full)")

static inline vf load(const float *p) { return *(const vf_at *)p; }
static inline void store(float *p, vf x) { *(vf_at *)p = x; }
static inline vi load_int(const int32_t *p) { return *(const vi_at *)p; }
static inline void store_int(int32_t *p, vi x) { *(vi_at *)p = x; }

static inline vf load_bf16(const uint16_t *p) { return (vf)(__builtin_convertvector(*(const vbf16_at *)p, vi) << 16); }

static inline vf all(float x) { return x - (vf){}; }

static inline vi count_up(int32_t from) {  // from, from + 1, ...
    vi v;
    UNROLL for (int i = 0; i < LANES; i++) v[i] = i;
    return v + from;
}

static inline uint32_t bits_of(vi mask) {  // lane i, 0 or -1 -> bit i
    typedef _Bool bools __attribute__((ext_vector_type(LANES)));
    bools b = __builtin_convertvector(mask, bools);
    uint32_t bits = 0;
    __builtin_memcpy(&bits, &b, sizeof b);
    return bits & ((1u << LANES) - 1);
}

static inline vi blend(vi mask, vi x, vi y) { return (x & mask) | (y & ~mask); }

// The lanes of x whose bit is set, side by side at p. Writes up to a whole vector, so p needs LANES of slack.
static inline void compress(void *p, vi x, uint32_t bits) {
#if defined __AVX512F__  // in a register, then stored: the instruction's own form with a memory target is slow on Zen 4
    *(vi_at *)p = (vi)_mm512_maskz_compress_epi32(bits, (__m512i)x);
#elif LANES == 8  // the numbers 0 .. 7 of the lanes that stay, gathered as bytes, are a permutation
    uint64_t stay = _pext_u64(0x0706050403020100, _pdep_u64(bits, 0x0101010101010101) * 255);
    *(vi_at *)p = (vi)_mm256_permutevar8x32_epi32((__m256i)x, _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(stay)));
#else
    int32_t *to = p;
    UNROLL for (int i = 0; i < LANES; i++) { *to = x[i]; to += bits >> i & 1; }
#endif
}
