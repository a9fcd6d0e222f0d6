/* Tokens through all blocks in one call: a decoding step, with a token of each row, or a prompt, with several of a row.

   With torch's operators a token takes 1,000 to 2,000 calls, which take longer than reading the weights. Here one parallel
   region runs the whole stack. Activations and sums are fp32, except that int8.h rounds what int8 weights multiply. Weights are
   fp32, bf16 or int8; keys and values are fp32 or bf16. Sums have a fixed order, so a token gives the same bits in any batch and
   with any number of threads. `firth.generate.native_decoder` lists the supported models. */

#include "int8.h"
#include "meeting.h"
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { NO_NORM, RMS_NORM, LAYER_NORM };

typedef struct {
    const void *weight; /* (out, in), or panels (int8.h); null: no such map */
    const uint16_t *steps; /* the scales of int8 weights, else null */
    const float *bias;  /* (out,) or null */
    int64_t in, out, kind;
} Map;

typedef struct {
    const float *gain, *offset; /* (width,) or null */
    int64_t kind;
    double eps;
} Norm;

typedef struct {
    Map q, k, v, o; /* k and v have no weight in cross-attention: its keys and values are computed once from the source */
    const float *q_gain, *k_gain; /* (head_dim,) or null */
} Attention;

typedef struct {
    Norm attention_norm, cross_norm, mlp_norm;
    Attention attention, cross; /* cross.o has no weight without an encoder */
    Map gate, up, down;
} Layer;

typedef struct {
    const Layer *layers;
    int64_t depth, width, heads, kv_heads, head_dim, hidden, post_norm, activation, tiles;
    double scale, qk_eps; /* qk_eps: negative: no norm of queries and keys */
    const float *cosine, *sine; /* (positions, head_dim) and (positions, head_dim / 2), or null */
    Norm norm;
    Map head;
} Model;

typedef struct {
    void *const *keys, *const *values; /* of each layer, (rows, kv_heads, capacity, head_dim) */
    int64_t capacity, kind;
} Cache;

typedef struct {
    float *x;                 /* (rows, width): embeddings in, final states out; a row is a token */
    float *logits;            /* (rows, head.out), or null */
    const int64_t *lengths;   /* (rows,) tokens before each one, which is its position */
    const int64_t *slots;     /* (rows, 2): row of the cache, and the slot there in which its text begins; null: r and 0 */
    const float *bias;        /* (rows, heads, longest) added to the scores of self-attention, or null */
    const int64_t *source_lengths; /* (rows,) source tokens of each row, or null without an encoder */
    int64_t rows, longest;    /* longest: the most tokens before one, and itself */
    Cache cache, source;
} Step;

/* The address of the first key or value of a token's text for a head, in bytes. */
static char *text_at(const Model *model, const Cache *cache, void *const *of, int64_t layer, const int64_t *slots, int64_t r,
                     int64_t head) {
    int64_t row = slots ? slots[2 * r] : r, start = slots ? slots[2 * r + 1] : 0;
    return (char *)of[layer] +
           ((row * model->kv_heads + head) * cache->capacity + start) * model->head_dim * (cache->kind == FP32 ? 4 : 2);
}

/* ------------------------------------------------------------------------------------------ products */

