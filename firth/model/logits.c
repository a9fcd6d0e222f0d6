/* The most likely token of each row of logits, and the logarithm of the sum of all exponentials, in one pass over memory. */

#include "native.h"

#define PART 4096 /* logits that are read twice from the cache of a core */

/* logits (rows, vocab) -> best (rows,), the first of the largest, and normalizer (rows,). The order of a row's sums is fixed. */
EXPORT void summarize(const float *logits, int64_t rows, int64_t vocab, int64_t *best, float *normalizer, int threads) {
    int64_t parts = (vocab + PART - 1) / PART;
    float *most = scratch(rows * parts), *sums = scratch(rows * parts);
    #pragma omp parallel for schedule(static) num_threads(threads) if (rows * vocab > SMALL)
    for (int64_t i = 0; i < rows * parts; i++) {
        int64_t start = i % parts * PART, n = vocab - start < PART ? vocab - start : PART;
        const float *x = logits + i / parts * vocab + start;
        float largest = -INFINITY, sum = 0;
        #pragma omp simd reduction(max : largest)
        for (int64_t j = 0; j < n; j++) largest = x[j] > largest ? x[j] : largest;
        if (largest > -INFINITY) {
            #pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < n; j++) sum += exponential(x[j] - largest);
        } else {
            #pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < n; j++) sum += x[j] == -INFINITY ? 0 : x[j]; /* NaN stays visible */
        }
        most[i] = largest;
        sums[i] = sum;
    }
    for (int64_t r = 0; r < rows; r++) {
        const float *own = most + r * parts, *x;
        int64_t first = 0, at = 0;
        double sum = 0;
        for (int64_t p = 1; p < parts; p++) first = own[p] > own[first] ? p : first;
        for (int64_t p = 0; p < parts; p++) sum += own[p] > -INFINITY ? sums[r * parts + p] * exp((double)own[p] - own[first]) : sums[r * parts + p];
        x = logits + r * vocab + first * PART;
        while (at < vocab - first * PART && x[at] != own[first]) at++;
        best[r] = at < vocab - first * PART ? first * PART + at : 0;
        normalizer[r] = own[first] + log(sum);
    }
    free(most);
    free(sums);
}
