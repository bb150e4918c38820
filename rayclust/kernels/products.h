/* Matrix products on tiles: LEFT (M K) times RIGHT (K N), 32×32 of the result at a time.
 *
 * A stripe of DEPTH numbers of 32 columns of the right side stays in the first cache while up to HEIGHT rows of the left
 * pass by; partial sums wait in float32. The next stripe is fetched meanwhile, a part with every block of rows. What
 * becomes of a finished block is the caller's business.
 */
#pragma once
#include "tiles.h"

#define HEIGHT 256

typedef struct {
    uint8_t palette, start, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TileConfig;

static const TileConfig TILES = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* The sums of a block: tiles of rows 0-15 and 16-31, each of columns 0-15 and 16-31. */
typedef struct {
    float sums[4][256] __attribute__((aligned(64)));
} Sums;

typedef void Finish(const void *context, const Sums *sums, long row, long column);

/* A quarter of a block. */
static inline void foresee(const bf16 *p) {
    for (int i = 0; i < BLOCK / 4; i += SIDE) _mm_prefetch((const char *)(p + i), _MM_HINT_T0);
}

static inline void multiply(const bf16 *left, const bf16 *right, const bf16 *later, long blocks, Sums *sums,
                            int goes_on) {
    if (goes_on) {
        _tile_loadd(0, sums->sums[0], 64);
        _tile_loadd(1, sums->sums[1], 64);
        _tile_loadd(2, sums->sums[2], 64);
        _tile_loadd(3, sums->sums[3], 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long i = 0; i < blocks; i++, left += BLOCK, right += BLOCK, later += BLOCK / 8) {
        for (int j = 0; j < BLOCK / 8; j += SIDE) _mm_prefetch((const char *)(later + j), _MM_HINT_T1);
        _tile_loadd(6, right, 64);
        _tile_loadd(4, left, 64);
        foresee(left + 2 * BLOCK);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + TILE, 64);
        foresee(left + 2 * BLOCK + BLOCK / 4);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + TILE, 64);
        foresee(left + 2 * BLOCK + BLOCK / 2);
        _tile_dpbf16ps(2, 5, 6);
        foresee(left + 2 * BLOCK + BLOCK / 4 * 3);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums->sums[0], 64);
    _tile_stored(1, sums->sums[1], 64);
    _tile_stored(2, sums->sums[2], 64);
    _tile_stored(3, sums->sums[3], 64);
}

static inline __attribute__((always_inline)) void product(const bf16 *left, const bf16 *right, long rows, long inner,
                                                          long columns, Finish *finish, const void *context) {
    Sums sums[HEIGHT / SIDE];
    __asm__ volatile("" ::: "memory"); /* tiles are loaded behind the compiler's back */
    _tile_loadconfig(&TILES);
    for (long top = 0; top < rows; top += HEIGHT)
        for (long column = 0; column < columns; column += SIDE)
            for (long depth = 0; depth < inner; depth += DEPTH) {
                long blocks = (inner - depth < DEPTH ? inner - depth : DEPTH) / SIDE, last = depth + DEPTH >= inner;
                for (long row = top; row < rows && row < top + HEIGHT; row += SIDE) {
                    Sums *own = sums + (row - top) / SIDE;
                    const bf16 *a = left + left_block(row, depth, rows, inner);
                    const bf16 *b = right + (column / SIDE * (inner / SIDE) + depth / SIDE) * BLOCK;
                    multiply(a, b, b + blocks * BLOCK + (row - top) * SIDE, blocks, own, depth > 0);
                    if (last) finish(context, own, row, column);
                }
            }
    _tile_release();
}

static inline Pair summed(const Sums *sums, int half, int p) {
    const float *at = sums->sums[p / 8 * 2 + half] + p % 8 * 2 * LANES;
    return (Pair){_mm512_load_ps(at), _mm512_load_ps(at + LANES)};
}

/* ---- what becomes of results ---- */

typedef struct {
    bf16 *out;
    long columns;
} Plain;

static inline void to_rows(const void *context, const Sums *sums, long row, long column) {
    const Plain *c = context;
    for (int r = 0; r < SIDE; r++) {
        const float *at = sums->sums[r / 16 * 2] + r % 16 * LANES;
        Pair x = {_mm512_load_ps(at), _mm512_load_ps(at + 256)};
        _mm512_storeu_si512(c->out + (row + r) * c->columns + column, rounded(x));
    }
}

typedef struct {
    bf16 *out;
    const float *bias; /* or null */
    long rows;
} Right;

static inline void to_right(const void *context, const Sums *sums, long row, long column) {
    const Right *c = context;
    bf16 *out = c->out + (column / SIDE * (c->rows / SIDE) + row / SIDE) * BLOCK;
    for (int half = 0; half < 2; half++)
        for (int p = 0; p < 16; p++) {
            Pair x = summed(sums, half, p);
            if (c->bias) x.even += c->bias[row + 2 * p], x.odd += c->bias[row + 2 * p + 1];
            put(out + half * TILE + p * SIDE, x);
        }
}