/* Two vectors of sums spread over g lanes each -> one in which they are spread over g / 2. */
#if LANES == 16
INLINE V fold16(V p, V q) {
    return PICK(p, q, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           PICK(p, q, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
INLINE V fold8(V p, V q) {
    return PICK(p, q, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           PICK(p, q, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
INLINE V fold4(V p, V q) {
    return PICK(p, q, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           PICK(p, q, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}
INLINE V fold2(V p, V q) {
    return PICK(p, q, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           PICK(p, q, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#else
INLINE V fold8(V p, V q) { return PICK(p, q, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(p, q, 4, 5, 6, 7, 12, 13, 14, 15); }
INLINE V fold4(V p, V q) { return PICK(p, q, 0, 1, 4, 5, 8, 9, 12, 13) + PICK(p, q, 2, 3, 6, 7, 10, 11, 14, 15); }
INLINE V fold2(V p, V q) { return PICK(p, q, 0, 2, 4, 6, 8, 10, 12, 14) + PICK(p, q, 1, 3, 5, 7, 9, 11, 13, 15); }
#endif

/* The sums of n vectors (a power of two, at most LANES) in the first n lanes of one. */
INLINE V fold(V *v, const int n) {
    int left = n;
#define HALVE(by) \
    for (int i = 0; i < (left > 1 ? left / 2 : 1); i++) v[i] = by(v[left > 1 ? 2 * i : 0], v[left > 1 ? 2 * i + 1 : 0]); \
    left = left > 1 ? left / 2 : 1;
#if LANES == 16
    HALVE(fold16)
#endif
    HALVE(fold8)
    HALVE(fold4)
    HALVE(fold2)
    return v[0];
}

/* sums[r * O + o] = x[r] . w[o] for R rows of x, `ldx` numbers from one to the next, and O rows of w, `in` numbers each. */
INLINE void tile(const float *x, int64_t ldx, const void *w, int64_t at, int64_t in, const int kind, const int R, const int O,
                 float *sums) {
    V a[LANES];
    int64_t i = 0;
    #pragma GCC unroll 16
    for (int j = 0; j < R * O; j++) a[j] = (V){0};
    for (; i + LANES <= in; i += LANES) {
        V ws[O];
        #pragma GCC unroll 16
        for (int o = 0; o < O; o++) ws[o] = weights_at(w, at + o * in + i, kind);
        #pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            V value = *(const V *)(x + r * ldx + i);
            #pragma GCC unroll 16
            for (int o = 0; o < O; o++) a[r * O + o] += value * ws[o];
        }
    }
    if (i < in) { /* the rest of the row, padded with zeros: the same instructions for any R, so the same bits in any batch */
        const size_t size = kind == FP32 ? 4 : 2, left = in - i;
        V ws[O];
        for (int o = 0; o < O; o++) {
            float raw[LANES] = {0};
            memcpy(raw, (const char *)w + (at + o * in + i) * size, left * size);
            ws[o] = weights_at(raw, 0, kind);
        }
        for (int r = 0; r < R; r++) {
            float values[LANES] = {0};
            memcpy(values, x + r * ldx + i, left * sizeof(float));
            V value = *(const V *)values;
            for (int o = 0; o < O; o++) a[r * O + o] += value * ws[o];
        }
    }
    V total = fold(a, R * O);
    for (int j = 0; j < R * O; j++) sums[j] = total[j];
}

#define BLOCK 8 /* outputs computed together */

/* y[r, o] for o from `first` to `last`, at most BLOCK of them: sums of R rows, O outputs at a time. */
INLINE void some_rows(const float *x, int64_t ldx, const void *w, int64_t in, int64_t first, int64_t last, const int kind,
                      const int R, const int O, float *y, int64_t ldy) {
    float sums[LANES];
    int64_t o = first;
    for (; o + O <= last; o += O) {
        tile(x, ldx, w, o * in, in, kind, R, O, sums);
        for (int r = 0; r < R; r++)
            for (int j = 0; j < O; j++) y[r * ldy + o + j] = sums[r * O + j];
    }
    for (; o < last; o++) {
        tile(x, ldx, w, o * in, in, kind, R, 1, sums);
        for (int r = 0; r < R; r++) y[r * ldy + o] = sums[r];
    }
}

INLINE void all_rows(const float *x, int64_t ldx, int64_t rows, const void *w, int64_t in, int64_t first, int64_t last,
                     const int kind, float *y, int64_t ldy) {
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8) some_rows(x + r * ldx, ldx, w, in, first, last, kind, 8, LANES / 8, y + r * ldy, ldy);
    for (; r + 4 <= rows; r += 4) some_rows(x + r * ldx, ldx, w, in, first, last, kind, 4, LANES / 4, y + r * ldy, ldy);
    for (; r + 2 <= rows; r += 2) some_rows(x + r * ldx, ldx, w, in, first, last, kind, 2, LANES / 2, y + r * ldy, ldy);
    for (; r < rows; r++) some_rows(x + r * ldx, ldx, w, in, first, last, kind, 1, 8, y + r * ldy, ldy);
}

static void dots(const float *x, int64_t ldx, int64_t rows, const void *w, int64_t in, int64_t first, int64_t last, int64_t kind,
                 float *y, int64_t ldy) {
    if (kind == FP32) all_rows(x, ldx, rows, w, in, first, last, FP32, y, ldy);
    else all_rows(x, ldx, rows, w, in, first, last, BF16, y, ldy);
}

#define MIN_TILE_ROWS 5 /* with fewer rows, vectors too are as fast as reading the weights */

/* Write the sum of an output to y: plus its bias, added to y with `add`. */
INLINE void put(const Map *map, int64_t o, float sum, float *y, int add) {
    sum += map->bias ? map->bias[o] : 0;
    *y = add ? *y + sum : sum;
}

/* The same for LANES outputs. */
INLINE void put_all(const Map *map, int64_t o, const float *sums, float *y, int add) {
    V sum = *(const V *)sums;
    if (map->bias) sum += *(const V *)(map->bias + o);
    if (add) sum += *(const V *)y;
    *(V *)y = sum;
}

/* R rows of `int8_product` from `row` on, for C vectors of outputs from `o` on. */
INLINE void int8_rows(const Map *map, const Rounded *x, int64_t row, int64_t o, const int R, const int C, float *y, int64_t ldy,
                      int add) {
    float sums[R * C * LANES];
    int8_tile((const uint8_t *)map->weight + o / PANEL * PANEL * x->inputs + o % PANEL * 4,
              map->steps + o / PANEL * PANEL * x->groups + o % PANEL, x, row, R, C, sums);
    for (int j = 0; j < R * C; j++) {
        int64_t first = o + j % C * LANES;
        float *to = y + (row + j / C) * ldy + first;
        if (first + LANES <= map->out) put_all(map, first, sums + j * LANES, to, add);
        else for (int64_t l = 0; first + l < map->out; l++) put(map, first + l, sums[j * LANES + l], to + l, add);
    }
}

INLINE void int8_columns(const Map *map, const Rounded *x, int64_t rows, int64_t o, const int C, float *y, int64_t ldy, int add) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) int8_rows(map, x, r, o, 4, C, y, ldy, add);
    for (; r + 2 <= rows; r += 2) int8_rows(map, x, r, o, 2, C, y, ldy, add);
    for (; r < rows; r++) int8_rows(map, x, r, o, 1, C, y, ldy, add);
}

/* `product` of int8 weights and rounded rows. */
static void int8_product(const Map *map, const Rounded *x, int64_t rows, float *y, int64_t ldy, int add) {
    #pragma omp for schedule(static) nowait
    for (int64_t o = 0; o < map->out; o += COLUMNS * LANES)
        if (o + (COLUMNS - 1) * LANES < map->out) int8_columns(map, x, rows, o, COLUMNS, y, ldy, add);
        else int8_columns(map, x, rows, o, 1, y, ldy, add);
}

/* Round the input of a map with int8 weights, for `product`. Every thread does it for itself, which takes less than a barrier. */
static void round_input(const Map *map, const float *x, int64_t ldx, int64_t rows, Rounded *to) {
    if (map->kind != INT8) return;
    to->groups = groups_of(map->in);
    to->inputs = to->groups * GROUP;
    round_rows(x, ldx, rows, map->in, to);
}

#ifdef TILES
/* Matrix instructions (AMX): 16 outputs by 16 rows by 32 inputs at once, in bf16. An activation is split into two bf16 numbers,
   which keeps 16 bits. */

static void configure_tiles(void) {
    struct { uint8_t palette, start, unused[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    for (int i = 0; i < 8; i++) { config.bytes[i] = 64; config.rows[i] = 16; }
    _tile_loadconfig(&config);
}

/* 16 rows of x (zeros from `rows` on) as tiles: pairs of inputs, for each pair all rows; high parts, then low parts. */
static void pack(const float *x, int64_t ldx, int64_t rows, int64_t in, uint16_t *packed) {
    memset(packed, 0, in * 64);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < in; k += 2) {
            uint16_t *to = packed + k / 32 * 1024 + k % 32 * 16 + r * 2;
            for (int i = 0; i < 2; i++) {
                float value = x[r * ldx + k + i];
                to[i] = rounded(value);
                to[512 + i] = rounded(value - from_bits((uint32_t)to[i] << 16));
            }
        }
}

/* `product` for multiples of 32 outputs; the rest is for `dots`. */
static void tile_product(const Map *map, const float *x, int64_t ldx, int64_t rows, float *y, int64_t ldy, int add) {
    int64_t in = map->in, groups = (rows + 15) / 16, whole = map->out / 32 * 32;
    uint16_t *packed = (uint16_t *)scratch(groups * in * 16);
    for (int64_t g = 0; g < groups; g++)
        pack(x + g * 16 * ldx, ldx, rows - g * 16 < 16 ? rows - g * 16 : 16, in, packed + g * in * 32);
    #pragma omp for schedule(static) nowait
    for (int64_t o = 0; o < whole; o += 32)
        for (int64_t g = 0; g < groups; g++) {
            float sums[4][256];
            const uint16_t *tiles = packed + g * in * 32;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t k = 0; k < in; k += 32) {
                _tile_loadd(4, (const uint16_t *)map->weight + o * in + k, in * 2);
                _tile_loadd(5, (const uint16_t *)map->weight + (o + 16) * in + k, in * 2);
                _tile_loadd(6, tiles + k * 32, 64);
                _tile_loadd(7, tiles + k * 32 + 512, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, sums[0], 64);
            _tile_stored(1, sums[1], 64);
            _tile_stored(2, sums[2], 64);
            _tile_stored(3, sums[3], 64);
            for (int64_t r = 0; r < 16 && g * 16 + r < rows; r++)
                for (int j = 0; j < 32; j++) {
                    const float *at = sums[j / 16 * 2] + j % 16 * 16 + r;
                    put(map, o + j, at[0] + at[256], y + (g * 16 + r) * ldy + o + j, add);
                }
        }
    free(packed);
}
#endif

/* Whether library and system support the matrix instructions; requests permission for the process. */
EXPORT int has_tiles(void) {
#ifdef TILES
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */) == 0;
#else
    return 0;
#endif
}

/* y = x w' + bias, or y += that with `add`; int8 weights multiply x as `round_input` has rounded it. All threads call it; there
   is no barrier at its end. */
static void product(const Map *map, const float *x, const Rounded *rounded, int64_t ldx, int64_t rows, float *y, int64_t ldy, int add,
                    int tiles) {
    int64_t start = 0;
    if (!map->weight) return;
    if (map->kind == INT8) {
        int8_product(map, rounded, rows, y, ldy, add);
        return;
    }
#ifdef TILES
    if (tiles && rows >= MIN_TILE_ROWS && map->kind == BF16 && map->in % 32 == 0) {
        tile_product(map, x, ldx, rows, y, ldy, add);
        start = map->out / 32 * 32;
    }
#else
    (void)tiles;
#endif
    #pragma omp for schedule(static) nowait
    for (int64_t o = start; o < map->out; o += BLOCK) {
        float sums[BLOCK * rows];
        int64_t last = o + BLOCK < map->out ? o + BLOCK : map->out;
        dots(x, ldx, rows, map->weight, map->in, o, last, map->kind, sums - o, BLOCK);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = o; j < last; j++) put(map, j, sums[r * BLOCK + j - o], y + r * ldy + j, add);
    }
}

/* The product only: x (rows, in) -> y (rows, out). */
EXPORT void few_rows(const Map *map, const float *x, float *y, int64_t rows, int tiles, int threads) {
    #pragma omp parallel num_threads(threads)
    {
#ifdef TILES
        if (tiles) configure_tiles();
#endif
        Rounded rounded = {0};
        if (map->kind == INT8) rounded = rounded_rows(rows, map->in);
        round_input(map, x, map->in, rows, &rounded);
        product(map, x, &rounded, map->in, rows, y, map->out, 0, tiles);
        free_rounded(&rounded);
#ifdef TILES
        if (tiles) _tile_release();
#endif
    }
}

/* ------------------------------------------------------------------------------------------ norms, heads, attention */

/* What a thread needs besides its task: the barrier of all threads, and room for rounded rows. */
typedef struct { Meeting *meeting; Rounded rounded; } Worker;

static void normalize(const Norm *norm, const float *x, float *y, int64_t rows, int64_t width, const Worker *worker) {
    #pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + r * width;
        float *to = y + r * width, mean = 0, square = 0;
        if (norm->kind == NO_NORM) {
            memmove(to, from, width * sizeof(float));
            continue;
        }
        if (norm->kind == LAYER_NORM) {
            #pragma omp simd reduction(+ : mean)
            for (int64_t j = 0; j < width; j++) mean += from[j];
            mean /= width;
        }
        #pragma omp simd reduction(+ : square)
        for (int64_t j = 0; j < width; j++) square += (from[j] - mean) * (from[j] - mean);
        float factor = 1.0f / sqrtf(square / width + (float)norm->eps);
        for (int64_t j = 0; j < width; j++) to[j] = (from[j] - mean) * factor;
        if (norm->gain) for (int64_t j = 0; j < width; j++) to[j] *= norm->gain[j];
        if (norm->offset) for (int64_t j = 0; j < width; j++) to[j] += norm->offset[j];
    }
    meet(worker->meeting);
}

/* A head of a query or a key, in place: unit RMS, gain, rotary position. */
static void place_head(float *x, const float *gain, const Model *model, const Step *step, int64_t row) {
    int64_t width = model->head_dim;
    float turned[width], eps = model->qk_eps;
    const float *c = model->cosine ? model->cosine + step->lengths[row] * width : 0;
    const float *s = model->sine ? model->sine + step->lengths[row] * (width / 2) : 0;
    if (gain) {
        place(x, turned, 0, 0, eps, width);
        for (int64_t j = 0; j < width; j++) x[j] = turned[j] * gain[j];
        eps = -1;
    }
    place(x, turned, c, s, eps, width);
    memcpy(x, turned, width * sizeof(float));
}

/* sum of p[j] v[j] over n values of WIDTH numbers. */
#define WEIGHTED(WIDTH) \
    V sum[WIDTH / LANES]; \
    _Pragma("GCC unroll 16") for (int i = 0; i < WIDTH / LANES; i++) sum[i] = (V){0}; \
    for (int64_t j = 0; j < n; j++) \
        _Pragma("GCC unroll 16") \
        for (int i = 0; i < WIDTH / LANES; i++) sum[i] += p[j] * weights_at(v, j * WIDTH + i * LANES, kind); \
    _Pragma("GCC unroll 16") for (int i = 0; i < WIDTH / LANES; i++) *(V *)(out + i * LANES) = sum[i];

INLINE void weighted_of(const float *p, const void *v, int64_t n, int64_t width, const int kind, float *out) {
    if (width == 32) { WEIGHTED(32) }
    else if (width == 64) { WEIGHTED(64) }
    else if (width == 128) { WEIGHTED(128) }
    else {
        for (int64_t i = 0; i < width; i++) out[i] = 0;
        for (int64_t j = 0; j < n; j++)
            for (int64_t i = 0; i < width; i++) out[i] += p[j] * weight_at(v, j * width + i, kind);
    }
}

static void weighted(const float *p, const void *v, int64_t n, int64_t width, int64_t kind, float *out) {
    if (kind == FP32) weighted_of(p, v, n, width, FP32, out);
    else weighted_of(p, v, n, width, BF16, out);
}

/* q (rows, heads, head_dim) -> out, over the first lengths[row] + added slots of the text of each row. */
static void attend(const Model *model, const Cache *cache, int64_t layer, const int64_t *slots, const float *q, float *out,
                   const int64_t *lengths, int64_t added, const float *bias, int64_t longest, int64_t rows, const Worker *worker) {
    int64_t group = model->heads / model->kv_heads, width = model->head_dim;
    #pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < rows * model->kv_heads; i++) {
        int64_t row = i / model->kv_heads, head = i % model->kv_heads * group, n = lengths[row] + added;
        const void *keys = text_at(model, cache, cache->keys, layer, slots, row, i % model->kv_heads);
        const void *values_ = text_at(model, cache, cache->values, layer, slots, row, i % model->kv_heads);
        float *scores = scratch(group * n);
        dots(q + (row * model->heads + head) * width, width, group, keys, width, 0, n, cache->kind, scores, n);
        for (int64_t g = 0; g < group; g++) {
            float *p = scores + g * n, most = -INFINITY, sum = 0;
            for (int64_t j = 0; j < n; j++) p[j] *= (float)model->scale;
            if (bias) {
                const float *of_head = bias + (row * model->heads + head + g) * longest;
                for (int64_t j = 0; j < n; j++) p[j] += of_head[j];
            }
            #pragma omp simd reduction(max : most)
            for (int64_t j = 0; j < n; j++) most = p[j] > most ? p[j] : most;
            #pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < n; j++) { p[j] = exponential(p[j] - most); sum += p[j]; }
            for (int64_t j = 0; j < n; j++) p[j] /= sum;
            weighted(p, values_, n, width, cache->kind, out + (row * model->heads + head + g) * width);
        }
        free(scores);
    }
    meet(worker->meeting);
}

/* ------------------------------------------------------------------------------------------ the step */

/* Self-attention of the new tokens: x += o(attend(q, keys, values)); their keys and values are stored in the next slot of each row. */
static void self_attention(const Model *model, int64_t layer, const Step *step, const float *from, float *joined, float *mixed,
                           Worker *worker) {
    const Attention *at = &model->layers[layer].attention;
    const Cache *cache = &step->cache;
    int64_t width = model->head_dim, queries = model->heads * width, keys = model->kv_heads * width;
    int64_t heads = model->heads + 2 * model->kv_heads, rows = step->rows;
    float *q = joined, *k = q + rows * queries, *v = k + rows * keys;
    round_input(&at->q, from, model->width, rows, &worker->rounded);
    product(&at->q, from, &worker->rounded, model->width, rows, q, queries, 0, model->tiles);
    product(&at->k, from, &worker->rounded, model->width, rows, k, keys, 0, model->tiles);
    product(&at->v, from, &worker->rounded, model->width, rows, v, keys, 0, model->tiles);
    meet(worker->meeting);
    #pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < rows * heads; i++) {
        int64_t row = i / heads, h = i % heads, kv = h < model->heads + model->kv_heads ? h - model->heads : h - model->heads - model->kv_heads;
        if (h < model->heads) {
            place_head(q + row * queries + h * width, at->q_gain, model, step, row);
            continue;
        }
        int is_key = h < model->heads + model->kv_heads;
        float *x = (is_key ? k : v) + row * keys + kv * width;
        if (is_key) place_head(x, at->k_gain, model, step, row);
        void *text = text_at(model, cache, is_key ? cache->keys : cache->values, layer, step->slots, row, kv);
        store(text, step->lengths[row] * width, x, width, cache->kind == BF16);
    }
    meet(worker->meeting);
    attend(model, cache, layer, step->slots, q, mixed, step->lengths, 1, step->bias, step->longest, rows, worker);
    round_input(&at->o, mixed, queries, rows, &worker->rounded);
    product(&at->o, mixed, &worker->rounded, queries, rows, step->x, model->width, 1, model->tiles);
    meet(worker->meeting);
}

/* Cross-attention: queries have no position, as in `firth.model.block`. */
static void cross_attention(const Model *model, int64_t layer, const Step *step, const float *from, float *q, float *mixed,
                            Worker *worker) {
    const Attention *at = &model->layers[layer].cross;
    int64_t queries = model->heads * model->head_dim, rows = step->rows;
    Model still = *model;
    still.cosine = still.sine = 0;
    round_input(&at->q, from, model->width, rows, &worker->rounded);
    product(&at->q, from, &worker->rounded, model->width, rows, q, queries, 0, model->tiles);
    meet(worker->meeting);
    if (at->q_gain || model->qk_eps >= 0) {
        #pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < rows * model->heads; i++)
            place_head(q + i * model->head_dim, at->q_gain, &still, step, i / model->heads);
        meet(worker->meeting);
    }
    attend(model, &step->source, layer, step->slots, q, mixed, step->source_lengths, 0, 0, 0, rows, worker);
    round_input(&at->o, mixed, queries, rows, &worker->rounded);
    product(&at->o, mixed, &worker->rounded, queries, rows, step->x, model->width, 1, model->tiles);
    meet(worker->meeting);
}

static void feed_forward(const Model *model, const Layer *layer, const Step *step, const float *from, float *inner, Worker *worker) {
    int64_t hidden = model->hidden, rows = step->rows, parts = (hidden + 511) / 512;
    int gated = layer->gate.weight != 0;
    float *up = inner + (gated ? rows * hidden : 0);
    round_input(&layer->up, from, model->width, rows, &worker->rounded);
    product(&layer->gate, from, &worker->rounded, model->width, rows, inner, hidden, 0, model->tiles);
    product(&layer->up, from, &worker->rounded, model->width, rows, up, hidden, 0, model->tiles);
    meet(worker->meeting);
    #pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < rows * parts; i++) {
        int64_t start = i / parts * hidden + i % parts * 512, n = hidden - i % parts * 512 < 512 ? hidden - i % parts * 512 : 512;
        float value[512];
        values(model->activation, inner + start, value, n);
        for (int64_t j = 0; j < n; j++) inner[start + j] = gated ? value[j] * up[start + j] : value[j];
    }
    meet(worker->meeting);
    round_input(&layer->down, inner, hidden, rows, &worker->rounded);
    product(&layer->down, inner, &worker->rounded, hidden, rows, step->x, model->width, 1, model->tiles);
    meet(worker->meeting);
}

EXPORT void decode(const Model *model, const Step *step, int threads) {
    int64_t rows = step->rows, width = model->width, queries = model->heads * model->head_dim;
    float *normed = scratch(rows * width), *mixed = scratch(rows * queries), *inner = scratch(2 * rows * model->hidden);
    float *joined = scratch(rows * (model->heads + 2 * model->kv_heads) * model->head_dim), *x = step->x;
    int64_t widest = width > queries ? width : queries;
    Meeting meeting = {0};
    int int8 = model->layers->up.kind == INT8 || model->head.kind == INT8;
    if (model->hidden > widest) widest = model->hidden;
    #pragma omp parallel num_threads(threads)
    {
#ifdef TILES
        if (model->tiles) configure_tiles();
#endif
        Worker worker = {.meeting = &meeting};
        if (int8) worker.rounded = rounded_rows(rows, widest);
        for (int64_t i = 0; i < model->depth; i++) {
            const Layer *layer = model->layers + i;
            const float *from = model->post_norm ? x : normed;
            if (!model->post_norm) normalize(&layer->attention_norm, x, normed, rows, width, &worker);
            self_attention(model, i, step, from, joined, mixed, &worker);
            if (model->post_norm) normalize(&layer->attention_norm, x, x, rows, width, &worker);
            if (layer->cross.o.weight) {
                if (!model->post_norm) normalize(&layer->cross_norm, x, normed, rows, width, &worker);
                cross_attention(model, i, step, from, joined, mixed, &worker);
                if (model->post_norm) normalize(&layer->cross_norm, x, x, rows, width, &worker);
            }
            if (!model->post_norm) normalize(&layer->mlp_norm, x, normed, rows, width, &worker);
            feed_forward(model, layer, step, from, inner, &worker);
            if (model->post_norm) normalize(&layer->mlp_norm, x, x, rows, width, &worker);
        }
        normalize(&model->norm, x, x, rows, width, &worker);
        if (step->logits) {
            round_input(&model->head, x, width, rows, &worker.rounded);
            product(&model->head, x, &worker.rounded, width, rows, step->logits, model->head.out, 0, model->tiles);
        }
        free_rounded(&worker.rounded);
#ifdef TILES
        if (model->tiles) _tile_release();
#endif
    }
    free(normed);
    free(mixed);
    free(inner);
    free(joined);
}
