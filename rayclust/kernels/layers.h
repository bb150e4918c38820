/* The layers of a head between their products. Activations are RIGHT matrices, a stripe of 16 columns lies together. */
#pragma once
#include "information.h"

typedef struct {
    long dimension, hidden, bottleneck;
    Extent logits;
} Shape;

typedef struct {
    const bf16 *first, *second; /* LEFT */
    const float *biases[2], *direction, *scale;
} Net;

/* ---- GELU. Minimax polynomials in x² on |x| ≤ 4.25, constant beyond: x·Φ(x) within 5e-5, its slope within 2e-4. ---- */

static const float CDF[] = {-2.1248447e-12f, 2.3433698e-10f,  -1.1630556e-8f, 3.464919e-7f,   -6.9956677e-6f,
                            1.0268474e-4f,   -1.1447373e-3f,  9.88994e-3f,    -6.640798e-2f,  0.39891396f};
static const float SLOPE[] = {-3.4267273e-11f, 3.5524296e-9f, -1.6349006e-7f, 4.4326457e-6f,  -7.9362571e-5f,
                              9.9654654e-4f,   -9.0404525e-3f, 5.9092532e-2f, -0.26539259f,   0.79775643f};

static inline lanes odd_polynomial(const float *c, lanes x, lanes square) {
    lanes p = all(c[0]);
    for (int i = 1; i < 10; i++) p = p * square + c[i];
    return 0.5f + x * p;
}

static inline lanes near(lanes x) { return _mm512_min_ps(_mm512_max_ps(x, all(-4.25f)), all(4.25f)); }

typedef struct {
    bf16 *hidden, *slope; /* slope or null */
    const float *bias;
    long rows;
} Gelu;

static inline void gelu(const void *context, const Sums *sums, long row, long column) {
    const Gelu *c = context;
    long block = (column / SIDE * (c->rows / SIDE) + row / SIDE) * BLOCK;
    for (int half = 0; half < 2; half++)
        for (int p = 0; p < 16; p++) {
            Pair x = summed(sums, half, p);
            x.even += c->bias[row + 2 * p], x.odd += c->bias[row + 2 * p + 1];
            lanes e = near(x.even), o = near(x.odd);
            long i = block + half * TILE + p * SIDE;
            put(c->hidden + i, (Pair){x.even * odd_polynomial(CDF, e, e * e), x.odd * odd_polynomial(CDF, o, o * o)});
            if (c->slope) put(c->slope + i, (Pair){odd_polynomial(SLOPE, e, e * e), odd_polynomial(SLOPE, o, o * o)});
        }
}

typedef struct {
    bf16 *gradient;
    const bf16 *slope;
    float *lane_sums; /* 16 for each row */
    long rows;
} GeluBackward;

static inline void gelu_backward(const void *context, const Sums *sums, long row, long column) {
    const GeluBackward *c = context;
    long block = (column / SIDE * (c->rows / SIDE) + row / SIDE) * BLOCK;
    for (int p = 0; p < 16; p++) {
        float *at = c->lane_sums + (row + 2 * p) * LANES;
        lanes even = load(at), odd = load(at + LANES);
        for (int half = 0; half < 2; half++) {
            long i = block + half * TILE + p * SIDE;
            Pair x = summed(sums, half, p), slope = pair(c->slope + i);
            x.even *= slope.even, x.odd *= slope.odd;
            even += x.even, odd += x.odd;
            put(c->gradient + i, x);
        }
        store(at, even);
        store(at + LANES, odd);
    }
}

/* ---- unit columns: a stripe of 16 lies in the first cache ---- */

#define SHORTEST 1e-12f
#define AT(stripe, i) ((stripe) + (i) / 16 * BLOCK + (i) % 16 * SIDE)

