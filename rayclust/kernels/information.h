/* Softmax of the teacher, and loss and gradient of the student, over one head's logits, RIGHT (K R).
 *
 * A stripe of 32 columns lies in one piece and runs through all of its passes while it is in the cache. Exponentials are
 * kept as bf16 between the passes and divided by the sum of what was kept, so that probabilities add up to 1 and a sure
 * row has no gradient. FAR stands for logits so large that only the columns' own maxima are safe.
 */
#pragma once
#include "products.h"

#define LOG2E 1.44269504f
#define LN2 0.69314718f
#define FAR 40.0f
#define NOTHING (-1e30f)

static inline lanes exp2_(lanes x) { /* relative error 3e-6 */
    lanes n = _mm512_roundscale_ps(x, 8), f = x - n;
    lanes p = 9.57008015e-3f * f + 0.0559178375f;
    p = p * f + 0.240247451f;
    p = p * f + 0.693121818f;
    p = p * f + 0.999999261f;
    return _mm512_scalef_ps(p, n);
}

/* Of 16 columns: exponentials are of 2^(x − shift); their sum; the sum of what was kept of them. */
typedef struct {
    lanes shift, total, kept;
} Columns;

static inline Columns no_columns(float shift) { return (Columns){all(shift * LOG2E), all(0), all(0)}; }

static inline void keep(Columns *c, Pair x, bf16 *place) {
    Pair terms = {exp2_(x.even - c->shift), exp2_(x.odd - c->shift)};
    Pair kept = of_line(put(place, terms));
    c->total += terms.even + terms.odd;
    c->kept += kept.even + kept.odd;
}

/* shift becomes the log-sum-exp in nats, kept what the kept terms are to be multiplied by. */
static inline void take_logarithms(Columns *c) {
    float t[LANES];
    store(t, c->total);
    for (int l = 0; l < LANES; l++) t[l] = logf(t[l]);
    c->shift = c->shift * LN2 + load(t);
    c->kept = 1.0f / c->kept;
}

static inline lanes largest(lanes a, Pair x) { return _mm512_max_ps(a, _mm512_max_ps(x.even, x.odd)); }

/* The logits of clusters k and k + 1, times log2 e; behind the last cluster there is nothing. */
static inline Pair logits_at(const bf16 *stripe, long k, long clusters) {
    Pair x = pair(stripe + k / SIDE * BLOCK + k % SIDE / 2 * SIDE);
    x.even *= LOG2E;
    x.odd *= LOG2E;
    if (k + 1 == clusters) x.odd = all(NOTHING);
    return x;
}

static Columns softmax_terms(const bf16 *stripe, bf16 *terms, float bound, long clusters) {
    Columns c = no_columns(bound < FAR ? bound : NOTHING);
    if (bound >= FAR)
        for (long k = 0; k < clusters; k += 2) c.shift = largest(c.shift, logits_at(stripe, k, clusters));
    for (long k = 0; k < clusters; k += 2) keep(&c, logits_at(stripe, k, clusters), terms + k * LANES);
    take_logarithms(&c);
    return c;
}

static inline __mmask16 rows_left(long rows, long row) {
    return rows - row >= LANES ? 0xffff : rows > row ? (1 << (rows - row)) - 1 : 0;
}

typedef struct {
    long clusters, height; /* height: clusters padded to whole blocks */
    long columns, rows;
} Extent;

/* sums: 16 lanes for each cluster. */
static void teacher_softmax(const bf16 *logits, bf16 *scratch, float *lane_sums, const Extent *e, float bound,
                            float *normalizer, float *sums, float *agreement) {
    long half = e->columns / 2, clusters = e->clusters;
    bf16 *others = scratch + e->height * LANES;
    memset(lane_sums, 0, e->height * LANES * sizeof(float));
    for (long row = 0; row < half; row += LANES) {
        const bf16 *stripe = logits + row / SIDE * SIDE * e->height + row % SIDE / LANES * TILE;
        Columns a = softmax_terms(stripe, scratch, bound, clusters);
        Columns b = softmax_terms(stripe + half * e->height, others, bound, clusters);
        lanes agree = all(0);
        store(normalizer + row, a.shift);
        store(normalizer + half + row, b.shift);
        a.kept = _mm512_maskz_mov_ps(rows_left(e->rows, row), a.kept); /* padding has no part in sums */
        b.kept = _mm512_maskz_mov_ps(rows_left(e->rows, row), b.kept);
        for (long k = 0; k < clusters; k += 2) {
            Pair p = pair(scratch + k * LANES), q = pair(others + k * LANES);
            p.even *= a.kept, p.odd *= a.kept, q.even *= b.kept, q.odd *= b.kept;
            agree += p.even * q.even + p.odd * q.odd;
            store(lane_sums + k * LANES, load(lane_sums + k * LANES) + p.even + q.even);
            store(lane_sums + (k + 1) * LANES, load(lane_sums + (k + 1) * LANES) + p.odd + q.odd);
        }
        store(agreement + row, agree);
    }
    for (long k = 0; k < clusters; k++) sums[k] = sum(load(lane_sums + k * LANES));
}

