/* AdamW, the moving average of its result, and both in LEFT order, in one pass over memory. */
#pragma once
#include "tiles.h"

#define AHEAD 256 /* numbers; four streams at once are more than the processor fetches early by itself */

typedef struct {
    float rate, correction, shrink, fresh, square_fresh, epsilon, follow;
} Adam;

typedef struct {
    float *value, *mean, *square, *follower;
    bf16 *left_value, *left_follower; /* or null */
    long rows, columns;
} Slot;

static inline lanes step_length(const Adam *a, lanes m, lanes v) {
    lanes s = _mm512_sqrt_ps(v) * a->correction + a->epsilon, r = _mm512_rcp14_ps(s);
    return m * (r + r * (1.0f - s * r)) * a->rate;
}

/* Up to 16 numbers from i on; gives value and follower. */
static inline Pair adamw_at(const Adam *a, const Slot *x, lanes g, long i, __mmask16 here) {
    float *const streams[] = {x->value, x->mean, x->square, x->follower};
    for (int k = 0; k < 4; k++) __builtin_prefetch(streams[k] + i + AHEAD);
    lanes m = _mm512_maskz_loadu_ps(here, x->mean + i), v = _mm512_maskz_loadu_ps(here, x->square + i);
    m = m + (g - m) * a->fresh;
    v = v + (g * g - v) * a->square_fresh;
    lanes p = _mm512_maskz_loadu_ps(here, x->value + i) * a->shrink - step_length(a, m, v);
    lanes t = _mm512_maskz_loadu_ps(here, x->follower + i);
    t = t + (p - t) * a->follow;
    _mm512_mask_storeu_ps(x->value + i, here, p);
    _mm512_mask_storeu_ps(x->mean + i, here, m);
    _mm512_mask_storeu_ps(x->square + i, here, v);
    _mm512_mask_storeu_ps(x->follower + i, here, t);
    return (Pair){p, t};
}

static void adamw_flat(const Adam *a, const Slot *x, const float *gradient) {
    long n = x->rows * x->columns;
    for (long i = 0; i < n; i += LANES) {
        __mmask16 here = n - i >= LANES ? 0xffff : (1 << (n - i)) - 1;
        adamw_at(a, x, _mm512_maskz_loadu_ps(here, gradient + i), i, here);
    }
}

static inline lanes of_wide(const void *gradient, long i) { return load((const float *)gradient + i); }
static inline lanes of_narrow(const void *gradient, long i) {
    __m256i x = _mm256_loadu_si256((const __m256i *)((const bf16 *)gradient + i));
    return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
}

/* Into LEFT past the cache: the next product comes a whole step later. */
static inline __attribute__((always_inline)) void adamw_tiled(const Adam *a, const Slot *x, const void *gradient,
                                                              lanes (*numbers)(const void *, long)) {
    for (long row = 0; row < x->rows; row++)
        for (long column = 0; column < x->columns; column += SIDE) {
            long i = row * x->columns + column;
            Pair u = adamw_at(a, x, numbers(gradient, i), i, 0xffff);
            Pair w = adamw_at(a, x, numbers(gradient, i + LANES), i + LANES, 0xffff);
            bf16 *value = left_place(x->left_value, row, column, x->rows, x->columns);
            bf16 *follower = left_place(x->left_follower, row, column, x->rows, x->columns);
            _mm512_stream_si512((__m512i *)value, rounded((Pair){u.even, w.even}));
            _mm512_stream_si512((__m512i *)follower, rounded((Pair){u.odd, w.odd}));
        }
    _mm_sfence();
}
