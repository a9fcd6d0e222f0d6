/* Elementwise operations of a training step, each in one pass over memory; compiled and called by `firth.model.native`.

   A row is read into a buffer of floats, processed there, and written once. Numbers in memory are fp32, or bf16 if the flag
   `half` of a pointer is 1; all arithmetic is fp32. Rows are divided among `threads` OpenMP threads. Only the gradients of
   gains and offsets are sums over rows: nothing else depends on the number of threads, and nothing on their order.
   `firth/model/fused.py` has the formulas and their gradients, and computes the same without a compiler. */

#include "native.h"

#define LARGE_CAP 80 /* exp of a soft cap above this overflows: the largest logit of the row is subtracted, as without a cap */

/* ------------------------------------------------------------------------------------------ norms

   y = (x - mean) * inverse * gain + offset over rows of `width` numbers; the mean is 0 unless `center`. */

EXPORT void norm_forward(const void *x, int xhalf, void *y, int yhalf, const float *gain, const float *offset, float *mean,
                         float *inverse, int64_t rows, int64_t width, float eps, int center, int threads) {
    #pragma omp parallel num_threads(threads) if (rows * width >= SMALL)
    {
        float *row = scratch(width);
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            float middle = 0, square = 0;
            load(row, x, i * width, width, xhalf);
            if (center) {
                #pragma omp simd reduction(+ : middle)
                for (int64_t j = 0; j < width; j++) middle += row[j];
                middle /= width;
                #pragma omp simd
                for (int64_t j = 0; j < width; j++) row[j] -= middle;
            }
            #pragma omp simd reduction(+ : square)
            for (int64_t j = 0; j < width; j++) square += row[j] * row[j];
            float factor = 1.0f / sqrtf(square / width + eps);
            #pragma omp simd
            for (int64_t j = 0; j < width; j++) row[j] *= factor;
            if (gain) {
                #pragma omp simd
                for (int64_t j = 0; j < width; j++) row[j] *= gain[j];
            }
            if (offset) {
                #pragma omp simd
                for (int64_t j = 0; j < width; j++) row[j] += offset[j];
            }
            store(y, i * width, row, width, yhalf);
            if (center) mean[i] = middle;
            inverse[i] = factor;
        }
        free(row);
    }
}

/* of: x, or with `normal_form` (x - mean) * inverse. The gradients of gain and offset are added to the arguments. */
EXPORT void norm_backward(const void *grad, int ghalf, const void *of, int ohalf, int normal_form, const float *gain,
                          const float *mean, const float *inverse, void *dx, int dhalf, float *dgain, float *doffset,
                          int64_t rows, int64_t width, int center, int threads) {
    int64_t kept = (dgain || doffset) ? 2 * width : 0;
    float *sums = scratch(threads * kept + 1); /* one per thread, added up in order: deterministic */
    memset(sums, 0, threads * kept * sizeof(float));
    #pragma omp parallel num_threads(threads) if (rows * width >= SMALL)
    {
        float *g = scratch(2 * width), *n = g + width;
        float *own_gain = sums + omp_get_thread_num() * kept, *own_offset = own_gain + width;
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            float factor = inverse[i], along = 0, sum = 0;
            load(g, grad, i * width, width, ghalf);
            load(n, of, i * width, width, ohalf);
            if (!normal_form) {
                float middle = center ? mean[i] : 0;
                #pragma omp simd
                for (int64_t j = 0; j < width; j++) n[j] = (n[j] - middle) * factor;
            }
            if (doffset) {
                #pragma omp simd
                for (int64_t j = 0; j < width; j++) own_offset[j] += g[j];
            }
            if (dgain) {
                #pragma omp simd
                for (int64_t j = 0; j < width; j++) own_gain[j] += g[j] * n[j];
            }
            if (gain) {
                #pragma omp simd
                for (int64_t j = 0; j < width; j++) g[j] *= gain[j];
            }
            #pragma omp simd reduction(+ : along, sum)
            for (int64_t j = 0; j < width; j++) { along += g[j] * n[j]; sum += g[j]; }
            along /= width;
            sum = center ? sum / width : 0;
            #pragma omp simd
            for (int64_t j = 0; j < width; j++) g[j] = (g[j] - n[j] * along - sum) * factor;
            store(dx, i * width, g, width, dhalf);
        }
        free(g);
    }
    for (int64_t i = 0; kept && i < threads; i++) {
        if (dgain) for (int64_t j = 0; j < width; j++) dgain[j] += sums[i * kept + j];
        if (doffset) for (int64_t j = 0; j < width; j++) doffset[j] += sums[i * kept + width + j];
    }
    free(sums);
}

