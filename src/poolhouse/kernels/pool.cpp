// Pool: the mean of each sequence's rows, and rows brought to unit length, in one pass each; sums are in float32.

#include <cmath>

#include "lanes.h"
#include "parallel.h"

namespace {

using namespace lanes;

// Features that are worth waking another thread for.
constexpr int64_t WORTH_A_THREAD = 1 << 17;
// Rows that are added up before their sum is added to that of others: what rounding costs grows with the numbers of both.
constexpr int64_t BLOCK = 64;

template <class Number>
void mean_of(const Number* from, int64_t rows, int64_t row_step, int64_t width, float* to) {
    const V count = all(rows == 0 ? 1.0f : float(rows));
    for (int64_t at = 0; at < width; at += WIDTH) {
        V whole = zero();
        for (int64_t first = 0; first < rows; first += BLOCK) {
            const int64_t last = first + BLOCK < rows ? first + BLOCK : rows;
            V part = zero();
            for (int64_t row = first; row < last; ++row) part = add(part, load(from + row * row_step + at));
            whole = add(whole, part);
        }
        store(to + at, divide(whole, count));
    }
}

template <class Number>
void means(const Number* from, int64_t row_step, int64_t width, const int64_t* segments, int64_t count, float* to,
           int64_t threads) {
    const int64_t* last = segments + 5 * (count - 1);
    const int64_t rows = count == 0 ? 0 : last[0] + last[1];
    parallel::ranges(count, threads, rows * width / WORTH_A_THREAD, [=](int64_t begin, int64_t end) {
        for (int64_t number = begin; number < end; ++number) {
            const int64_t start = segments[5 * number], length = segments[5 * number + 1];
            mean_of(from + start * row_step, length, row_step, width, to + number * width);
        }
    });
}

}  // namespace

// from: [rows, width] in float32 or bfloat16, `row_step` elements from row to row. width: a multiple of 16.
// segments: [count, 5], each one's first row and its length first. to: [count, width]; zeros where there are no rows.
KERNEL void poolhouse_means(const void* from, int64_t row_step, int64_t width, const int64_t* segments, int64_t count,
                            float* to, int64_t bfloat16, int64_t threads) {
    if (bfloat16) means(static_cast<const uint16_t*>(from), row_step, width, segments, count, to, threads);
    else means(static_cast<const float*>(from), row_step, width, segments, count, to, threads);
}

// Rows over their lengths, which count as 1e-12 at least. from: as above, in float32; to: [rows, width].
KERNEL void poolhouse_units(const float* from, int64_t rows, int64_t row_step, int64_t width, float* to, int64_t threads) {
    parallel::ranges(rows, threads, rows * width / WORTH_A_THREAD, [=](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const float* own = from + row * row_step;
            V squares = zero();
            for (int64_t at = 0; at < width; at += WIDTH) squares = multiply_add(load(own + at), load(own + at), squares);
            // Of a number and NaN the second operand stays.
            const V length = larger(all(1e-12f), all(std::sqrt(sum(squares))));
            for (int64_t at = 0; at < width; at += WIDTH) store(to + row * width + at, divide(load(own + at), length));
        }
    });
}
