/* Sixteen lanes of float32, bf16 numbers, and the two orders in which the processor's tiles take a matrix.
 *
 * A tile is 16 rows of 64 bytes, a product is left (M K) times right (K N). Matrices lie in blocks of 32×32 numbers:
 *   LEFT   blocks by stretches of DEPTH along k, then m, then k; two tiles of 16 rows, each row 32 numbers along k;
 *   RIGHT  blocks by n, then k; two tiles of 16 columns, each row a pair of numbers along k for each column.
 * Activations are kept as RIGHT matrices with one column per row of the batch. Sizes are multiples of 32.
 */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if !defined(__AMX_BF16__) || !defined(__AVX512F__) || !defined(__AVX512BF16__)
#error "needs AVX-512 and AMX with bf16"
#endif

#define LANES 16
#define SIDE 32
#define BLOCK (SIDE * SIDE)
#define TILE (BLOCK / 2)
#define DEPTH 256

typedef uint16_t bf16;
typedef __m512 lanes;

static inline lanes all(float x) { return _mm512_set1_ps(x); }
static inline lanes load(const float *p) { return _mm512_loadu_ps(p); }
static inline void store(float *p, lanes x) { _mm512_storeu_ps(p, x); }
static inline float sum(lanes x) { return _mm512_reduce_add_ps(x); }
static inline __m512i line(const void *p) { return _mm512_loadu_si512(p); }

/* Two rows of 16 numbers: bf16 pairs side by side, as RIGHT wants them, and behind each other, as LEFT does. */
typedef struct {
    lanes even, odd;
} Pair;

static inline __m512i rounded(Pair x) { return (__m512i)_mm512_cvtne2ps_pbh(x.odd, x.even); }
static inline __m512i paired(__m512i rounded_) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, rounded_);
}
static inline Pair of_line(__m512i x) {
    return (Pair){(lanes)_mm512_slli_epi32(x, 16), (lanes)_mm512_and_epi32(x, _mm512_set1_epi32(0xffff0000))};
}
static inline Pair pair(const bf16 *p) { return of_line(line(p)); }
static inline __m512i put(bf16 *p, Pair x) {
    __m512i kept = paired(rounded(x));
    _mm512_storeu_si512(p, kept);
    return kept;
}

/* 16×16 numbers of 16 bits; each interleaving moves one bit of the row number behind those of the column. */
static inline void interleave(const __m256i *from, __m256i *to) {
    for (int i = 0; i < 8; i++) {
        to[2 * i] = _mm256_unpacklo_epi16(from[i], from[i + 8]);
        to[2 * i + 1] = _mm256_unpackhi_epi16(from[i], from[i + 8]);
    }
}

static inline void transpose_quarter(const bf16 *from, bf16 *to) {
    __m256i x[16], y[16];
    for (int k = 0; k < 16; k++) x[k] = _mm256_loadu_si256((const __m256i *)(from + k * SIDE));
    interleave(x, y);
    interleave(y, x);
    interleave(x, y);
    interleave(y, x);
    for (int k = 0; k < 8; k++) {
        _mm256_storeu_si256((__m256i *)(to + k * SIDE), _mm256_permute2x128_si256(x[2 * k], x[2 * k + 1], 0x20));
        _mm256_storeu_si256((__m256i *)(to + (k + 8) * SIDE), _mm256_permute2x128_si256(x[2 * k], x[2 * k + 1], 0x31));
    }
}

/* The place of the block that holds row and column of a LEFT matrix. */
static inline long left_block(long row, long column, long rows, long columns) {
    long stretch = column / DEPTH * DEPTH, width = columns - stretch < DEPTH ? columns - stretch : DEPTH;
    return stretch * rows + (row / SIDE * (width / SIDE) + (column - stretch) / SIDE) * BLOCK;
}