/* ------------------------------------------------------------------------------------------ heads

   Rows of concatenated queries, keys and values, heads of `width` numbers -> three tensors (batch, heads, length, width).
   Queries and keys get unit RMS if eps >= 0, and rotary positions if there are cosines (1 or batch, length, width) and sines
   (half as wide): (a, b) -> (a cos - b sin, b cos + a sin). `inverse` (batch, length, queries + keys): for the backward pass. */

/* The gradient of a head before `place`, from that after it; x: the head before. */
static inline void unplace(const float *restrict grad, const float *restrict x, float *restrict out, const float *restrict c,
                           const float *restrict s, float factor, int unit, int64_t width) {
    int64_t side = width / 2;
    if (c) {
        #pragma omp simd
        for (int64_t j = 0; j < side; j++) {
            out[j] = grad[j] * c[j] + grad[j + side] * s[j];
            out[j + side] = grad[j + side] * c[j + side] - grad[j] * s[j];
        }
    } else memcpy(out, grad, width * sizeof(float));
    if (unit) {
        float along = 0;
        #pragma omp simd reduction(+ : along)
        for (int64_t j = 0; j < width; j++) along += x[j] * out[j];
        along *= factor * factor / width;
        #pragma omp simd
        for (int64_t j = 0; j < width; j++) out[j] = (out[j] - x[j] * along) * factor;
    }
}

#define BY_WIDTH(call) \
    switch (width) { \
    case 32: { enum { WIDTH = 32 }; call; break; } \
    case 64: { enum { WIDTH = 64 }; call; break; } \
    case 128: { enum { WIDTH = 128 }; call; break; } \
    default: { int64_t WIDTH = width; call; } \
    }

EXPORT void heads_forward(const void *joined, int half, void *q, void *k, void *v, const float *cosine, const float *sine,
                          int each, float eps, float *inverse, int64_t batch, int64_t length, int64_t queries, int64_t keys,
                          int64_t width, int threads) {
    int64_t heads = queries + 2 * keys, side = width / 2;
    #pragma omp parallel num_threads(threads) if (batch * length * heads * width >= SMALL)
    {
        float *row = scratch(width * heads), *turned = scratch(width);
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * length; i++) {
            int64_t b = i / length, t = i % length, angle = each ? i : t;
            const float *c = cosine ? cosine + angle * width : 0, *s = sine ? sine + angle * side : 0;
            load(row, joined, i * heads * width, heads * width, half);
            for (int64_t h = 0; h < heads; h++) {
                float *x = row + h * width;
                int which = h < queries ? 0 : h < queries + keys ? 1 : 2;
                if (which < 2) {
                    float factor;
                    BY_WIDTH(factor = place(x, turned, c, s, eps, WIDTH))
                    if (eps >= 0) inverse[i * (queries + keys) + h] = factor;
                    x = turned;
                }
                int64_t count = which ? keys : queries, at = which == 0 ? h : which == 1 ? h - queries : h - queries - keys;
                void *to = which == 0 ? q : which == 1 ? k : v;
                int64_t start = ((b * count + at) * length + t) * width;
                BY_WIDTH(store(to, start, x, WIDTH, half))
            }
        }
        free(row);
        free(turned);
    }
}

