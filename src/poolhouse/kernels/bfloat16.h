// Bfloat16: the upper half of a float, one number at a time, in loops that the compiler turns into vectors.

#pragma once

#include <cstdint>
#include <cstring>

namespace bfloat16 {

inline float widen(float x) { return x; }
inline float widen(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>(x != x ? 0x7fc0 : nearest);
}

template <class Number>
inline Number to(float x);
template <>
inline float to<float>(float x) { return x; }
template <>
inline uint16_t to<uint16_t>(float x) { return narrow(x); }

}  // namespace bfloat16