/* LEFT of a matrix to LEFT of its transpose. */
static void transpose_left(const bf16 *from, bf16 *to, long rows, long columns) {
    for (long m = 0; m < rows; m += SIDE)
        for (long k = 0; k < columns; k += SIDE) {
            const bf16 *a = from + left_block(m, k, rows, columns);
            bf16 *b = to + left_block(k, m, columns, rows);
            for (int q = 0; q < 4; q++) transpose_quarter(a + q / 2 * TILE + q % 2 * 16, b + q % 2 * TILE + q / 2 * 16);
        }
}

/* 16 rows of 16 pairs to 16 columns of them: a tile of Y's rows becomes one of Yᵀ's RIGHT. */
static inline void transpose_pairs(const bf16 *from, long stride, bf16 *to) {
    __m512i x[16], y[16];
    for (int i = 0; i < 16; i++) x[i] = line(from + i * stride);
    for (int step = 0; step < 2; step++) {
        for (int i = 0; i < 8; i++) {
            y[2 * i] = _mm512_unpacklo_epi32(x[i], x[i + 8]);
            y[2 * i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 8]);
        }
        for (int i = 0; i < 8; i++) {
            x[2 * i] = _mm512_unpacklo_epi32(y[i], y[i + 8]);
            x[2 * i + 1] = _mm512_unpackhi_epi32(y[i], y[i + 8]);
        }
    }
    /* now register 4c + q holds, for each quarter of lanes s, rows 4q … 4q + 3 of column 4s + c */
    for (int c = 0; c < 4; c++) {
        const __m512i *q = x + 4 * c;
        __m512i low = _mm512_shuffle_i32x4(q[0], q[1], 0x88), high = _mm512_shuffle_i32x4(q[2], q[3], 0x88);
        __m512i low2 = _mm512_shuffle_i32x4(q[0], q[1], 0xdd), high2 = _mm512_shuffle_i32x4(q[2], q[3], 0xdd);
        _mm512_storeu_si512(to + c * SIDE, _mm512_shuffle_i32x4(low, high, 0x88));
        _mm512_storeu_si512(to + (8 + c) * SIDE, _mm512_shuffle_i32x4(low, high, 0xdd));
        _mm512_storeu_si512(to + (4 + c) * SIDE, _mm512_shuffle_i32x4(low2, high2, 0x88));
        _mm512_storeu_si512(to + (12 + c) * SIDE, _mm512_shuffle_i32x4(low2, high2, 0xdd));
    }
}

/* LEFT (M K) of Y to RIGHT (K M) of Yᵀ. */
static void right_of_transposed(const bf16 *from, bf16 *to, long rows, long columns) {
    for (long m = 0; m < rows; m += SIDE)
        for (long k = 0; k < columns; k += SIDE) {
            const bf16 *a = from + left_block(m, k, rows, columns);
            bf16 *b = to + (m * columns + k * SIDE);
            transpose_pairs(a, SIDE, b);
            transpose_pairs(a + TILE, SIDE, b + TILE);
        }
}

/* RIGHT (K N) to LEFT (K N): as the left side of a product over n. */
static void left_of_right(const bf16 *from, bf16 *to, long rows, long columns) {
    const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32,  //
                                          30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    for (long n = 0; n < columns / SIDE; n++)
        for (long k = 0; k < rows / SIDE; k++) {
            const bf16 *a = from + (n * (rows / SIDE) + k) * BLOCK;
            bf16 *b = to + left_block(k * SIDE, n * SIDE, rows, columns);
            for (int p = 0; p < 16; p++) {
                __m512i x = line(a + p * SIDE), y = line(a + TILE + p * SIDE);
                _mm512_storeu_si512(b + 2 * p * SIDE, _mm512_permutex2var_epi16(x, even, y));
                _mm512_storeu_si512(b + (2 * p + 1) * SIDE, _mm512_permutex2var_epi16(x, odd, y));
            }
        }
}

/* 32 numbers of a row, in two halves, into LEFT. */
static inline bf16 *left_place(bf16 *out, long row, long column, long rows, long columns) {
    return out + left_block(row, column, rows, columns) + row % SIDE * SIDE;
}