/* grads: of q, k and v, each with three strides: batch, head and token. */
EXPORT void heads_backward(const void *dq, const void *dk, const void *dv, const int64_t *strides, const void *joined,
                           int half, void *djoined, const float *cosine, const float *sine, int each, float eps,
                           const float *inverse, int64_t batch, int64_t length, int64_t queries, int64_t keys, int64_t width,
                           int threads) {
    int64_t heads = queries + 2 * keys, side = width / 2;
    #pragma omp parallel num_threads(threads) if (batch * length * heads * width >= SMALL)
    {
        float *row = scratch(width * heads), *x = scratch(width * heads), *given = scratch(width);
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * length; i++) {
            int64_t b = i / length, t = i % length, angle = each ? i : t;
            const float *c = cosine ? cosine + angle * width : 0, *s = sine ? sine + angle * side : 0;
            if (eps >= 0) load(x, joined, i * heads * width, (queries + keys) * width, half);
            for (int64_t h = 0; h < heads; h++) {
                int which = h < queries ? 0 : h < queries + keys ? 1 : 2;
                int64_t at = which == 0 ? h : which == 1 ? h - queries : h - queries - keys;
                const int64_t *stride = strides + 3 * which;
                const void *from = which == 0 ? dq : which == 1 ? dk : dv;
                float *out = row + h * width, factor = eps >= 0 && which < 2 ? inverse[i * (queries + keys) + h] : 1;
                int64_t start = b * stride[0] + at * stride[1] + t * stride[2];
                if (which == 2) BY_WIDTH(load(out, from, start, WIDTH, half))
                else {
                    BY_WIDTH(load(given, from, start, WIDTH, half); unplace(given, x + h * width, out, c, s, factor, eps >= 0, WIDTH))
                }
            }
            store(djoined, i * heads * width, row, heads * width, half);
        }
        free(row);
        free(given);
        free(x);
    }
}

/* ------------------------------------------------------------------------------------------ activations */

static inline float slope_of(int kind, float x) {
    float density, below, t;
    switch (kind) {
    case RELU: return x > 0 ? 1 : 0;
    case RELU2: return 2 * linear_unit(x);
    case GELU: below = normal(x, &density); return below + x * density;
    case GELU_TANH: t = gelu_inner(x); return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * 0.79788456f * (1 + 0.134145f * x * x);
    default: t = 1.0f / (1.0f + exponential(-x)); return t * (1 + x * (1 - t));
    }
}

/* Value and derivative at once: the gradient of a gated activation needs both. */
static inline float value_and_slope(int kind, float x, float *slope) {
    float density, below, t;
    switch (kind) {
    case RELU: *slope = x > 0 ? 1 : 0; return linear_unit(x);
    case RELU2: *slope = 2 * linear_unit(x); return linear_unit(x) * linear_unit(x);
    case GELU: below = normal(x, &density); *slope = below + x * density; return x * below;
    case GELU_TANH:
        t = gelu_inner(x);
        *slope = 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * 0.79788456f * (1 + 0.134145f * x * x);
        return 0.5f * x * (1 + t);
    default: t = 1.0f / (1.0f + exponential(-x)); *slope = t * (1 + x * (1 - t)); return x * t;
    }
}

#define BOTH(kind, x) value_and_slope(kind, x, slope + j)

static void slopes(int kind, const float *restrict x, float *restrict to, int64_t n) { FOR_EACH(kind, slope_of, to, x, n) }

static void values_and_slopes(int kind, const float *restrict x, float *restrict value, float *restrict slope, int64_t n) {
    FOR_EACH(kind, BOTH, value, x, n)
}

#define PART 512

/* y = act(x) for rows of `width` numbers; `gated`: rows of 2 width, y = act(first half) * second half. */
EXPORT void activation_forward(int kind, const void *x, void *y, int half, int gated, int64_t rows, int64_t width, int threads) {
    int64_t parts = (width + PART - 1) / PART;
    #pragma omp parallel for num_threads(threads) schedule(static) if (rows * width >= SMALL)
    for (int64_t i = 0; i < rows * parts; i++) {
        float in[PART], value[PART];
        int64_t row = i / parts, start = i % parts * PART, n = width - start < PART ? width - start : PART;
        int64_t at = row * width * (gated ? 2 : 1) + start;
        load(in, x, at, n, half);
        values(kind, in, value, n);
        if (gated) {
            load(in, x, at + width, n, half);
            #pragma omp simd
            for (int64_t j = 0; j < n; j++) value[j] *= in[j];
        }
        store(y, row * width + start, value, n, half);
    }
}

