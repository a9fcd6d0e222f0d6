/* Vectors of LANES floats, and loads of fp32 and bf16 numbers. */

#ifndef FIRTH_VECTORS_H
#define FIRTH_VECTORS_H

#include "native.h"
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

enum { FP32, BF16, INT8 };

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
typedef float V __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
#define INLINE static inline __attribute__((always_inline))

#ifdef __clang__
#define PICK(p, q, ...) __builtin_shufflevector(p, q, __VA_ARGS__)
#else
#define PICK(p, q, ...) __builtin_shuffle(p, q, (I){__VA_ARGS__})
#endif

INLINE V weights_at(const void *w, int64_t at, const int kind) {
    if (kind == FP32) return *(const V *)((const float *)w + at);
#if defined(__AVX512F__) /* compilers generate poor code for the general form below */
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)((const uint16_t *)w + at))), 16);
#elif defined(__AVX2__)
    return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)((const uint16_t *)w + at))), 16);
#else
    return (V)(__builtin_convertvector(*(const H *)((const uint16_t *)w + at), U) << 16);
#endif
}

INLINE float weight_at(const void *w, int64_t at, const int kind) {
    if (kind == FP32) return ((const float *)w)[at];
    return from_bits((uint32_t)((const uint16_t *)w)[at] << 16);
}

#endif
