/* Products of 8-bit integers: weights in groups of GROUP inputs, activations rounded to DIGITS digits of 8 bits.

   Weights lie in panels of 16 outputs: for every 4 inputs, 4 bytes of each output, as integer + 128. Each output has a bf16
   scale per group; so has each row of activations, in fp32. Sums of a group are exact, and groups are added in one order, so a
   row gives the same bits in any batch. Missing outputs and inputs are zeros. */

#ifndef FIRTH_INT8_H
#define FIRTH_INT8_H

#include "vectors.h"

#define GROUP 64
#define PANEL 16
#define BASE 128    /* the place value of the first digit */
#define LARGEST (127 * BASE)
#define MIN_ACTIVATION 1e-30f /* smaller groups are zeros: the inverse of their step would be infinite */

/* Rows of activations, rounded. */
typedef struct {
    int8_t *digits;   /* (rows, groups, 2, GROUP): low digits, high digits */
    float *steps;     /* (rows, groups) */
    int32_t *offsets; /* (rows, groups): -128 times the sum of the integers */
    int64_t inputs, groups;
} Rounded;

static inline int64_t groups_of(int64_t in) { return (in + GROUP - 1) / GROUP; }

static Rounded rounded_rows(int64_t rows, int64_t in) {
    int64_t groups = groups_of(in);
    return (Rounded){(int8_t *)scratch(rows * groups * GROUP / 2), scratch(rows * groups), (int32_t *)scratch(rows * groups),
                     groups * GROUP, groups};
}

static void free_rounded(Rounded *rows) {
    free(rows->digits);
    free(rows->steps);
    free(rows->offsets);
}

/* Round GROUP numbers. If any of them is not finite, neither is the step, and the integers are zeros: the sums are NaN. */
INLINE void round_group(const float *restrict x, int8_t *restrict low, int8_t *restrict high, float *step, int32_t *offset) {
    int32_t most = 0, sum = 0;
    #pragma omp simd reduction(max : most)
    for (int j = 0; j < GROUP; j++) {
        int32_t size = to_bits(x[j]) & 0x7fffffff; /* ordered as the numbers are, and NaN above all */
        most = size > most ? size : most;
    }
    float largest = from_bits(most), inverse = largest >= MIN_ACTIVATION ? LARGEST / largest : 0;
    #pragma omp simd reduction(+ : sum)
    for (int j = 0; j < GROUP; j++) {
        int32_t whole = (int32_t)nearbyintf(inverse > 0 ? x[j] * inverse : 0), first = (whole + BASE / 2) >> 7;
        sum += whole;
        high[j] = first;
        low[j] = whole - first * BASE;
    }
    *step = largest * (1.0f / LARGEST);
    *offset = -128 * sum;
}

static void round_rows(const float *x, int64_t ldx, int64_t rows, int64_t in, const Rounded *to) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < to->groups; g++) {
            const float *from = x + r * ldx + g * GROUP;
            float rest[GROUP] = {0};
            int64_t at = r * to->groups + g;
            int8_t *low = to->digits + at * 2 * GROUP;
            if ((g + 1) * GROUP > in) from = memcpy(rest, from, (in - g * GROUP) * sizeof(float));
            round_group(from, low, low + GROUP, to->steps + at, to->offsets + at);
        }
}

/* a[l] += the sum of w[4 l + j] x_j over 4 inputs, for LANES outputs. `x` holds 4 integers. */
#if defined(__AVX512VNNI__) && LANES == 16
#define BIASED 1 /* weights are multiplied as integer + 128, which the offsets of a row take back */
#define COLUMNS 2 /* vectors of outputs that are computed together */
INLINE I dot(I a, const uint8_t *w, int32_t x) {
    return (I)_mm512_dpbusd_epi32((__m512i)a, _mm512_loadu_si512(w), _mm512_set1_epi32(x));
}
#elif defined(__AVXVNNI__) && LANES == 8
#define BIASED 1
#define COLUMNS 1
INLINE I dot(I a, const uint8_t *w, int32_t x) {
    return (I)_mm256_dpbusd_avx_epi32((__m256i)a, _mm256_loadu_si256((const void *)w), _mm256_set1_epi32(x));
}
#elif defined(__AVX2__)
#define BIASED 0
#define COLUMNS 1
/* Pairs of products are added in 16 bits, which cannot saturate for integers of at most 127. */
INLINE __m256i half_dot(__m256i a, const uint8_t *w, int32_t x) {
    __m256i integers = _mm256_xor_si256(_mm256_loadu_si256((const void *)w), _mm256_set1_epi8(-128)), four = _mm256_set1_epi32(x);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(four), _mm256_sign_epi8(integers, four));
    return _mm256_add_epi32(a, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE I dot(I a, const uint8_t *w, int32_t x) {
#if LANES == 8
    return (I)half_dot((__m256i)a, w, x);
#else
    __m512i whole = (__m512i)a;
    __m256i first = half_dot(_mm512_castsi512_si256(whole), w, x), second = half_dot(_mm512_extracti64x4_epi64(whole, 1), w + 32, x);
    return (I)_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
#endif
}
#else
#define BIASED 0
#define COLUMNS 1
INLINE I dot(I a, const uint8_t *w, int32_t x) {
    int8_t four[4];
    memcpy(four, &x, 4);
    for (int l = 0; l < LANES; l++)
        for (int j = 0; j < 4; j++) a[l] += (w[4 * l + j] - 128) * four[j];
    return a;
}
#endif

INLINE int32_t four_at(const int8_t *x) { int32_t four; memcpy(&four, x, 4); return four; }

/* The sums of R rows from `row` on, for C vectors of outputs from the panels at w: y[(r * C + c) * LANES + lane]. */
INLINE void int8_tile(const uint8_t *w, const uint16_t *steps, const Rounded *x, int64_t row, const int R, const int C, float *y) {
    const int8_t *digits = x->digits + row * 2 * x->inputs;
    const float *x_steps = x->steps + row * x->groups;
    const int32_t *offsets = x->offsets + row * x->groups;
    V sums[R * C];
    #pragma GCC unroll 16
    for (int j = 0; j < R * C; j++) sums[j] = (V){0};
    for (int64_t g = 0; g < x->groups; g++) {
        I low[R * C], high[R * C];
        #pragma GCC unroll 16
        for (int j = 0; j < R * C; j++) {
            low[j] = (I){0} + (BIASED ? offsets[j / C * x->groups + g] : 0);
            high[j] = (I){0};
        }
        #pragma GCC unroll 4
        for (int k = 0; k < GROUP; k += 4) {
            #pragma GCC unroll 16
            for (int j = 0; j < R * C; j++) {
                const uint8_t *at = w + (j % C * LANES / PANEL * x->inputs + g * GROUP + k) * PANEL + j % C * LANES % PANEL * 4;
                const int8_t *from = digits + j / C * 2 * x->inputs + g * 2 * GROUP + k;
                low[j] = dot(low[j], at, four_at(from));
                high[j] = dot(high[j], at, four_at(from + GROUP));
            }
        }
        #pragma GCC unroll 16
        for (int j = 0; j < R * C; j++) {
            V step = weights_at(steps, (j % C * LANES / PANEL * x->groups + g) * PANEL + j % C * LANES % PANEL, BF16);
            V exact = __builtin_convertvector(low[j] + high[j] * BASE, V);
            sums[j] += exact * (step * x_steps[j / C * x->groups + g]);
        }
    }
    #pragma GCC unroll 16
    for (int j = 0; j < R * C; j++) *(V *)(y + j * LANES) = sums[j];
}

#endif