EXPORT void activation_backward(int kind, const void *grad, const void *x, void *dx, int half, int gated, int64_t rows,
                                int64_t width, int threads) {
    int64_t parts = (width + PART - 1) / PART;
    #pragma omp parallel for num_threads(threads) schedule(static) if (rows * width >= SMALL)
    for (int64_t i = 0; i < rows * parts; i++) {
        float in[PART], g[PART], value[PART], slope[PART];
        int64_t row = i / parts, start = i % parts * PART, n = width - start < PART ? width - start : PART;
        int64_t at = row * width * (gated ? 2 : 1) + start;
        load(in, x, at, n, half);
        load(g, grad, row * width + start, n, half);
        if (!gated) slopes(kind, in, slope, n);
        else {
            values_and_slopes(kind, in, value, slope, n);
            #pragma omp simd
            for (int64_t j = 0; j < n; j++) value[j] *= g[j];
            store(dx, at + width, value, n, half);
            load(in, x, at + width, n, half);
            #pragma omp simd
            for (int64_t j = 0; j < n; j++) g[j] *= in[j];
        }
        #pragma omp simd
        for (int64_t j = 0; j < n; j++) slope[j] *= g[j];
        store(dx, at, slope, n, half);
    }
}

/* ------------------------------------------------------------------------------------------ attention weights

   scores (groups, heads, rows, keys) -> softmax(scale * scores + bias) in place. Row t of a block that starts at `start`
   attends to keys 0..start + t if `causal`, and to those where `mask` is 1; mask and bias have strides of group, head, row. */

EXPORT void softmax_forward(void *scores, int half, const uint8_t *mask, const int64_t *mask_strides, const void *bias,
                            int bhalf, const int64_t *bias_strides, float scale, int causal, int64_t start, int64_t groups,
                            int64_t heads, int64_t rows, int64_t keys, int threads) {
    #pragma omp parallel num_threads(threads) if (groups * heads * rows * keys >= SMALL)
    {
        float *row = scratch(keys), *other = bias ? scratch(keys) : 0;
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < groups * heads * rows; i++) {
            int64_t t = i % rows, h = i / rows % heads, g = i / rows / heads;
            int64_t seen = causal && start + t + 1 < keys ? start + t + 1 : keys;
            float most = -INFINITY, sum = 0;
            load(row, scores, i * keys, seen, half);
            #pragma omp simd
            for (int64_t j = 0; j < seen; j++) row[j] *= scale;
            if (bias) {
                load(other, bias, g * bias_strides[0] + h * bias_strides[1] + t * bias_strides[2], seen, bhalf);
                #pragma omp simd
                for (int64_t j = 0; j < seen; j++) row[j] += other[j];
            }
            if (mask) {
                const uint8_t *restrict shown = mask + g * mask_strides[0] + h * mask_strides[1] + t * mask_strides[2];
                #pragma omp simd
                for (int64_t j = 0; j < seen; j++) row[j] = shown[j] ? row[j] : -INFINITY;
            }
            #pragma omp simd reduction(max : most)
            for (int64_t j = 0; j < seen; j++) most = row[j] > most ? row[j] : most;
            #pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < seen; j++) { row[j] = exponential(row[j] - most); sum += row[j]; }
            float factor = 1.0f / sum;
            #pragma omp simd
            for (int64_t j = 0; j < seen; j++) row[j] *= factor;
            memset(row + seen, 0, (keys - seen) * sizeof(float));
            store(scores, i * keys, row, keys, half);
        }
        free(row);
        free(other);
    }
}

/* slope: gradient of the weights -> scale times the gradient of the softmax's input, in place. */
EXPORT void softmax_backward(void *slope, const void *weights, int half, float scale, int64_t rows, int64_t keys, int threads) {
    #pragma omp parallel num_threads(threads) if (rows * keys >= SMALL)
    {
        float *g = scratch(2 * keys), *w = g + keys;
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            float along = 0;
            load(g, slope, i * keys, keys, half);
            load(w, weights, i * keys, keys, half);
            #pragma omp simd reduction(+ : along)
            for (int64_t j = 0; j < keys; j++) along += g[j] * w[j];
            #pragma omp simd
            for (int64_t j = 0; j < keys; j++) g[j] = scale * w[j] * (g[j] - along);
            store(slope, i * keys, g, keys, half);
        }
        free(g);
    }
}

/* ------------------------------------------------------------------------------------------ cross-entropy

   products (rows, vocab): logits before bias and soft cap. With e = exp(logit - shift): right = log p(label), total = sum of e
   of each row; with `learn`, products are replaced by total times the gradient of -log p(label) by them. */

