/* One clustering head forward and back, in bf16 on tiles: D → hidden → GELU → bottleneck → unit column → K logits. */
#include <sys/syscall.h>
#include <unistd.h>

#include "adamw.h"
#include "definite.h"
#include "layers.h"

typedef struct {
    const bf16 *columns, *rows; /* RIGHT (D R) and RIGHT (R D) */
} Inputs;

/* What a thread works in. */
typedef struct {
    bf16 *hidden, *slope, *unit, *last, *logits, *terms;               /* of the way forward */
    bf16 *left, *other, *unit_gradient, *hidden_gradient, *transposed; /* of the way back */
    bf16 *last_gradient;
    float *inverse, *lane_sums, *lengths;
} Room;

static long claim(char **at, long count, long size) {
    long bytes = (count * size + 63) / 64 * 64;
    if (at) *at += bytes;
    return bytes;
}

#define PART(field, count)                          \
    if (room) room->field = (void *)at;             \
    total += claim(room ? &at : 0, count, sizeof(*((Room *)0)->field))

/* Lays the room out in `at`; how many bytes that takes. */
static long lay_out(const Shape *s, Room *room, char *at) {
    long r = s->logits.columns, h = s->hidden, b = s->bottleneck, k = s->logits.height, total = 0;
    long widest = h > b ? h : b;
    widest = widest > k ? widest : k;
    PART(hidden, h * r);
    PART(slope, h * r);
    PART(unit, b * r);
    PART(last, k * b);
    PART(logits, k * r);
    PART(terms, 2 * k * LANES);
    PART(left, widest * r);
    PART(other, h * r);
    PART(unit_gradient, b * r);
    PART(hidden_gradient, h * r);
    PART(transposed, (h > k ? h : k) * b);
    PART(last_gradient, k * b);
    PART(inverse, r);
    PART(lane_sums, widest * LANES);
    PART(lengths, k);
    return total;
}

/* ---- one head ---- */

static void forward(const Shape *s, const Net *net, const Inputs *x, const Room *room, float factor, bf16 *slope,
                    bf16 *logits) {
    Gelu hidden = {room->hidden, slope, net->biases[0], s->hidden};
    Right unit = {room->unit, net->biases[1], s->bottleneck}, last = {logits, 0, s->logits.height};
    long columns = s->logits.columns;
    product(net->first, x->columns, s->hidden, s->dimension, columns, gelu, &hidden);
    product(net->second, room->hidden, s->bottleneck, s->hidden, columns, to_right, &unit);
    unit_columns(room->unit, room->inverse, s->bottleneck, columns);
    scaled_rows(net, s, factor, room->last, room->lengths);
    product(room->last, room->unit, s->logits.height, s->bottleneck, columns, to_right, &last);
}

long room_size(const Shape *shape) { return lay_out(shape, 0, 0); }

void teach(const Shape *s, const Net *net, const Inputs *x, char *memory, bf16 *logits, float *normalizer, float *sums,
           float *agreement, float factor, float bound) {
    Room room;
    lay_out(s, &room, memory);
    forward(s, net, x, &room, factor, 0, logits);
    teacher_softmax(logits, room.terms, room.lane_sums, &s->logits, bound, normalizer, sums, agreement);
}

typedef struct {
    bf16 *first, *second; /* rows, as the weights */
    float *biases[2], *direction, *scale;
} Gradients;

