/* Elementwise passes of clustering heads, between their matrix products.
 *
 * Activations are bf16 matrices with one column per row of the batch, so that what follows a product W·X needs no
 * transposing. The batch is padded to whole BLOCKs of columns. Arithmetic and sums are float32. The twins in torch,
 * in the modules beside this file, say what each function computes; this file says only how it stays in the cache.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if !defined(__AVX512F__) || !defined(__AVX512BF16__)
#error "needs AVX-512 with bf16"
#endif

#define LANES 16
#define BLOCK 64
#define VECTORS (BLOCK / LANES)
#define LOG2E 1.44269504f
#define LN2 0.69314718f
#define SHORTEST 1e-12f
#define FOR_VECTORS for (int j = 0; j < VECTORS; j++)

typedef uint16_t bf16;
typedef __m512 lanes;

static inline lanes all(float x) { return _mm512_set1_ps(x); }
static inline lanes load(const float *p) { return _mm512_loadu_ps(p); }
static inline void store(float *p, lanes x) { _mm512_storeu_ps(p, x); }
static inline lanes widened(__m256i x) { return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
static inline lanes wide(const bf16 *p) { return widened(_mm256_loadu_si256((const __m256i *)p)); }
static inline __m256i narrow(lanes x) { return (__m256i)_mm512_cvtneps_pbh(x); }
static inline void put(bf16 *p, lanes x) { _mm256_storeu_si256((__m256i *)p, narrow(x)); }
static inline float sum(lanes x) { return _mm512_reduce_add_ps(x); }

/* Rows of a block lie a whole matrix row apart, which the processor does not foresee by itself. */
static inline void foresee(const bf16 *p) {
    for (int i = 0; i < BLOCK; i += 32) __builtin_prefetch(p + i);
}

static inline lanes exp2_(lanes x) { /* relative error 3e-6 */
    lanes n = _mm512_roundscale_ps(x, 8), f = x - n;
    lanes p = 9.57008015e-3f * f + 0.0559178375f;
    p = p * f + 0.240247451f;
    p = p * f + 0.693121818f;
    p = p * f + 0.999999261f;
    return _mm512_scalef_ps(p, n);
}

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

void gelu(const bf16 *product, const float *bias, bf16 *hidden, bf16 *slope, long rows, long columns) {
    for (long row = 0; row < rows; row++)
        for (long i = row * columns; i < (row + 1) * columns; i += LANES) {
            lanes x = wide(product + i) + bias[row];
            lanes near = _mm512_min_ps(_mm512_max_ps(x, all(-4.25f)), all(4.25f)), square = near * near;
            put(hidden + i, x * odd_polynomial(CDF, near, square));
            if (slope) put(slope + i, odd_polynomial(SLOPE, near, square));
        }
}

void gelu_backward(bf16 *gradient, const bf16 *slope, float *bias_gradient, long rows, long columns) {
    for (long row = 0; row < rows; row++) {
        lanes total = all(0);
        for (long i = row * columns; i < (row + 1) * columns; i += LANES) {
            lanes x = wide(gradient + i) * wide(slope + i);
            total += x;
            put(gradient + i, x);
        }
        bias_gradient[row] = sum(total);
    }
}

/* ---- unit columns ---- */

void unit_columns(bf16 *x, const float *bias, float *inverse, long rows, long columns) {
    for (long c = 0; c < columns; c += BLOCK) {
        lanes squares[VECTORS] = {};
        for (long row = 0; row < rows; row++) {
            foresee(x + (row + 8) * columns + c);
            FOR_VECTORS {
                lanes y = wide(x + row * columns + c + j * LANES) + bias[row];
                squares[j] += y * y;
            }
        }
        FOR_VECTORS {
            squares[j] = 1.0f / _mm512_max_ps(_mm512_sqrt_ps(squares[j]), all(SHORTEST));
            store(inverse + c + j * LANES, squares[j]);
        }
        for (long row = 0; row < rows; row++) FOR_VECTORS {
            bf16 *p = x + row * columns + c + j * LANES;
            put(p, (wide(p) + bias[row]) * squares[j]);
        }
    }
}