EXPORT void cross_entropy(void *products, int half, const int64_t *labels, const float *offset, const int64_t *absent,
                          int64_t absents, float missing, float cap, int learn, float *right, float *total, int64_t rows,
                          int64_t vocab, int threads) {
    #pragma omp parallel num_threads(threads) if (rows * vocab >= SMALL)
    {
        float *e = scratch(vocab), *slope = cap > 0 ? scratch(vocab) : 0;
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            float shift = 0, sum = 0;
            load(e, products, i * vocab, vocab, half);
            if (offset) {
                #pragma omp simd
                for (int64_t j = 0; j < vocab; j++) e[j] += offset[j];
            }
            if (cap > 0) {
                float share = 1.0f / cap;
                #pragma omp simd
                for (int64_t j = 0; j < vocab; j++) {
                    float t = hyperbolic(e[j] * share);
                    e[j] = cap * t;
                    slope[j] = 1.0f - t * t;
                }
            }
            for (int64_t j = 0; j < absents; j++) e[absent[j]] = missing;
            if (!(cap > 0 && cap <= LARGE_CAP)) {
                shift = -INFINITY;
                #pragma omp simd reduction(max : shift)
                for (int64_t j = 0; j < vocab; j++) shift = e[j] > shift ? e[j] : shift;
            }
            float label = e[labels[i]] - shift;
            #pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < vocab; j++) { e[j] = exponential(e[j] - shift); sum += e[j]; }
            right[i] = label - logf(sum);
            total[i] = sum;
            if (!learn) continue;
            e[labels[i]] -= sum;
            if (cap > 0) {
                #pragma omp simd
                for (int64_t j = 0; j < vocab; j++) e[j] *= slope[j];
            }
            store(products, i * vocab, e, vocab, half);
        }
        free(e);
        free(slope);
    }
}

/* ------------------------------------------------------------------------------------------ Muon

   momentum += (grad - momentum) * (1 - look); direction = grad + (momentum - grad) * look, for n numbers. */

EXPORT void momentum(const float *grad, float *past, void *direction, int half, float look, int64_t n, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static) if (n >= SMALL)
    for (int64_t start = 0; start < n; start += PART) {
        int64_t count = n - start < PART ? n - start : PART;
        float ahead[PART];
        #pragma omp simd
        for (int64_t j = 0; j < count; j++) {
            float g = grad[start + j], mean = past[start + j] + (g - past[start + j]) * (1 - look);
            past[start + j] = mean;
            ahead[j] = g + (mean - g) * look;
        }
        store(direction, start, ahead, count, half);
    }
}

/* weight = weight * keep - update * rate, for n numbers. */
EXPORT void apply(float *weight, const void *update, int half, float keep, float rate, int64_t n, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static) if (n >= SMALL)
    for (int64_t start = 0; start < n; start += PART) {
        int64_t count = n - start < PART ? n - start : PART;
        float by[PART];
        load(by, update, start, count, half);
        #pragma omp simd
        for (int64_t j = 0; j < count; j++) weight[start + j] = weight[start + j] * keep - by[j] * rate;
    }
}

/* ------------------------------------------------------------------------------------------ a linear map of a few rows

   y (rows, out) = x (rows, in) w' + bias, w (out, in): as fast as reading the weights. */

#define SHARED_WEIGHTS 131072 /* weights from which on a second thread pays */

/* The sums over `in` of one row of x with four rows of w, or with one. */
static inline void four(const float *restrict x, const void *w, int half, int64_t at, int64_t in, float *restrict sums) {
    float a = 0, b = 0, c = 0, d = 0;
    if (half) {
        const uint16_t *restrict p = (const uint16_t *)w + at, *restrict q = p + in, *restrict r = q + in, *restrict s = r + in;
        #pragma omp simd reduction(+ : a, b, c, d)
        for (int64_t i = 0; i < in; i++) {
            a += x[i] * from_bits((uint32_t)p[i] << 16);
            b += x[i] * from_bits((uint32_t)q[i] << 16);
            c += x[i] * from_bits((uint32_t)r[i] << 16);
            d += x[i] * from_bits((uint32_t)s[i] << 16);
        }
    } else {
        const float *restrict p = (const float *)w + at, *restrict q = p + in, *restrict r = q + in, *restrict s = r + in;
        #pragma omp simd reduction(+ : a, b, c, d)
        for (int64_t i = 0; i < in; i++) { a += x[i] * p[i]; b += x[i] * q[i]; c += x[i] * r[i]; d += x[i] * s[i]; }
    }
    sums[0] = a;
    sums[1] = b;
    sums[2] = c;
    sums[3] = d;
}

