// Rotate: rotary positions turn pairs of features in place, one pass over queries or keys.
//
// Every operation is rounded as torch's own are, one after another, so the answers are the same to the last bit: in the
// type of the table, which is that of the features or float32.

#include <cstddef>

#include "bfloat16.h"
#include "parallel.h"

namespace {

// Features that are worth waking another thread for.
constexpr int64_t WORTH_A_THREAD = 1 << 17;

// One head, [first half, second half]; ROUNDED: the table is in bfloat16, and so is each product.
template <class Number, class Angle, bool ROUNDED>
void turn(Number* __restrict x, const Angle* __restrict cosines, const Angle* __restrict sines, int64_t half) {
    const auto as_type = [](float value) { return ROUNDED ? bfloat16::widen(bfloat16::narrow(value)) : value; };
    Number* __restrict y = x + half;
    for (int64_t i = 0; i < half; ++i) {
        const float a = bfloat16::widen(x[i]), b = bfloat16::widen(y[i]);
        const float first = as_type(a * bfloat16::widen(cosines[i])) + as_type(-b * bfloat16::widen(sines[i]));
        const float second =
            as_type(b * bfloat16::widen(cosines[i + half])) + as_type(a * bfloat16::widen(sines[i + half]));
        x[i] = bfloat16::to<Number>(first);
        y[i] = bfloat16::to<Number>(second);
    }
}

template <class Number, class Angle, bool ROUNDED>
void rotate(Number* x, int64_t rows, int64_t heads, int64_t row_step, int64_t head_step, const Angle* cosines,
            const Angle* sines, int64_t width, int64_t threads) {
    parallel::ranges(rows, threads, rows * heads * width / WORTH_A_THREAD, [=](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row)
            for (int64_t head = 0; head < heads; ++head)
                turn<Number, Angle, ROUNDED>(x + row * row_step + head * head_step, cosines + row * width,
                                             sines + row * width, width / 2);
    });
}

}  // namespace

// x: [rows, heads, at least width] in place, its steps in elements. cosines, sines: [rows, width], each half repeated.
// x_bfloat16, table_bfloat16: the types, float32 where 0; a table in bfloat16 is for x in bfloat16.
KERNEL void poolhouse_rotate(void* x, int64_t rows, int64_t heads, int64_t row_step, int64_t head_step,
                             const void* cosines, const void* sines, int64_t width, int64_t x_bfloat16,
                             int64_t table_bfloat16, int64_t threads) {
    using Short = uint16_t;
    if (!x_bfloat16)
        rotate<float, float, false>(static_cast<float*>(x), rows, heads, row_step, head_step,
                                    static_cast<const float*>(cosines), static_cast<const float*>(sines), width, threads);
    else if (table_bfloat16)
        rotate<Short, Short, true>(static_cast<Short*>(x), rows, heads, row_step, head_step,
                                   static_cast<const Short*>(cosines), static_cast<const Short*>(sines), width, threads);
    else
        rotate<Short, float, false>(static_cast<Short*>(x), rows, heads, row_step, head_step,
                                    static_cast<const float*>(cosines), static_cast<const float*>(sines), width, threads);
}
