// RMS norm: each row by its root mean square, times a weight, in one pass over memory; sums are float32.

#include <cmath>
#include <type_traits>

#include "lanes.h"
#include "parallel.h"

namespace {

using namespace lanes;

// Features that are worth waking another thread for.
constexpr int64_t WORTH_A_THREAD = 1 << 17;

// weight: floats. ROUND: the scaled row is rounded to its type before it is multiplied by the weight.
template <class Number, bool ROUND>
void norm_row(const Number* from, int64_t width, const float* weight, float eps, Number* to) {
    // Several sums, so that one need not wait for another.
    V sums[4] = {zero(), zero(), zero(), zero()};
    int64_t at = 0;
    for (int part = 0; at < width; at += WIDTH, part = (part + 1) % 4) {
        const V x = load(from + at);
        sums[part] = multiply_add(x, x, sums[part]);
    }
    const float mean = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3]))) / static_cast<float>(width);
    const V scale = all(1.0f / std::sqrt(mean + eps));
    for (at = 0; at < width; at += WIDTH) {
        V x = mul(load(from + at), scale);
        if constexpr (ROUND && !std::is_same<Number, float>::value) x = rounded_to_bfloat16(x);
        store(to + at, mul(x, load(weight + at)));
    }
}

template <class Number>
void norm(const Number* from, int64_t rows, int64_t heads, int64_t row_step, int64_t head_step, int64_t width,
          const float* weight, float eps, bool round, Number* to, int64_t threads) {
    const int64_t worth = rows * heads * width / WORTH_A_THREAD;
    threads = threads < worth ? threads : worth;
    const int64_t part = threads < 2 ? rows : (rows + 4 * threads - 1) / (4 * threads);
    parallel::each(rows == 0 ? 0 : (rows + part - 1) / part, threads, [=](int64_t turn) {
        const int64_t first = turn * part, last = first + part < rows ? first + part : rows;
        for (int64_t row = first; row < last; ++row)
            for (int64_t head = 0; head < heads; ++head) {
                const Number* x = from + row * row_step + head * head_step;
                Number* y = to + (row * heads + head) * width;
                if (round) norm_row<Number, true>(x, width, weight, eps, y);
                else norm_row<Number, false>(x, width, weight, eps, y);
            }
    });
}

}  // namespace

// from: [rows, heads, width], its steps in elements; to: the same without gaps. width: a multiple of 16. weight: floats.
KERNEL void poolhouse_rms_norm(const void* from, int64_t rows, int64_t heads, int64_t row_step, int64_t head_step,
                               int64_t width, const float* weight, float eps, int64_t round, void* to, int64_t bfloat16,
                               int64_t threads) {
    if (bfloat16)
        norm(static_cast<const uint16_t*>(from), rows, heads, row_step, head_step, width, weight, eps, round != 0,
             static_cast<uint16_t*>(to), threads);
    else
        norm(static_cast<const float*>(from), rows, heads, row_step, head_step, width, weight, eps, round != 0,
             static_cast<float*>(to), threads);
}