static inline float one(const float *restrict x, const void *w, int half, int64_t at, int64_t in) {
    float a = 0;
    if (half) {
        const uint16_t *restrict p = (const uint16_t *)w + at;
        #pragma omp simd reduction(+ : a)
        for (int64_t i = 0; i < in; i++) a += x[i] * from_bits((uint32_t)p[i] << 16);
    } else {
        const float *restrict p = (const float *)w + at;
        #pragma omp simd reduction(+ : a)
        for (int64_t i = 0; i < in; i++) a += x[i] * p[i];
    }
    return a;
}

EXPORT void linear(const void *x, const void *w, const void *bias, void *y, int half, int64_t rows, int64_t in, int64_t out,
                   int threads) {
    float *wide = scratch(rows * in);
    load(wide, x, 0, rows * in, half);
    #pragma omp parallel for num_threads(threads) schedule(static) if (in * out >= SHARED_WEIGHTS)
    for (int64_t o = 0; o < out; o += 4) {
        float sums[4], offset[4] = {0, 0, 0, 0};
        int64_t count = out - o < 4 ? out - o : 4;
        if (bias) load(offset, bias, o, count, half);
        for (int64_t r = 0; r < rows; r++) {
            if (count == 4) four(wide + r * in, w, half, o * in, in, sums);
            else for (int64_t j = 0; j < count; j++) sums[j] = one(wide + r * in, w, half, (o + j) * in, in);
            for (int64_t j = 0; j < count; j++) sums[j] += offset[j];
            store(y, r * out + o, sums, count, half);
        }
    }
    free(wide);
}

/* ------------------------------------------------------------------------------------------ columns by distance

   from (batch, heads, rows, columns), index (batch or 1, rows, keys) -> to (batch, heads, rows, keys): row t of each head at
   index[b, t, j] (`firth.model.relative_distance`). `step`: stride of the index between batches, 0 if all share one. */

EXPORT void columns_forward(const void *from, int half, const int64_t *index, int64_t step, void *to, int64_t batch,
                            int64_t heads, int64_t rows, int64_t columns, int64_t keys, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static) if (batch * heads * rows * keys >= SMALL)
    for (int64_t i = 0; i < batch * rows; i++) {
        const int64_t *restrict at = index + i / rows * step + i % rows * keys;
        for (int64_t h = 0; h < heads; h++) {
            int64_t row = (i / rows * heads + h) * rows + i % rows;
            if (half) {
                const uint16_t *restrict x = (const uint16_t *)from + row * columns;
                uint16_t *restrict y = (uint16_t *)to + row * keys;
                for (int64_t j = 0; j < keys; j++) y[j] = x[at[j]];
            } else {
                const float *restrict x = (const float *)from + row * columns;
                float *restrict y = (float *)to + row * keys;
                for (int64_t j = 0; j < keys; j++) y[j] = x[at[j]];
            }
        }
    }
}

/* The sums of grad (batch, heads, rows, keys) over the keys of each column. */
EXPORT void columns_backward(const void *grad, int half, const int64_t *index, int64_t step, void *dfrom, int64_t batch,
                             int64_t heads, int64_t rows, int64_t columns, int64_t keys, int threads) {
    #pragma omp parallel num_threads(threads) if (batch * heads * rows * keys >= SMALL)
    {
        float *g = scratch(keys), *sum = scratch(columns);
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < batch * rows; i++) {
            const int64_t *restrict at = index + i / rows * step + i % rows * keys;
            for (int64_t h = 0; h < heads; h++) {
                int64_t row = (i / rows * heads + h) * rows + i % rows;
                load(g, grad, row * keys, keys, half);
                memset(sum, 0, columns * sizeof(float));
                for (int64_t j = 0; j < keys; j++) sum[at[j]] += g[j];
                store(dfrom, row * columns, sum, columns, half);
            }
        }
        free(g);
        free(sum);
    }
}

/* ------------------------------------------------------------------------------------------ rows of a table

   AdamW without weight decay on the `count` rows of a table given by `seen`; `from`: the row of `grads` with the gradient of
   each, negative if it is zero. `factor`: the square root of the second moment's bias correction. */

