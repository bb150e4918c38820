/* Softmax of the teacher, and loss and gradient of the student, over one head's logits.
 *
 * A block of columns runs through all of its passes while it is in the cache. Exponentials are kept as bf16 between
 * the passes and divided by the sum of what was kept, so that probabilities add up to 1 and a sure row has no gradient.
 * FAR stands for logits so large that only the columns' own maxima are safe.
 */
#include "heads.c"

#define FAR 40.0f

typedef struct {
    lanes shift[VECTORS], total[VECTORS], kept[VECTORS];
} Columns;

static void no_columns(Columns *x, float shift) {
    FOR_VECTORS x->shift[j] = all(shift * LOG2E), x->total[j] = x->kept[j] = all(0);
}

static inline void keep(Columns *x, int j, lanes term, bf16 *place) {
    __m256i rounded = narrow(term);
    _mm256_storeu_si256((__m256i *)place, rounded);
    x->total[j] += term;
    x->kept[j] += widened(rounded);
}

/* shift becomes the log-sum-exp in nats, total what the kept terms are to be multiplied by. */
static void take_logarithms(Columns *x) {
    FOR_VECTORS {
        float t[LANES];
        store(t, x->total[j]);
        for (int l = 0; l < LANES; l++) t[l] = logf(t[l]);
        x->shift[j] = x->shift[j] * LN2 + load(t);
        x->total[j] = 1.0f / x->kept[j];
    }
}

static void softmax_terms(const bf16 *logits, bf16 *terms, Columns *x, float bound, long clusters, long columns) {
    no_columns(x, bound < FAR ? bound : -1e30f);
    if (bound >= FAR)
        for (long k = 0; k < clusters; k++)
            FOR_VECTORS x->shift[j] = _mm512_max_ps(x->shift[j], wide(logits + k * columns + j * LANES) * LOG2E);
    for (long k = 0; k < clusters; k++) {
        foresee(logits + (k + 8) * columns);
        FOR_VECTORS {
            lanes term = exp2_(wide(logits + k * columns + j * LANES) * LOG2E - x->shift[j]);
            keep(x, j, term, terms + k * BLOCK + j * LANES);
        }
    }
    take_logarithms(x);
}

/* Columns behind the batch's last row take no part in sums. */
static void drop_padding(Columns *x, long first, long rows) {
    FOR_VECTORS {
        long left = rows - first - j * LANES;
        x->total[j] = _mm512_maskz_mov_ps(left >= LANES ? 0xffff : left > 0 ? (1 << left) - 1 : 0, x->total[j]);
    }
}

void teacher_softmax(const bf16 *logits, bf16 *scratch, float *normalizer, float *sums, float *agreement, float bound,
                     long rows, long clusters, long columns) {
    long half = columns / 2;
    bf16 *others = scratch + clusters * BLOCK;
    memset(sums, 0, clusters * sizeof(float));
    for (long c = 0; c < half; c += BLOCK) {
        Columns a, b;
        lanes agree[VECTORS] = {};
        softmax_terms(logits + c, scratch, &a, bound, clusters, columns);
        softmax_terms(logits + half + c, others, &b, bound, clusters, columns);
        drop_padding(&a, c, rows);
        drop_padding(&b, c, rows);
        for (long k = 0; k < clusters; k++) {
            lanes total = all(0);
            FOR_VECTORS {
                lanes p = wide(scratch + k * BLOCK + j * LANES) * a.total[j];
                lanes q = wide(others + k * BLOCK + j * LANES) * b.total[j];
                total += p + q;
                agree[j] += p * q;
            }
            sums[k] += sum(total);
        }
        FOR_VECTORS {
            store(normalizer + c + j * LANES, a.shift[j]);
            store(normalizer + half + c + j * LANES, b.shift[j]);
            store(agreement + c + j * LANES, agree[j]);
        }
    }
}

typedef struct {
    const bf16 *teacher;
    const float *log_marginal;
    float beta;
    long clusters, columns;
} Pair;

static inline lanes joint(const Pair *p, lanes x, long i, float log_marginal) {
    return (x + wide(p->teacher + i)) * (p->beta * LOG2E) - log_marginal * LOG2E;
}

static void largest(const Pair *p, const bf16 *logits, Columns *own, Columns *both) {
    no_columns(own, -1e30f);
    no_columns(both, -1e30f);
    for (long k = 0; k < p->clusters; k++) FOR_VECTORS {
        long i = k * p->columns + j * LANES;
        lanes x = wide(logits + i);
        own->shift[j] = _mm512_max_ps(own->shift[j], x * LOG2E);
        both->shift[j] = _mm512_max_ps(both->shift[j], joint(p, x, i, p->log_marginal[k]));
    }
}

