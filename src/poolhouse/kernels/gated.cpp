// Gated: activation(gate) * value in one pass, gate and value being the halves of a product's rows.
//
// In bfloat16 the activation is rounded before it is multiplied, as two operations of torch are.

#include "activations.h"
#include "parallel.h"

namespace {

using namespace lanes;

// Features that are worth waking another thread for.
constexpr int64_t WORTH_A_THREAD = 1 << 16;

template <class Number, Activation KIND>
void gate(const Number* from, int64_t rows, int64_t width, Number* to, int64_t threads) {
    const auto one = [](V gate, V value) {
        V x = activated<KIND>(gate);
        if constexpr (!std::is_same<Number, float>::value) x = rounded_to_bfloat16(x);
        return mul(x, value);
    };
    parallel::ranges(rows, threads, rows * width / WORTH_A_THREAD, [=](int64_t first, int64_t last) {
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
void gate(const void* from, int64_t rows, int64_t width, void* to, int64_t activation, int64_t threads) {
    with_activation(activation, [=](auto kind) {
        gate<Number, kind.value>(static_cast<const Number*>(from), rows, width, static_cast<Number*>(to), threads);
    });
}

}  // namespace

// from: [rows, 2 * width], the gate first; to: [rows, width]. activation: see activations.h.
KERNEL void poolhouse_gated(const void* from, int64_t rows, int64_t width, void* to, int64_t activation, int64_t bfloat16,
                            int64_t threads) {
    if (bfloat16) gate<uint16_t>(from, rows, width, to, activation, threads);
    else gate<float>(from, rows, width, to, activation, threads);
}
