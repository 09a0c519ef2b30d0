// Norms: one row by its mean and variance, or by its root mean square, times a weight; sums are float32.

#pragma once

#include <cmath>
#include <type_traits>

#include "lanes.h"

namespace norms {

using namespace lanes;

// The sum over a row of `term(sum so far, place)`, in four parts, so that one need not wait for another.
template <class Term>
inline float summed(int64_t width, Term term) {
    V sums[4] = {zero(), zero(), zero(), zero()};
    for (int64_t at = 0; at < width; at += 4 * WIDTH)
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part)
            if (at + part * WIDTH < width) sums[part] = term(sums[part], at + part * WIDTH);
    return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// What a row is multiplied by: the reciprocal of its root mean square.
template <class Number>
float rms_factor(const Number* from, int64_t width, float eps) {
    const float squares = summed(width, [=](V sum, int64_t at) {
        const V x = load(from + at);
        return multiply_add(x, x, sum);
    });
    return 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
}

// ROUND: the scaled row is rounded to its type before it is multiplied by the weight. `to` may be `from`.
template <class Number, bool ROUND>
void rms_row(const Number* from, int64_t width, const float* weight, float factor, Number* to) {
    const V scale = all(factor);
    for (int64_t at = 0; at < width; at += WIDTH) {
        V x = mul(load(from + at), scale);
        if constexpr (ROUND && !std::is_same<Number, float>::value) x = rounded_to_bfloat16(x);
        store(to + at, mul(x, load(weight + at)));
    }
}

// bias: null where there is none. `to` may be `from`.
inline void layer_row(const float* from, int64_t width, const float* weight, const float* bias, float eps, float* to) {
    const V mean = all(summed(width, [=](V sum, int64_t at) { return add(sum, load(from + at)); }) / float(width));
    const float squares = summed(width, [=](V sum, int64_t at) {
        const V x = subtract(load(from + at), mean);
        return multiply_add(x, x, sum);
    });
    const V factor = all(1.0f / std::sqrt(squares / float(width) + eps));
    for (int64_t at = 0; at < width; at += WIDTH) {
        const V x = mul(subtract(load(from + at), mean), factor), own = load(weight + at);
        store(to + at, bias == nullptr ? mul(x, own) : multiply_add(x, own, load(bias + at)));
    }
}

}  // namespace norms
