// Activations: what the numbers of a product go through, one set of functions for every kernel that applies one.
//
// The numbers are those of `ACTIVATIONS` in kernels/__init__.py. NaN stays NaN, and what is infinite has the value of the
// function there.

#pragma once

#include <type_traits>

#include "lanes.h"

namespace lanes {

enum Activation : int64_t { NONE, RELU, GELU, GELU_TANH, SILU };

// x / (1 + e^-s).
inline V times_sigmoid(V x, V s) { return divide(x, add(all(1.0f), exponential(negative(s)))); }

// x times the share of a normal distribution below x. The error function is within 1.5e-7: Abramowitz and Stegun 7.1.26.
inline V gelu(V x) {
    // From 10 on nothing is left. Of a number and NaN the second operand stays.
    const V size = smaller(all(10.0f), magnitude(mul(x, all(0.7071067811865476f))));
    const V t = inverse(multiply_add(all(0.3275911f), size, all(1.0f)));
    V series = multiply_add(all(1.061405429f), t, all(-1.453152027f));
    series = multiply_add(series, t, all(1.421413741f));
    series = multiply_add(series, t, all(-0.284496736f));
    series = mul(multiply_add(series, t, all(0.254829592f)), t);
    // Half of what the error function lacks to 1: the share beyond x, on its own side.
    const V beyond = mul(mul(series, all(0.5f)), power_of_2<5>(mul(mul(size, size), all(-1.4426950408889634f))));
    return mul(x, where_negative(x, beyond, subtract(all(1.0f), beyond)));
}

template <Activation KIND>
inline V activated(V x) {
    if constexpr (KIND == RELU) return larger(zero(), x);
    if constexpr (KIND == GELU) return gelu(x);
    if constexpr (KIND == GELU_TANH) {
        // 1 + tanh(u) is twice the sigmoid of 2u.
        const V cube = mul(mul(x, x), x);
        return times_sigmoid(x, mul(all(2 * 0.7978845608028654f), multiply_add(all(0.044715f), cube, x)));
    }
    if constexpr (KIND == SILU) return times_sigmoid(x, x);
    return x;
}

// The same by the number of the activation.
inline V activated(V x, int64_t number) {
    switch (number) {
        case RELU: return activated<RELU>(x);
        case GELU: return activated<GELU>(x);
        case GELU_TANH: return activated<GELU_TANH>(x);
        case SILU: return activated<SILU>(x);
        default: return x;
    }
}

// work(a type whose value is the activation of that number), for loops that are to be compiled for each.
template <class Work>
inline void with_activation(int64_t number, Work work) {
    switch (number) {
        case RELU: return work(std::integral_constant<Activation, RELU>());
        case GELU: return work(std::integral_constant<Activation, GELU>());
        case GELU_TANH: return work(std::integral_constant<Activation, GELU_TANH>());
        case SILU: return work(std::integral_constant<Activation, SILU>());
        default: return work(std::integral_constant<Activation, NONE>());
    }
}

}  // namespace lanes
