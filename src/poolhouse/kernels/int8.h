// Int8: rows of float32 brought to int8, their products with a weight in int8 that was laid out once, and these as floats.
//
//     row of x --quantise--> bytes, step, zero --multiply: sums of products, exact--> times both steps, bias, activation
//
// A row is quantised by itself, so its answer does not depend on its neighbours: 255 steps from its smallest number to its
// largest, 0 among them. AVX-512 VNNI multiplies unsigned by signed bytes: a row is counted from its smallest number, and
// what its zero adds to a sum is taken off. AVX2 has no such product that cannot overflow: it multiplies pairs of 16 bits,
// counted from zero.

#pragma once

#include <cstring>
#include <immintrin.h>

#include "activations.h"

namespace int8 {

#if defined(__AVX512VNNI__)
using Element = uint8_t;          // of a quantised row
constexpr int64_t GROUP = 4;      // elements of a row that one instruction takes
constexpr int64_t LANES = 16;     // columns of one vector
constexpr int64_t VECTORS = 4;    // vectors of one panel of the weight
constexpr bool FROM_ZERO = false; // whether a row is counted from its zero
using Sums = __m512i;
#else
using Element = int16_t;
constexpr int64_t GROUP = 2;
constexpr int64_t LANES = 8;
constexpr int64_t VECTORS = 2;
constexpr bool FROM_ZERO = true;
using Sums = __m256i;
#endif

constexpr int64_t PANEL = LANES * VECTORS;  // columns
constexpr int64_t TALL = 6;                 // rows of a tile at most
constexpr int64_t BLOCK = 96;               // rows that are quantised together
constexpr float LEVELS = 255.0f;

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef Element Elements __attribute__((vector_size(LANES * sizeof(Element))));

inline Floats load(const float* from) {
    Floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

struct Weight {
    int64_t in, out, width;  // width: in, rounded up to whole groups
    const int8_t* packed;    // [panels][width / GROUP][PANEL][GROUP]
    const float* steps;      // these three: [panels * PANEL]
    const int32_t* totals;  // of each output's whole numbers
    const float* bias;
    int64_t panels() const { return (out + PANEL - 1) / PANEL; }
};

struct Rows {
    const float* x;
    const float* residual;  // null: nothing is added
    float* y;
    int64_t count, x_stride, residual_stride, y_stride;
    Rows from(int64_t row, int64_t rows) const {
        return {x + row * x_stride, residual == nullptr ? nullptr : residual + row * residual_stride, y + row * y_stride,
                rows, x_stride, residual_stride, y_stride};
    }
};

// Whole numbers, halves to the even one, of the product as float32 holds it: no sum that a compiler could fuse with it.
inline Ints nearest(Floats x) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_cvtps_epi32((__m512)x);
#else
    return (Ints)_mm256_cvtps_epi32((__m256)x);
#endif
}

struct Steps {
    float size[BLOCK];
    int32_t zero[BLOCK];
};

// The elements of row r of `steps`, and its step, NaN where the row is not finite.
inline void quantise(const float* x, int64_t in, int64_t width, Element* elements, Steps& steps, int64_t r) {
    // Magnitudes compare as whole numbers, infinity and NaN as the largest.
    Ints most{};
    Floats low{}, high{};
    const int64_t whole_end = in / LANES * LANES;
    for (int64_t i = 0; i < whole_end; i += LANES) {
        const Floats numbers = load(x + i);
        const Ints magnitude = (Ints)numbers & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
        low = numbers < low ? numbers : low;
        high = numbers > high ? numbers : high;
    }
    int32_t bits = 0;
    float smallest = 0.0f, largest = 0.0f;
    for (int64_t lane = 0; lane < LANES; ++lane) {
        bits = most[lane] > bits ? most[lane] : bits;
        smallest = low[lane] < smallest ? low[lane] : smallest;
        largest = high[lane] > largest ? high[lane] : largest;
    }
    for (int64_t i = whole_end; i < in; ++i) {
        int32_t one;
        memcpy(&one, x + i, 4);
        bits = (one & 0x7fffffff) > bits ? (one & 0x7fffffff) : bits;
        smallest = x[i] < smallest ? x[i] : smallest;
        largest = x[i] > largest ? x[i] : largest;
    }
    const float range = largest - smallest;
    // A row of zeros has no step.
    const float factor = 1.0f / (range < 1e-30f ? 1e-30f : range) * LEVELS;
    const int32_t zero = _mm_cvtss_si32(_mm_set_ss(-smallest * factor));
    steps.size[r] = bits < 0x7f800000 ? range / LEVELS : __builtin_nanf("");
    steps.zero[r] = zero;
    const int32_t shift = FROM_ZERO ? 0 : zero, end = static_cast<int32_t>(LEVELS) - zero + shift;
    for (int64_t i = 0; i < whole_end; i += LANES) {
        const Ints whole = nearest(load(x + i) * factor) + shift;
        const Elements narrow = __builtin_convertvector(whole > end ? Ints{} + end : whole, Elements);
        memcpy(elements + i, &narrow, sizeof narrow);
    }
    for (int64_t i = whole_end; i < in; ++i) {
        const int32_t whole = _mm_cvtss_si32(_mm_set_ss(x[i] * factor)) + shift;
        elements[i] = static_cast<Element>(whole > end ? end : whole);
    }
    // Filled up with weights of 0.
    for (int64_t i = in; i < width; ++i) elements[i] = 0;
}

// A group of a row, in every lane.
inline Sums spread(const Element* elements) {
    int32_t group;
    memcpy(&group, elements, 4);
#if defined(__AVX512VNNI__)
    return _mm512_set1_epi32(group);
#else
    return _mm256_set1_epi32(group);
#endif
}

inline Sums column(const int8_t* packed) {
#if defined(__AVX512VNNI__)
    return _mm512_loadu_si512(packed);
#else
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
#endif
}

inline Sums added(Sums sums, Sums row, Sums weight) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(sums, row, weight);
#else
    return _mm256_add_epi32(sums, _mm256_madd_epi16(row, weight));
#endif
}