/* What a student's stripe meets. */
typedef struct {
    const bf16 *teacher;
    const float *log_marginal; /* times log2 e, an even number of them */
    float beta;
} Partner;

static inline Pair joint(const Partner *p, Pair x, Pair taught, long k) {
    x.even = (x.even + taught.even) * p->beta - p->log_marginal[k];
    x.odd = (x.odd + taught.odd) * p->beta - p->log_marginal[k + 1];
    return x;
}

/* Overwrites the stripe of logits by scale·weight·β·(softmax − posterior); the sum over columns of weight·loss. */
static float learn_stripe(bf16 *stripe, bf16 *scratch, const Partner *partner, Columns own, Columns both, lanes weights,
                          lanes normalizer, float scale, long clusters) {
    for (long k = 0; k < clusters; k += 2) {
        Pair x = logits_at(stripe, k, clusters), taught = logits_at(partner->teacher, k, clusters);
        keep(&both, joint(partner, x, taught, k), scratch + k * LANES);
        keep(&own, x, stripe + k / SIDE * BLOCK + k % SIDE / 2 * SIDE);
    }
    take_logarithms(&own);
    take_logarithms(&both);
    lanes normal = own.shift + normalizer, gain = weights * (scale * partner->beta);
    own.kept *= gain;
    both.kept *= gain;
    for (long k = 0; k < clusters; k += 2) {
        bf16 *p = stripe + k / SIDE * BLOCK + k % SIDE / 2 * SIDE;
        Pair x = pair(p), u = pair(scratch + k * LANES);
        put(p, (Pair){x.even * own.kept - u.even * both.kept, x.odd * own.kept - u.odd * both.kept});
    }
    return -sum(weights * (both.shift - partner->beta * normal));
}

typedef struct {
    const bf16 *teacher;
    const float *normalizer, *log_marginal, *weights;
    float beta, scale, bound, teacher_bound;
} Lesson;

static float information(bf16 *logits, bf16 *scratch, const Lesson *l, const Extent *e) {
    long half = e->columns / 2, clusters = e->clusters;
    float marginal[clusters + 1], rarest = 0, loss = 0, spread = l->beta * (l->bound + l->teacher_bound);
    for (long k = 0; k < clusters; k++) {
        marginal[k] = l->log_marginal[k] * LOG2E;
        rarest = fminf(rarest, l->log_marginal[k]);
    }
    marginal[clusters] = 0;
    for (long column = 0; column < e->columns; column += LANES) {
        long other = column < half ? column + half : column - half;
        bf16 *stripe = logits + column / SIDE * SIDE * e->height + column % SIDE / LANES * TILE;
        const bf16 *taught = l->teacher + other / SIDE * SIDE * e->height + other % SIDE / LANES * TILE;
        Partner partner = {taught, marginal, l->beta};
        /* No joint logarithm is above spread − rarest, and the rarest cluster's is not below −spread − rarest. */
        Columns own = no_columns(l->bound), both = no_columns(spread - rarest);
        if (l->bound >= FAR || spread >= FAR) {
            own.shift = both.shift = all(NOTHING);
            for (long k = 0; k < clusters; k += 2) {
                Pair x = logits_at(stripe, k, clusters);
                own.shift = largest(own.shift, x);
                both.shift = largest(both.shift, joint(&partner, x, logits_at(taught, k, clusters), k));
            }
        }
        loss += learn_stripe(stripe, scratch, &partner, own, both, load(l->weights + column % half),
                             load(l->normalizer + other), l->scale, clusters);
    }
    return loss * l->scale;
}