/* Leaves the student's terms in `logits`, those of the joint in `scratch`. */
static void pair_terms(const Pair *p, bf16 *logits, bf16 *scratch, Columns *own, Columns *both) {
    for (long k = 0; k < p->clusters; k++) {
        foresee(logits + (k + 8) * p->columns);
        foresee(p->teacher + (k + 8) * p->columns);
        FOR_VECTORS {
            long i = k * p->columns + j * LANES;
            lanes x = wide(logits + i);
            keep(both, j, exp2_(joint(p, x, i, p->log_marginal[k]) - both->shift[j]), scratch + k * BLOCK + j * LANES);
            keep(own, j, exp2_(x * LOG2E - own->shift[j]), logits + i);
        }
    }
    take_logarithms(own);
    take_logarithms(both);
}

void information(bf16 *logits, const bf16 *teacher, bf16 *scratch, const float *normalizer, const float *log_marginal,
                 const float *weights, float *loss, float scale, float beta, float bound, float teacher_bound,
                 long clusters, long columns) {
    long half = columns / 2;
    float rarest = 0, total = 0;
    for (long k = 0; k < clusters; k++) rarest = fminf(rarest, log_marginal[k]);
    /* No joint logarithm is above spread − rarest, and the rarest cluster's is not below −spread − rarest. */
    float spread = beta * (bound + teacher_bound);
    for (long c = 0; c < columns; c += BLOCK) {
        long other = c < half ? c + half : c - half, row = c % half;
        Pair pair = {teacher + other, log_marginal, beta, clusters, columns};
        Columns own, both;
        no_columns(&own, bound);
        no_columns(&both, spread - rarest);
        if (bound >= FAR || spread >= FAR) largest(&pair, logits + c, &own, &both);
        pair_terms(&pair, logits + c, scratch, &own, &both);
        FOR_VECTORS {
            lanes w = load(weights + row + j * LANES), normal = own.shift[j] + load(normalizer + other + j * LANES);
            total -= sum(w * (both.shift[j] - beta * normal));
            own.total[j] *= w * (scale * beta);
            both.total[j] *= w * (scale * beta);
        }
        for (long k = 0; k < clusters; k++) FOR_VECTORS {
            bf16 *p = logits + c + k * columns + j * LANES;
            put(p, wide(p) * own.total[j] - wide(scratch + k * BLOCK + j * LANES) * both.total[j]);
        }
    }
    *loss = total * scale;
}

/* ---- AdamW, the moving average of the result, and both as bf16, in one pass over memory ---- */

#define AHEAD 256 /* numbers; four streams at once are more than the processor fetches early by itself */

typedef struct {
    float rate, correction, shrink, fresh, square_fresh, epsilon, follow;
} Adam;

static inline lanes step_length(const Adam *a, lanes m, lanes v) {
    lanes s = _mm512_sqrt_ps(v) * a->correction + a->epsilon, r = _mm512_rcp14_ps(s);
    return m * (r + r * (1.0f - s * r)) * a->rate;
}

static inline void adamw_at(const Adam *a, float *const *x, lanes g, bf16 *const *copies, long i, __mmask16 here) {
    for (int k = 0; k < 4; k++) __builtin_prefetch(x[k] + i + AHEAD);
    lanes m = _mm512_maskz_loadu_ps(here, x[1] + i), v = _mm512_maskz_loadu_ps(here, x[2] + i);
    m = m + (g - m) * a->fresh;
    v = v + (g * g - v) * a->square_fresh;
    lanes p = _mm512_maskz_loadu_ps(here, x[0] + i) * a->shrink - step_length(a, m, v);
    lanes t = _mm512_maskz_loadu_ps(here, x[3] + i);
    t = t + (p - t) * a->follow;
    _mm512_mask_storeu_ps(x[0] + i, here, p);
    _mm512_mask_storeu_ps(x[1] + i, here, m);
    _mm512_mask_storeu_ps(x[2] + i, here, v);
    _mm512_mask_storeu_ps(x[3] + i, here, t);
    if (copies[0]) { /* past the cache: the next product comes a whole step later */
        _mm256_stream_si256((__m256i *)(copies[0] + i), narrow(p));
        _mm256_stream_si256((__m256i *)(copies[1] + i), narrow(t));
    }
}

static inline __mmask16 left(long n, long i) { return n - i >= LANES ? 0xffff : (1 << (n - i)) - 1; }

void adamw(float *const *x, const float *gradient, const bf16 *narrow_gradient, bf16 *const *copies, const Adam *a,
           long n) {
    if (narrow_gradient)
        for (long i = 0; i < n; i += LANES) adamw_at(a, x, wide(narrow_gradient + i), copies, i, 0xffff);
    else
        for (long i = 0; i < n; i += LANES)
            adamw_at(a, x, _mm512_maskz_loadu_ps(left(n, i), gradient + i), copies, i, left(n, i));
    _mm_sfence();
}
