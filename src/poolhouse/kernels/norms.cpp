// Norms of many rows, in one pass over memory.
//
// A caller may give the factors of an RMS norm's rows, from the sums of `poolhouse_squares` in an order of its own: a sum
// in another order moves some numbers in bfloat16 by a rounding.

#include "norms.h"
#include "parallel.h"

namespace {

using namespace norms;

// Features that are worth waking another thread for.
constexpr int64_t WORTH_A_THREAD = 1 << 17;

// work(where a row of a head begins, its number), for all of them.
template <class Number, class Work>
void each_row(const Number* from, int64_t rows, int64_t heads, int64_t row_step, int64_t head_step, int64_t width,
              int64_t threads, Work work) {
    parallel::ranges(rows, threads, rows * heads * width / WORTH_A_THREAD, [=](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row)
            for (int64_t head = 0; head < heads; ++head)
                work(from + row * row_step + head * head_step, row * heads + head);
    });
}

template <class Number>
void norm(const Number* from, int64_t rows, int64_t heads, int64_t row_step, int64_t head_step, int64_t width,
          const float* weight, const float* factors, float eps, bool round, Number* to, int64_t threads) {
    each_row(from, rows, heads, row_step, head_step, width, threads, [=](const Number* x, int64_t number) {
        const float factor = factors != nullptr ? factors[number] : rms_factor(x, width, eps);
        if (round) rms_row<Number, true>(x, width, weight, factor, to + number * width);
        else rms_row<Number, false>(x, width, weight, factor, to + number * width);
    });
}

}  // namespace

// from: [rows, heads, width], its steps in elements; to: the same without gaps. width: a multiple of 16. weight: floats.
// factors: [rows, heads], what to multiply each row by; null: the reciprocal of its root mean square.
KERNEL void poolhouse_rms_norm(const void* from, int64_t rows, int64_t heads, int64_t row_step, int64_t head_step,
                               int64_t width, const float* weight, const float* factors, float eps, int64_t round,
                               void* to, int64_t bfloat16, int64_t threads) {
    if (bfloat16)
        norm(static_cast<const uint16_t*>(from), rows, heads, row_step, head_step, width, weight, factors, eps,
             round != 0, static_cast<uint16_t*>(to), threads);
    else
        norm(static_cast<const float*>(from), rows, heads, row_step, head_step, width, weight, factors, eps,
             round != 0, static_cast<float*>(to), threads);
}

// The squares of numbers in bfloat16, as floats: from and to as above.
KERNEL void poolhouse_squares(const uint16_t* from, int64_t rows, int64_t heads, int64_t row_step, int64_t head_step,
                              int64_t width, float* to, int64_t threads) {
    each_row(from, rows, heads, row_step, head_step, width, threads, [=](const uint16_t* x, int64_t number) {
        for (int64_t at = 0; at < width; at += WIDTH) {
            const V wide = load(x + at);
            store(to + number * width + at, mul(wide, wide));
        }
    });
}

// from: [rows, width], `row_step` floats from row to row; to: the same without gaps. width: a multiple of 16. bias: or null.
KERNEL void poolhouse_layer_norm(const float* from, int64_t rows, int64_t row_step, int64_t width, const float* weight,
                                 const float* bias, float eps, float* to, int64_t threads) {
    each_row(from, rows, 1, row_step, 0, width, threads, [=](const float* x, int64_t number) {
        layer_row(x, width, weight, bias, eps, to + number * width);
    });
}