EXPORT void adamw_rows(float *table, const int64_t *seen, const int64_t *from, const float *grads, float *mean, float *square,
                       float beta1, float beta2, float rate, float factor, float eps, int64_t count, int64_t width,
                       int threads) {
    float share = 1.0f / factor;
    #pragma omp parallel for num_threads(threads) schedule(static) if (count * width >= SMALL)
    for (int64_t i = 0; i < count; i++) {
        float *restrict w = table + seen[i] * width, *restrict m = mean + i * width, *restrict v = square + i * width;
        if (from[i] < 0) {
            #pragma omp simd
            for (int64_t j = 0; j < width; j++) {
                m[j] *= beta1;
                v[j] *= beta2;
                w[j] -= rate * m[j] / (sqrtf(v[j]) * share + eps);
            }
        } else {
            const float *restrict g = grads + from[i] * width;
            #pragma omp simd
            for (int64_t j = 0; j < width; j++) {
                m[j] += (g[j] - m[j]) * (1 - beta1);
                v[j] = v[j] * beta2 + g[j] * g[j] * (1 - beta2);
                w[j] -= rate * m[j] / (sqrtf(v[j]) * share + eps);
            }
        }
    }
}

/* Sum the values (count, width) of each index: `rows` receives the distinct indices in ascending order, `sums` their sums, and
   `unique` their number. `size`: rows of the table, above every index. */
EXPORT void sum_rows(const int64_t *index, const float *values, int64_t *rows, float *sums, int64_t *unique, int64_t count,
                     int64_t width, int64_t size, int threads) {
    int64_t *slot = calloc(size, sizeof(int64_t)), met = 0;
    for (int64_t i = 0; i < count; i++) slot[index[i]] = 1;
    for (int64_t i = 0; i < size; i++) {
        if (!slot[i]) continue;
        rows[met] = i;
        slot[i] = met++;
    }
    *unique = met;
    int64_t parts = count * width >= SMALL ? threads : 1;
    #pragma omp parallel for num_threads(threads) schedule(static) if (parts > 1)
    for (int64_t part = 0; part < parts; part++) { /* each part has its own rows, and adds in the order of the values */
        int64_t first = met * part / parts, end = met * (part + 1) / parts;
        memset(sums + first * width, 0, (end - first) * width * sizeof(float));
        for (int64_t i = 0; i < count; i++) {
            int64_t at = slot[index[i]];
            if (at < first || at >= end) continue;
            const float *restrict from = values + i * width;
            float *restrict to = sums + at * width;
            #pragma omp simd
            for (int64_t j = 0; j < width; j++) to[j] += from[j];
        }
    }
    free(slot);
}

/* The mean of the neighbors of each word, x (rows, length, width): up to `left` before and `right` after it, without the word
   itself; zeros if there are none. */
EXPORT void neighbors_forward(const float *x, const int64_t *left, const int64_t *right, float *y, int64_t rows,
                              int64_t length, int64_t width, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static) if (rows * length * width >= SMALL)
    for (int64_t i = 0; i < rows * length; i++) {
        int64_t count = left[i] + right[i];
        float *restrict to = y + i * width, share = count ? 1.0f / count : 0;
        memset(to, 0, width * sizeof(float));
        for (int64_t j = i - left[i]; j <= i + right[i]; j++) {
            const float *restrict from = x + j * width;
            if (j == i) continue;
            #pragma omp simd
            for (int64_t k = 0; k < width; k++) to[k] += from[k];
        }
        #pragma omp simd
        for (int64_t k = 0; k < width; k++) to[k] *= share;
    }
}

EXPORT void neighbors_backward(const float *grad, const int64_t *left, const int64_t *right, float *dx, int64_t rows,
                               int64_t length, int64_t width, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static) if (rows * length * width >= SMALL)
    for (int64_t row = 0; row < rows; row++) {
        memset(dx + row * length * width, 0, length * width * sizeof(float));
        for (int64_t i = row * length; i < (row + 1) * length; i++) {
            const float *restrict from = grad + i * width;
            int64_t count = left[i] + right[i];
            float share = count ? 1.0f / count : 0;
            for (int64_t j = i - left[i]; j <= i + right[i]; j++) {
                float *restrict to = dx + j * width;
                if (j == i) continue;
                #pragma omp simd
                for (int64_t k = 0; k < width; k++) to[k] += from[k] * share;
            }
        }
    }
}