static void backward(const Shape *s, const Net *net, const Inputs *x, const Room *room, float factor, int last_learns,
                     const Gradients *g) {
    long columns = s->logits.columns, hidden = s->hidden, bottleneck = s->bottleneck, height = s->logits.height;
    Plain last = {room->last_gradient, bottleneck}, second = {g->second, hidden}, first = {g->first, s->dimension};
    Right unit = {room->unit_gradient, 0, bottleneck};
    GeluBackward gelus = {room->hidden_gradient, room->slope, room->lane_sums, hidden};
    if (last_learns) {
        left_of_right(room->unit, room->left, bottleneck, columns);
        right_of_transposed(room->left, room->other, bottleneck, columns);
        left_of_right(room->logits, room->left, height, columns);
        product(room->left, room->other, height, columns, bottleneck, to_rows, &last);
        scaled_rows_backward(room->last_gradient, net, s, factor, room->lengths, g->direction, g->scale);
    }
    transpose_left(room->last, room->transposed, height, bottleneck);
    product(room->transposed, room->logits, bottleneck, height, columns, to_right, &unit);
    unit_columns_backward(room->unit_gradient, room->unit, room->inverse, room->lane_sums, bottleneck, columns);
    add_up(room->lane_sums, g->biases[1], bottleneck);
    left_of_right(room->hidden, room->left, hidden, columns);
    right_of_transposed(room->left, room->other, hidden, columns);
    left_of_right(room->unit_gradient, room->left, bottleneck, columns);
    product(room->left, room->other, bottleneck, columns, hidden, to_rows, &second);
    transpose_left(net->second, room->transposed, bottleneck, hidden);
    memset(room->lane_sums, 0, hidden * LANES * sizeof(float));
    product(room->transposed, room->unit_gradient, hidden, bottleneck, columns, gelu_backward, &gelus);
    add_up(room->lane_sums, g->biases[0], hidden);
    left_of_right(room->hidden_gradient, room->left, hidden, columns);
    product(room->left, x->rows, hidden, columns, s->dimension, to_rows, &first);
}

void learn(const Shape *s, const Net *net, const Inputs *x, char *memory, const Lesson *lesson, float *loss,
           const Gradients *gradients, float factor, int last_learns) {
    Room room;
    lay_out(s, &room, memory);
    forward(s, net, x, &room, factor, room.slope, room.logits);
    *loss = information(room.logits, room.terms, lesson, &s->logits);
    backward(s, net, x, &room, factor, last_learns, gradients);
}

void adamw(const Adam *a, const Slot *x, const float *gradient, const bf16 *narrow_gradient) {
    if (narrow_gradient)
        adamw_tiled(a, x, narrow_gradient, of_narrow);
    else if (x->left_value)
        adamw_tiled(a, x, gradient, of_wide);
    else
        adamw_flat(a, x, gradient);
}

/* ---- orders of inputs and weights ---- */

/* Rows (R D) to RIGHT (D R), the batch as columns, and to RIGHT (R D). */
void to_columns(const bf16 *x, bf16 *out, long rows, long columns) {
    for (long n = 0; n < rows; n += 16)
        for (long k = 0; k < columns; k += SIDE)
            transpose_pairs(x + n * columns + k, columns,
                            out + (n / SIDE * (columns / SIDE) + k / SIDE) * BLOCK + n % SIDE / 16 * TILE);
}

void to_right_rows(const bf16 *x, bf16 *out, long rows, long columns) {
    for (long n = 0; n < columns; n += LANES)
        for (long k = 0; k < rows; k += 2) {
            __m512i both = _mm512_inserti64x4(
                _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(x + k * columns + n))),
                _mm256_loadu_si256((const __m256i *)(x + (k + 1) * columns + n)), 1);
            bf16 *at = out + (n / SIDE * (rows / SIDE) + k / SIDE) * BLOCK + n % SIDE / LANES * TILE + k % SIDE / 2 * SIDE;
            _mm512_storeu_si512(at, paired(both));
        }
}

void to_left(const float *x, bf16 *out, long rows, long columns) {
    for (long row = 0; row < rows; row++)
        for (long i = 0; i < columns; i += SIDE) {
            const float *at = x + row * columns + i;
            _mm512_storeu_si512(left_place(out, row, i, rows, columns), rounded((Pair){load(at), load(at + LANES)}));
        }
}

/* Asks the kernel for the use of tiles, once for the process; 0 when it is granted. */
int allow_tiles(void) { return (int)syscall(SYS_arch_prctl, 0x1023, 18); }