static void unit_columns(bf16 *x, float *inverse, long rows, long columns) {
    for (long column = 0; column < columns; column += LANES) {
        bf16 *stripe = x + column / SIDE * SIDE * rows + column % SIDE / LANES * TILE;
        lanes squares = all(0);
        for (long i = 0; i < rows / 2; i++) {
            Pair p = pair(AT(stripe, i));
            squares += p.even * p.even + p.odd * p.odd;
        }
        lanes factor = 1.0f / _mm512_max_ps(_mm512_sqrt_ps(squares), all(SHORTEST));
        store(inverse + column, factor);
        for (long i = 0; i < rows / 2; i++) {
            Pair p = pair(AT(stripe, i));
            put(AT(stripe, i), (Pair){p.even * factor, p.odd * factor});
        }
    }
}

static void unit_columns_backward(bf16 *gradient, const bf16 *unit, const float *inverse, float *lane_sums, long rows,
                                  long columns) {
    memset(lane_sums, 0, rows * LANES * sizeof(float));
    for (long column = 0; column < columns; column += LANES) {
        long start = column / SIDE * SIDE * rows + column % SIDE / LANES * TILE;
        bf16 *g = gradient + start;
        const bf16 *u = unit + start;
        lanes along = all(0), factor = load(inverse + column);
        for (long i = 0; i < rows / 2; i++) {
            Pair x = pair(AT(g, i)), y = pair(AT(u, i));
            along += x.even * y.even + x.odd * y.odd;
        }
        for (long i = 0; i < rows / 2; i++) {
            Pair x = pair(AT(g, i)), y = pair(AT(u, i));
            x.even = factor * (x.even - y.even * along), x.odd = factor * (x.odd - y.odd * along);
            put(AT(g, i), x);
            float *at = lane_sums + 2 * i * LANES;
            store(at, load(at) + x.even);
            store(at + LANES, load(at + LANES) + x.odd);
        }
    }
}

static void add_up(const float *lane_sums, float *out, long rows) {
    for (long i = 0; i < rows; i++) out[i] = sum(load(lane_sums + i * LANES));
}

/* ---- the last layer: rows of length |scale|·factor ---- */

static inline void put_left(bf16 *out, long row, long column, const Shape *s, lanes x, lanes y) {
    _mm512_storeu_si512(left_place(out, row, column, s->logits.height, s->bottleneck), rounded((Pair){x, y}));
}

static void scaled_rows(const Net *net, const Shape *s, float factor, bf16 *out, float *lengths) {
    long columns = s->bottleneck;
    for (long row = 0; row < s->logits.clusters; row++) {
        const float *x = net->direction + row * columns;
        lanes squares = all(0);
        for (long i = 0; i < columns; i += LANES) {
            __builtin_prefetch(x + i + 4 * columns);
            squares += load(x + i) * load(x + i);
        }
        lengths[row] = 1.0f / fmaxf(sqrtf(sum(squares)), SHORTEST);
        float reach = lengths[row] * net->scale[row] * factor;
        for (long i = 0; i < columns; i += SIDE)
            put_left(out, row, i, s, load(x + i) * reach, load(x + i + LANES) * reach);
    }
    for (long row = s->logits.clusters; row < s->logits.height; row++)
        for (long i = 0; i < columns; i += SIDE) put_left(out, row, i, s, all(0), all(0));
}

static void scaled_rows_backward(const bf16 *gradient, const Net *net, const Shape *s, float factor,
                                 const float *lengths, float *direction, float *scale) {
    long columns = s->bottleneck;
    for (long row = 0; row < s->logits.clusters; row++) {
        const float *x = net->direction + row * columns;
        const bf16 *g = gradient + row * columns;
        lanes along = all(0);
#define GRADIENT(i) ((lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(g + i))), 16))
        for (long i = 0; i < columns; i += LANES) along += load(x + i) * GRADIENT(i);
        float cosine = sum(along) * lengths[row], reach = net->scale[row] * factor * lengths[row];
        scale[row] = cosine * factor;
        for (long i = 0; i < columns; i += LANES)
            store(direction + row * columns + i, reach * (GRADIENT(i) - load(x + i) * (cosine * lengths[row])));
    }
}