// The sums of a few rows in one panel: [HEIGHT][PANEL]. By itself, so that the sums stay in registers.
template <int64_t HEIGHT>
__attribute__((noinline)) void sums_of(const Element* elements, int64_t width, const int8_t* packed, int32_t* answers) {
    Sums sums[HEIGHT][VECTORS];
#pragma GCC unroll 6
    for (int64_t r = 0; r < HEIGHT; ++r)
#pragma GCC unroll 4
        for (int64_t v = 0; v < VECTORS; ++v) sums[r][v] = Sums{};
    for (int64_t k = 0; k < width; k += GROUP, packed += PANEL * GROUP) {
        Sums columns[VECTORS];
#pragma GCC unroll 4
        for (int64_t v = 0; v < VECTORS; ++v) columns[v] = column(packed + v * LANES * GROUP);
#pragma GCC unroll 6
        for (int64_t r = 0; r < HEIGHT; ++r) {
            const Sums row = spread(elements + r * width + k);
#pragma GCC unroll 4
            for (int64_t v = 0; v < VECTORS; ++v) sums[r][v] = added(sums[r][v], row, columns[v]);
        }
    }
#pragma GCC unroll 6
    for (int64_t r = 0; r < HEIGHT; ++r)
#pragma GCC unroll 4
        for (int64_t v = 0; v < VECTORS; ++v) memcpy(answers + r * PANEL + v * LANES, &sums[r][v], sizeof(Sums));
}

// The answers of the sums of a few rows in one panel.
template <lanes::Activation ACTIVATION>
void finish(const int32_t* sums, const Steps& steps, int64_t row, const Rows& rows, const Weight& weight, int64_t panel) {
    for (int64_t v = 0; v < VECTORS; ++v) {
        const int64_t at = panel * PANEL + v * LANES, left = weight.out - at;
        if (left <= 0) break;
        const size_t bytes = (left < LANES ? left : LANES) * sizeof(float);
        const Floats column_steps = load(weight.steps + at), bias = load(weight.bias + at);
        Ints totals;
        memcpy(&totals, weight.totals + at, sizeof totals);
        for (int64_t r = 0; r < rows.count; ++r) {
            Ints whole;
            memcpy(&whole, sums + r * PANEL + v * LANES, sizeof whole);
            if constexpr (!FROM_ZERO) whole -= totals * steps.zero[row + r];
            const Floats value = __builtin_convertvector(whole, Floats) * column_steps;
            Floats result = (Floats)lanes::activated<ACTIVATION>((lanes::V)(value * steps.size[row + r] + bias));
            float* to = rows.y + r * rows.y_stride + at;
            if (left >= LANES) {
                if (rows.residual != nullptr) result += load(rows.residual + r * rows.residual_stride + at);
                memcpy(to, &result, sizeof result);
            } else {
                Floats before{};
                if (rows.residual != nullptr) memcpy(&before, rows.residual + r * rows.residual_stride + at, bytes);
                result += before;
                memcpy(to, &result, bytes);
            }
        }
    }
}

template <lanes::Activation ACTIVATION>
void tiles(const Element* elements, const Steps& steps, const Rows& rows, const Weight& weight, int64_t panel) {
    // Tiles of nearly equal height: 9 rows are 5 and 4.
    const int64_t count = (rows.count + TALL - 1) / TALL;
    alignas(64) int32_t sums[TALL * PANEL];
    for (int64_t t = 0, row = 0; t < count; ++t) {
        const int64_t height = (rows.count - row + count - t - 1) / (count - t);
        const Element* own = elements + row * weight.width;
        const int8_t* packed = weight.packed + panel * PANEL * weight.width;
        switch (height) {
            case 1: sums_of<1>(own, weight.width, packed, sums); break;
            case 2: sums_of<2>(own, weight.width, packed, sums); break;
            case 3: sums_of<3>(own, weight.width, packed, sums); break;
            case 4: sums_of<4>(own, weight.width, packed, sums); break;
            case 5: sums_of<5>(own, weight.width, packed, sums); break;
            default: sums_of<6>(own, weight.width, packed, sums); break;
        }
        finish<ACTIVATION>(sums, steps, row, rows.from(row, height), weight, panel);
        row += height;
    }
}

}  // namespace int8
