/* Shared by native.c and decode.c: loads and stores, exp and tanh, attention heads, activations. */

#ifndef FIRTH_NATIVE_H
#define FIRTH_NATIVE_H

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define SMALL 32768 /* numbers from which on a second thread pays */
#define EXPORT __attribute__((visibility("default")))

static inline float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

/* Load n numbers from `from` + `at` as floats. */
static inline void load(float *restrict to, const void *from, int64_t at, int64_t n, int half) {
    if (half) {
        const uint16_t *restrict x = (const uint16_t *)from + at;
        #pragma omp simd
        for (int64_t i = 0; i < n; i++) to[i] = from_bits((uint32_t)x[i] << 16);
    } else memcpy(to, (const float *)from + at, n * sizeof(float));
}

/* Round to nearest, ties to even; NaN stays NaN. */
static inline uint16_t rounded(float x) {
    uint32_t bits = to_bits(x);
    uint32_t near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : near;
}

static inline void store(void *to, int64_t at, const float *restrict from, int64_t n, int half) {
    if (half) {
        uint16_t *restrict y = (uint16_t *)to + at;
        int64_t done = 0;
#ifdef __AVX512BF16__
        for (; done + 16 <= n; done += 16)
            _mm256_storeu_si256((__m256i *)(y + done), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + done)));
#endif
        #pragma omp simd
        for (int64_t i = done; i < n; i++) y[i] = rounded(from[i]);
    } else memcpy((float *)to + at, from, n * sizeof(float));
}

/* exp(x) for x <= 88, relative error 2e-7: 2^k e^r by a polynomial (Cephes). Below -87 it is 0. */
static inline float exponential(float x) {
    float at = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float k = (at * 1.44269504f + 12582912.0f) - 12582912.0f;
    float r = at - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    float y = (p * r * r + r + 1.0f) * from_bits((uint32_t)((int32_t)k + 127) << 23);
    return x < -87.0f ? 0.0f : y;
}

/* tanh(x), relative error 3e-7, for small x too (Cephes). */
static inline float hyperbolic(float x) {
    float z = x * x, size = fabsf(x);
    float p = -5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    float small = p * z * x + x;
    float large = 1.0f - 2.0f / (exponential(2.0f * (size > 10.0f ? 10.0f : size)) + 1.0f);
    return size < 0.625f || x != x ? small : copysignf(large, x);
}

/* The normal distribution function at x, error 2e-7 (Abramowitz and Stegun 7.1.26), and its density. */
static inline float normal(float x, float *density) {
    float size = fabsf(x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * size);
    float e = exponential(-0.5f * x * x);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    float tail = 0.5f * p * t * e;
    *density = 0.39894228f * e;
    return x < 0 ? tail : 1.0f - tail;
}

static inline float *scratch(int64_t n) { return aligned_alloc(64, ((n * sizeof(float) + 63) / 64) * 64); }

/* One head of a token: unit RMS and rotary position. With a constant width the compiler unrolls the loops. */
static inline float place(float *restrict x, float *restrict turned, const float *restrict c, const float *restrict s,
                          float eps, int64_t width) {
    int64_t side = width / 2;
    float factor = 1;
    if (eps >= 0) {
        float square = 0;
        #pragma omp simd reduction(+ : square)
        for (int64_t j = 0; j < width; j++) square += x[j] * x[j];
        factor = 1.0f / sqrtf(square / width + eps);
    }
    if (c) {
        #pragma omp simd
        for (int64_t j = 0; j < side; j++) {
            turned[j] = factor * (x[j] * c[j] - x[j + side] * s[j]);
            turned[j + side] = factor * (x[j + side] * c[j + side] + x[j] * s[j]);
        }
    } else {
        #pragma omp simd
        for (int64_t j = 0; j < width; j++) turned[j] = factor * x[j];
    }
    return factor;
}

enum { RELU, RELU2, GELU, GELU_TANH, SILU };

static inline float linear_unit(float x) { return x < 0 ? 0 : x; }

static inline float gelu_inner(float x) { return hyperbolic(0.79788456f * (x + 0.044715f * x * x * x)); }

static inline float value_of(int kind, float x) {
    float density;
    switch (kind) {
    case RELU: return linear_unit(x);
    case RELU2: return linear_unit(x) * linear_unit(x);
    case GELU: return x * normal(x, &density);
    case GELU_TANH: return 0.5f * x * (1 + gelu_inner(x));
    default: return x / (1.0f + exponential(-x));
    }
}

/* The same for n numbers; the kind is a constant in each loop, so that the compiler can vectorize it. */
#define FOR_EACH(kind, function, to, x, n) \
    switch (kind) { \
    case RELU: LOOP(function(RELU, x[j]), to, n) break; \
    case RELU2: LOOP(function(RELU2, x[j]), to, n) break; \
    case GELU: LOOP(function(GELU, x[j]), to, n) break; \
    case GELU_TANH: LOOP(function(GELU_TANH, x[j]), to, n) break; \
    default: LOOP(function(SILU, x[j]), to, n) break; \
    }
#define LOOP(result, to, n) _Pragma("omp simd") for (int64_t j = 0; j < n; j++) to[j] = result;

static inline void values(int kind, const float *restrict x, float *restrict to, int64_t n) { FOR_EACH(kind, value_of, to, x, n) }

#endif
