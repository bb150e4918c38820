/* Inverses of small symmetric positive definite matrices: 16 of them side by side in the lanes of a register.
 *
 * A = UᵀU, then V = U⁻¹ and A⁻¹ = VVᵀ, each in the place of the one before, on and above the diagonal.
 */
#pragma once
#include "tiles.h"

#define WIDEST 32

typedef struct {
    lanes at[WIDEST][WIDEST];
} Matrices;

/* U in the place of A; the pivots, whose product is |A|. One that is not above 0 spoils all that follow. */
static void factorise(Matrices *a, long width, lanes *pivots) {
    for (long k = 0; k < width; k++) {
        lanes *row = a->at[k];
        pivots[k] = row[k];
        lanes inverse = _mm512_div_ps(all(1), _mm512_sqrt_ps(row[k]));
        for (long j = k; j < width; j++) row[j] *= inverse;
        for (long i = k + 1; i < width; i++)
            for (long j = i; j < width; j++) a->at[i][j] -= row[i] * row[j];
    }
}

static void invert_factor(Matrices *u, long width) {
    for (long j = 0; j < width; j++) {
        lanes inverse = _mm512_div_ps(all(1), u->at[j][j]);
        for (long i = 0; i < j; i++) {
            lanes total = all(0);
            for (long k = i; k < j; k++) total += u->at[i][k] * u->at[k][j];
            u->at[i][j] = -total * inverse;
        }
        u->at[j][j] = inverse;
    }
}

static void multiply_by_transpose(Matrices *v, long width) {
    for (long i = 0; i < width; i++)
        for (long j = i; j < width; j++) {
            lanes total = all(0);
            for (long k = j; k < width; k++) total += v->at[i][k] * v->at[j][k];
            v->at[i][j] = total;
        }
}

/* Of `count` matrices, `apart` numbers apart with rows of `stride`; inverse and pivots contiguous. */
void invert_definite(const float *from, long apart, long stride, float *inverse, float *pivots, long count, long width) {
    Matrices x;
    lanes found[WIDEST];
    const __m512i order = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (long first = 0; first < count; first += LANES) {
        long left = count - first < LANES ? count - first : LANES;
        __mmask16 those = (__mmask16)((1u << left) - 1);
        __m512i here = _mm512_min_epi32(order, _mm512_set1_epi32((int)left - 1)); /* idle lanes repeat the last matrix */
        __m512i in = _mm512_mullo_epi32(here, _mm512_set1_epi32((int)apart));
        __m512i out = _mm512_mullo_epi32(here, _mm512_set1_epi32((int)(width * width)));
        __m512i along = _mm512_mullo_epi32(here, _mm512_set1_epi32((int)width));
        const float *a = from + first * apart;
        float *b = inverse + first * width * width, *c = pivots + first * width;
        for (long i = 0; i < width; i++)
            for (long j = i; j < width; j++) x.at[i][j] = _mm512_i32gather_ps(in, a + i * stride + j, 4);
        factorise(&x, width, found);
        invert_factor(&x, width);
        multiply_by_transpose(&x, width);
        for (long i = 0; i < width; i++) {
            _mm512_mask_i32scatter_ps(c + i, those, along, found[i], 4);
            for (long j = i; j < width; j++) {
                _mm512_mask_i32scatter_ps(b + i * width + j, those, out, x.at[i][j], 4);
                _mm512_mask_i32scatter_ps(b + j * width + i, those, out, x.at[i][j], 4);
            }
        }
    }
}
