// Gated: activation(gate) * value in one pass, gate and value being the halves of a product's rows.
//
// All activations are x * sigmoid(something), but for gelu, which has the error function. In bfloat16 the activation is
// rounded before it is multiplied, as two operations of torch are.

#include <type_traits>

#include "lanes.h"
#include "parallel.h"

namespace {

using namespace lanes;

// Features that are worth waking another thread for.
constexpr int64_t WORTH_A_THREAD = 1 << 16;

enum Activation : int64_t { SILU, GELU_TANH, GELU };

// x / (1 + e^-s).
inline V times_sigmoid(V x, V s) { return divide(x, add(all(1.0f), exponential(negative(s)))); }

// The error function of x >= 0, within 1.5e-7. Source: Abramowitz and Stegun 1964, 7.1.26.
inline V error_function(V x) {
    const V t = divide(all(1.0f), multiply_add(all(0.3275911f), x, all(1.0f)));
    V series = multiply_add(all(1.061405429f), t, all(-1.453152027f));
    series = multiply_add(series, t, all(1.421413741f));
    series = multiply_add(series, t, all(-0.284496736f));
    series = mul(multiply_add(series, t, all(0.254829592f)), t);
    return subtract(all(1.0f), mul(series, exponential(negative(mul(x, x)))));
}

template <Activation KIND>
inline V activated(V x) {
    if constexpr (KIND == SILU) return times_sigmoid(x, x);
    if constexpr (KIND == GELU_TANH) {
        // 1 + tanh(u) is twice the sigmoid of 2u.
        const V cube = mul(mul(x, x), x);
        return times_sigmoid(x, mul(all(2 * 0.7978845608028654f), multiply_add(all(0.044715f), cube, x)));
    }
    const V part = with_sign_of(error_function(magnitude(mul(x, all(0.7071067811865476f)))), x);
    return mul(mul(x, all(0.5f)), add(all(1.0f), part));
}

template <class Number, Activation KIND>
void gate(const Number* from, int64_t rows, int64_t width, Number* to, int64_t threads) {
    const int64_t worth = rows * width / WORTH_A_THREAD;
    threads = threads < worth ? threads : worth;
    const int64_t part = threads < 2 ? rows : (rows + 4 * threads - 1) / (4 * threads);
    const auto one = [](V gate, V value) {
        V x = activated<KIND>(gate);
        if constexpr (!std::is_same<Number, float>::value) x = rounded_to_bfloat16(x);
        return mul(x, value);
    };
    parallel::each(rows == 0 ? 0 : (rows + part - 1) / part, threads, [=](int64_t turn) {
        const int64_t first = turn * part, last = first + part < rows ? first + part : rows;
        for (int64_t row = first; row < last; ++row) {
            const Number *gates = from + row * 2 * width, *values = gates + width;
            Number* out = to + row * width;
            int64_t at = 0;
            for (; at + WIDTH <= width; at += WIDTH) store(out + at, one(load(gates + at), load(values + at)));
            if (at < width) {
                Number rest[3][WIDTH] = {};
                std::memcpy(rest[0], gates + at, (width - at) * sizeof(Number));
                std::memcpy(rest[1], values + at, (width - at) * sizeof(Number));
                store(rest[2], one(load(rest[0]), load(rest[1])));
                std::memcpy(out + at, rest[2], (width - at) * sizeof(Number));
            }
        }
    });
}

template <class Number>
void gate(const Number* from, int64_t rows, int64_t width, Number* to, int64_t activation, int64_t threads) {
    if (activation == SILU) gate<Number, SILU>(from, rows, width, to, threads);
    else if (activation == GELU_TANH) gate<Number, GELU_TANH>(from, rows, width, to, threads);
    else gate<Number, GELU>(from, rows, width, to, threads);
}

}  // namespace

// from: [rows, 2 * width], the gate first; to: [rows, width]. activation: 0 silu, 1 gelu by tanh, 2 gelu.
KERNEL void poolhouse_gated(const void* from, int64_t rows, int64_t width, void* to, int64_t activation, int64_t bfloat16,
                            int64_t threads) {
    if (bfloat16) gate(static_cast<const uint16_t*>(from), rows, width, static_cast<uint16_t*>(to), activation, threads);
    else gate(static_cast<const float*>(from), rows, width, static_cast<float*>(to), activation, threads);
}
