// Lanes: the vector registers of a level of instructions under one set of names, 16 floats wide with AVX-512, else 8.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

namespace lanes {

#ifdef __AVX512F__

constexpr int WIDTH = 16;
// A register file of 32: a tile of ROWS x VECTORS sums leaves room for what is multiplied.
constexpr int ROWS = 8, VECTORS = 3;
using V = __m512;

inline V load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, V x) { _mm512_storeu_ps(to, x); }
inline V all(float x) { return _mm512_set1_ps(x); }
inline V zero() { return _mm512_setzero_ps(); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V subtract(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V divide(V a, V b) { return _mm512_div_ps(a, b); }
// The second where it is NaN.
inline V smaller(V a, V b) { return _mm512_min_ps(a, b); }
// Infinity where a is larger than b, else x.
inline V infinite_where(V a, V b, V x) {
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), _mm512_set1_ps(__builtin_inff()));
}
inline V negative(V x) { return _mm512_xor_ps(x, _mm512_set1_ps(-0.0f)); }
inline V magnitude(V x) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), x); }
// a where x has a minus, else b.
inline V where_negative(V x, V a, V b) {
    return _mm512_mask_mov_ps(b, _mm512_movepi32_mask(_mm512_castps_si512(x)), a);
}
// 1 / x for x from 1 to 1e30, by a first guess and a step of Newton's: quicker than a division, 1e-7 of the result at most.
inline V inverse(V x) {
    const V guess = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(guess, _mm512_fnmadd_ps(x, guess, _mm512_set1_ps(2.0f)));
}
inline V multiply_add(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V multiply_subtract(V a, V b, V c) { return _mm512_fmsub_ps(a, b, c); }
// b where one is NaN.
inline V larger(V a, V b) { return _mm512_max_ps(a, b); }
inline V larger_or_nan(V a, V b) {
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}
inline float largest(V x) { return _mm512_reduce_max_ps(x); }
inline float sum(V x) { return _mm512_reduce_add_ps(x); }
// The nearest whole number.
inline V rounded(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^whole; 0 where the true power is below the normal numbers, NaN stays.
inline V scaled(V x, V whole, V power) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(power, all(-126.0f), _CMP_NLT_UQ), x, whole);
}

// 16 numbers in bfloat16 as floats, and back to the nearest.
inline V widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline V load(const uint16_t* from) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
inline void store(uint16_t* to, V x) {
#ifdef __AVX512BF16__
    const __m256bh narrow = _mm512_cvtneps_pbh(x);
    std::memcpy(to, &narrow, sizeof narrow);
#else
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i narrow = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    narrow = _mm512_mask_set1_epi32(narrow, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), 0x7fc0);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(narrow));
#endif
}

#else

constexpr int WIDTH = 8;
constexpr int ROWS = 6, VECTORS = 2;
using V = __m256;

inline V load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, V x) { _mm256_storeu_ps(to, x); }
inline V all(float x) { return _mm256_set1_ps(x); }
inline V zero() { return _mm256_setzero_ps(); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V subtract(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V divide(V a, V b) { return _mm256_div_ps(a, b); }
inline V smaller(V a, V b) { return _mm256_min_ps(a, b); }
inline V infinite_where(V a, V b, V x) {
    return _mm256_blendv_ps(x, _mm256_set1_ps(__builtin_inff()), _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
inline V negative(V x) { return _mm256_xor_ps(x, _mm256_set1_ps(-0.0f)); }
inline V magnitude(V x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline V where_negative(V x, V a, V b) { return _mm256_blendv_ps(b, a, x); }
inline V inverse(V x) {
    const V guess = _mm256_rcp_ps(x);
    return _mm256_mul_ps(guess, _mm256_fnmadd_ps(x, guess, _mm256_set1_ps(2.0f)));
}
inline V multiply_add(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V multiply_subtract(V a, V b, V c) { return _mm256_fmsub_ps(a, b, c); }
inline V larger(V a, V b) { return _mm256_max_ps(a, b); }
inline V larger_or_nan(V a, V b) {
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
inline float largest(V x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline float sum(V x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline V rounded(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V scaled(V x, V whole, V power) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    const V product = _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
    return _mm256_and_ps(product, _mm256_cmp_ps(power, all(-126.0f), _CMP_NLT_UQ));
}

inline V widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline V load(const uint16_t* from) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
inline void store(uint16_t* to, V x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i narrow = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    narrow = _mm256_blendv_epi8(narrow, _mm256_set1_epi32(0x7fc0), nan);
    narrow = _mm256_permute4x64_epi64(_mm256_packus_epi32(narrow, narrow), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(narrow));
}

#endif

// 2^part, at most half from 0. Relative error 1.2e-7 with DEGREE 5, 3e-6 with 4.
template <int DEGREE>
inline V power_of_part(V part) {
    V value;
    if constexpr (DEGREE == 5) {
        value = multiply_add(all(0.001327647129073739f), part, all(0.009675541892647743f));
        value = multiply_add(value, part, all(0.05550713092088699f));
        value = multiply_add(value, part, all(0.24022120237350464f));
        value = multiply_add(value, part, all(0.6931469440460205f));
        value = multiply_add(value, part, all(1.0f));
    } else {
        value = multiply_add(all(0.009570101276040077f), part, all(0.05591786280274391f));
        value = multiply_add(value, part, all(0.240247443318367f));
        value = multiply_add(value, part, all(0.6931217908859253f));
        value = multiply_add(value, part, all(1.0f));
    }
    return value;
}

// 2^x; 0 below 2^-126, NaN stays NaN; x is at most 126.
template <int DEGREE>
inline V power_of_2(V x) {
    const V whole = rounded(x);
    return scaled(power_of_part<DEGREE>(subtract(x, whole)), whole, x);
}

// e^x. Relative error 2e-7; 0 below 2^-126, infinite from e^87 on, NaN stays NaN.
inline V exponential(V given) {
    // Of a number and NaN the second operand stays.
    const V x = larger(all(-88.0f), smaller(all(87.0f), given));
    const V whole = rounded(mul(x, all(1.44269504f)));
    // log2(e) in two parts, so that the difference is exact for large x too.
    const V part = multiply_add(x, all(1.925963033500e-8f), multiply_subtract(x, all(1.44269502162933f), whole));
    return infinite_where(given, all(87.0f), scaled(power_of_part<5>(part), whole, whole));
}

inline V rounded_to_bfloat16(V x) {
    uint16_t narrow[WIDTH];
    store(narrow, x);
    return load(narrow);
}

// Bytes that will be read soon.
inline void expect(const void* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(static_cast<const char*>(from) + at, _MM_HINT_T1);
}

// 8 rows of 8 become 8 columns.
inline void transpose(__m256 (&x)[8]) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        x[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

}  // namespace lanes
