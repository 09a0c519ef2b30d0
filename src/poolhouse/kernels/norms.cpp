// RMS norm: each row by its root mean square, times a weight, in one pass over memory; sums are float32.
//
// A caller may give the factors of the rows instead, from the sums of `poolhouse_squares` in an order of its own: a sum in
// another order moves some numbers in bfloat16 by a rounding.

#include <cmath>
#include <type_traits>

#include "lanes.h"
#include "parallel.h"

namespace {

using namespace lanes;

// Features that are worth waking another thread for.
constexpr int64_t WORTH_A_THREAD = 1 << 17;

template <class Number>
float own_factor(const Number* from, int64_t width, float eps) {
    // Several sums, so that one need not wait for another.
    V sums[4] = {zero(), zero(), zero(), zero()};
    for (int64_t at = 0, part = 0; at < width; at += WIDTH, part = (part + 1) % 4) {
        const V x = load(from + at);
        sums[part] = multiply_add(x, x, sums[part]);
    }
    const float mean = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3]))) / static_cast<float>(width);
    return 1.0f / std::sqrt(mean + eps);
}

// weight: floats. factor: the row's; null where it is computed here. ROUND: the scaled row is rounded to its type before it is multiplied by the weight.
template <class Number, bool ROUND>
void norm_row(const Number* from, int64_t width, const float* weight, const float* factor, float eps, Number* to) {
    const V scale = all(factor != nullptr ? *factor : own_factor(from, width, eps));
    for (int64_t at = 0; at < width; at += WIDTH) {
        V x = mul(load(from + at), scale);
        if constexpr (ROUND && !std::is_same<Number, float>::value) x = rounded_to_bfloat16(x);
        store(to + at, mul(x, load(weight + at)));
    }
}

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
        const float* factor = factors != nullptr ? factors + number : nullptr;
        if (round) norm_row<Number, true>(x, width, weight, factor, eps, to + number * width);
        else norm_row<Number, false>(x, width, weight, factor, eps, to + number * width);
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