void unit_columns_backward(bf16 *gradient, const bf16 *unit, const float *inverse, float *bias_gradient, long rows,
                           long columns) {
    memset(bias_gradient, 0, rows * sizeof(float));
    for (long c = 0; c < columns; c += BLOCK) {
        lanes along[VECTORS] = {};
        for (long row = 0; row < rows; row++) FOR_VECTORS {
            long i = row * columns + c + j * LANES;
            along[j] += wide(gradient + i) * wide(unit + i);
        }
        for (long row = 0; row < rows; row++) {
            lanes total = all(0);
            FOR_VECTORS {
                long i = row * columns + c + j * LANES;
                lanes x = load(inverse + c + j * LANES) * (wide(gradient + i) - wide(unit + i) * along[j]);
                total += x;
                put(gradient + i, x);
            }
            bias_gradient[row] += sum(total);
        }
    }
}

/* ---- weights ---- */

static inline void interleave(const __m256i *from, __m256i *to) {
    for (int i = 0; i < 8; i++) {
        to[2 * i] = _mm256_unpacklo_epi16(from[i], from[i + 8]);
        to[2 * i + 1] = _mm256_unpackhi_epi16(from[i], from[i + 8]);
    }
}

/* Each interleaving moves one bit of the row number behind those of the column; after four, rows are columns. */
static inline void transpose_tile(const bf16 *from, bf16 *to, long rows, long columns) {
    __m256i x[16], y[16];
    for (int k = 0; k < 16; k++) x[k] = _mm256_loadu_si256((const __m256i *)(from + k * columns));
    interleave(x, y);
    interleave(y, x);
    interleave(x, y);
    interleave(y, x);
    for (int k = 0; k < 8; k++) {
        _mm256_storeu_si256((__m256i *)(to + k * rows), _mm256_permute2x128_si256(x[2 * k], x[2 * k + 1], 0x20));
        _mm256_storeu_si256((__m256i *)(to + (k + 8) * rows), _mm256_permute2x128_si256(x[2 * k], x[2 * k + 1], 0x31));
    }
}

static void transpose_corner(const bf16 *from, bf16 *to, long rows, long columns, long row, long column) {
    for (long i = row; i < rows && i < row + 16; i++)
        for (long k = column; k < columns && k < column + 16; k++) to[k * rows + i] = from[i * columns + k];
}

/* Four tiles at a time: whole cache lines are read and written before the next ones push them out. */
void transpose(const bf16 *from, bf16 *to, long rows, long columns) {
    for (long block = 0; block < rows; block += 32)
        for (long first = 0; first < columns; first += 32)
            for (int tile = 0; tile < 4; tile++) {
                long row = block + 16 * (tile / 2), column = first + 16 * (tile % 2);
                if (row + 16 <= rows && column + 16 <= columns)
                    transpose_tile(from + row * columns + column, to + column * rows + row, rows, columns);
                else
                    transpose_corner(from, to, rows, columns, row, column);
            }
}

void scaled_rows(const float *direction, const float *scale, float factor, bf16 *weights, bf16 *transposed,
                 float *inverse, long rows, long columns) {
    for (long row = 0; row < rows; row++) {
        const float *x = direction + row * columns;
        lanes squares = all(0);
        for (long i = 0; i < columns; i += LANES) {
            __builtin_prefetch(x + i + 4 * columns);
            squares += load(x + i) * load(x + i);
        }
        inverse[row] = 1.0f / fmaxf(sqrtf(sum(squares)), SHORTEST);
        for (long i = 0; i < columns; i += LANES)
            put(weights + row * columns + i, load(x + i) * (inverse[row] * scale[row] * factor));
    }
    if (transposed) transpose(weights, transposed, rows, columns);
}

void scaled_rows_backward(const bf16 *gradient, const float *direction, const float *scale, const float *inverse,
                          float factor, float *direction_gradient, float *scale_gradient, long rows, long columns) {
    for (long row = 0; row < rows; row++) {
        const float *x = direction + row * columns;
        const bf16 *g = gradient + row * columns;
        lanes along = all(0);
        for (long i = 0; i < columns; i += LANES) along += load(x + i) * wide(g + i);
        float cosine = sum(along) * inverse[row], reach = scale[row] * factor * inverse[row];
        scale_gradient[row] = cosine * factor;
        for (long i = 0; i < columns; i += LANES)
            store(direction_gradient + row * columns + i, reach * (wide(g + i) - load(x + i) * (cosine * inverse[row])));
    }
}
