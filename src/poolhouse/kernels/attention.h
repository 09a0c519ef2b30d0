// Attention: softmax attention inside each sequence of a pack, all sequences and heads in one call.
//
// A piece of work is up to QUERIES rows of one sequence for the query heads that share a head of keys. It goes through the
// keys that these rows see, a block at a time, and keeps for each row the largest score, the sum and the weighted values so
// far (online softmax). Keys are laid out across lanes, so no product ends in a sum over lanes:
//
//     queries [rows, d]  x  keys [d, lanes of keys]        -> scores [rows, keys]       tile: ROWS x VECTORS registers
//     scores  -> weights [rows, keys]                         largest, 2^(x - largest), sum
//     weights [rows, keys]  x  values [keys, lanes of d]   -> answer [rows, d]          the same tile
//
// Blocks that a row block does not see are not computed. bfloat16 is multiplied in pairs where the CPU can, with sums in
// float32; elsewhere it is widened when keys, values and queries are laid out. Floats may be multiplied so too: they are
// rounded when they are laid out.

#pragma once

#include <cmath>
#include <cstdlib>
#include <type_traits>

#include "lanes.h"
#include "scratch.h"

namespace attention {

using namespace lanes;

// Rows of one piece of work, over all its heads; rows whose scores lie side by side; keys of a block.
constexpr int64_t QUERIES = 256, ROW_BLOCK = ROWS * (WIDTH == 16 ? 4 : 5), KEYS = 256;

struct Segment {
    // Rows of the pack. keys: how many leading rows are attended to. The rows of a prefix come before them.
    int64_t start, length, keys, prefix_start, prefix_length;
};

struct Call {
    const void *query, *key, *value;
    void* out;
    // In elements: from row to row, from head to head.
    int64_t query_row, query_head, key_row, key_head, value_row, value_head, out_row, out_head;
    const Segment* segments;
    int64_t count, heads, kv_heads, head_dim;
    // Keys seen on each side; negative: all.
    int64_t window;
    bool causal;
    // The scale of scores, times log2(e).
    float scale;
    // [heads, longest, longest], added to the scaled scores of a sequence without a prefix; null: nothing is.
    const float* bias;
    int64_t longest;
};

constexpr float LOG2_E = 1.44269504088896341f;

constexpr int64_t up_to(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// How scores and weights are multiplied: Unit is what one lane takes of a row at one step.
struct Floats {
    using Unit = float;
    using Operand = V;
    static constexpr int PER_UNIT = 1, DEGREE = 5;
    static V operand(const Unit* from) { return load(from); }
    static V broadcast(const Unit* from) { return all(*from); }
    static V step(V sum, V a, V b) { return multiply_add(a, b, sum); }
};

#ifdef __AVX512BF16__
struct Pairs {
    using Unit = uint32_t;
    using Operand = __m512i;
    static constexpr int PER_UNIT = 2, DEGREE = 4;
    static __m512i operand(const Unit* from) { return _mm512_loadu_si512(from); }
    static __m512i broadcast(const Unit* from) { return _mm512_set1_epi32(static_cast<int>(*from)); }
    static V step(V sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
using BestPairs = Pairs;
#else
using BestPairs = Floats;
#endif

// c[R, N vectors] = or += a[R, steps] x b[steps, N vectors].
template <class Kind, int R, int N>
inline void tile(const typename Kind::Unit* a, int64_t a_row, const typename Kind::Unit* b, int64_t b_step,
                 int64_t b_vector, int64_t steps, float* c, int64_t c_row, bool add_up) {
    V sums[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) sums[r][n] = add_up ? load(c + r * c_row + n * WIDTH) : zero();
    for (int64_t k = 0; k < steps; ++k) {
        typename Kind::Operand right[N];
        for (int n = 0; n < N; ++n) right[n] = Kind::operand(b + k * b_step + n * b_vector);
        for (int r = 0; r < R; ++r) {
            const auto left = Kind::broadcast(a + r * a_row + k);
            for (int n = 0; n < N; ++n) sums[r][n] = Kind::step(sums[r][n], left, right[n]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) store(c + r * c_row + n * WIDTH, sums[r][n]);
}

template <class Kind, int R>
inline void tiles_of_rows(const typename Kind::Unit* a, int64_t a_row, const typename Kind::Unit* b, int64_t b_step,
                          int64_t b_vector, int64_t steps, float* c, int64_t c_row, int64_t vectors, bool add_up) {
    if constexpr (VECTORS == 3) {
        if (vectors == 3) return tile<Kind, R, 3>(a, a_row, b, b_step, b_vector, steps, c, c_row, add_up);
    }
    if (vectors == 2) return tile<Kind, R, 2>(a, a_row, b, b_step, b_vector, steps, c, c_row, add_up);
    tile<Kind, R, 1>(a, a_row, b, b_step, b_vector, steps, c, c_row, add_up);
}

// c[rows, vectors] = or += a[rows, steps] x b[steps, vectors], for any numbers.
template <class Kind>
void product(const typename Kind::Unit* a, int64_t a_row, int64_t rows, const typename Kind::Unit* b, int64_t b_step,
             int64_t b_vector, int64_t vectors, int64_t steps, float* c, int64_t c_row, bool add_up) {
    int64_t parts = (vectors + VECTORS - 1) / VECTORS;
    for (int64_t n = 0; n < vectors; --parts) {
        const int64_t wide = (vectors - n + parts - 1) / parts;
        const auto* right = b + n * b_vector;
        int64_t r = 0;
        for (; r + ROWS <= rows; r += ROWS)
            tiles_of_rows<Kind, ROWS>(a + r * a_row, a_row, right, b_step, b_vector, steps, c + r * c_row + n * WIDTH,
                                      c_row, wide, add_up);
        const auto* left = a + r * a_row;
        float* to = c + r * c_row + n * WIDTH;
        const auto rest = [&](auto count) {
            tiles_of_rows<Kind, decltype(count)::value>(left, a_row, right, b_step, b_vector, steps, to, c_row, wide,
                                                        add_up);
        };
        switch (rows - r) {
            case 1: rest(std::integral_constant<int, 1>()); break;
            case 2: rest(std::integral_constant<int, 2>()); break;
            case 3: rest(std::integral_constant<int, 3>()); break;
            case 4: rest(std::integral_constant<int, 4>()); break;
            case 5: rest(std::integral_constant<int, 5>()); break;
            case 6: rest(std::integral_constant<int, 6>()); break;
            case 7: rest(std::integral_constant<int, 7>()); break;
        }
        n += wide;
    }
}

// 8 numbers in bfloat16.
inline __m128i narrow_8(const uint16_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
#ifdef __AVX512BF16__
inline __m128i narrow_8(const float* from) { return (__m128i)_mm256_cvtneps_pbh(_mm256_loadu_ps(from)); }
#endif

// 8 units of a row from unit `at` on; zeros behind its end, which lies after a multiple of 4.
template <class Kind>
inline __m256 units(const float* row, int64_t at, int64_t count) {
#ifdef __AVX512BF16__
    if constexpr (Kind::PER_UNIT == 2) {
        const float* from = row + 2 * at;
        if (at + 8 <= count) return (__m256)_mm512_cvtneps_pbh(_mm512_loadu_ps(from));
        return _mm256_insertf128_ps(_mm256_setzero_ps(), (__m128)narrow_8(from), 0);
    }
#endif
    (void)count;
    return _mm256_loadu_ps(row + at);
}
template <class Kind>
inline __m256 units(const uint16_t* row, int64_t at, int64_t count) {
    if constexpr (Kind::PER_UNIT == 1) {
        const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + at));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
    } else {
        const auto* from = reinterpret_cast<const float*>(row) + at;
        if (at + 8 <= count) return _mm256_loadu_ps(from);
        return _mm256_insertf128_ps(_mm256_setzero_ps(), _mm_loadu_ps(from), 0);
    }
}

// One thread's way through pieces of work. Number: how the pack is stored. Kind: how it is multiplied.
template <class Number, class Kind>
class Work {
    using Unit = typename Kind::Unit;

   public:
    explicit Work(const Call& call)
        : call(call),
          group(call.heads / call.kv_heads),
          rows_each(most_rows(call)),
          steps(up_to(call.head_dim / Kind::PER_UNIT, 8)),
          vectors((call.head_dim + WIDTH - 1) / WIDTH) {
        static thread_local Scratch scratch;
        const int64_t rows = group * rows_each, wide = vectors * WIDTH;
        // Of 4 bytes each, as many as a multiple of 16.
        char* at = nullptr;
        const auto take = [&at](auto*& part, int64_t count) {
            part = reinterpret_cast<std::decay_t<decltype(part)>>(at);
            at += up_to(count, 16) * 4;
        };
        // First from nothing, to see how much is needed.
        for (int round = 0; round < 2; ++round) {
            if (round == 1) at = scratch.of(reinterpret_cast<size_t>(at));
            take(queries, rows * steps);
            take(keys, KEYS * steps);
            take(values, KEYS * wide / Kind::PER_UNIT);
            take(scores, ROW_BLOCK * (KEYS + 16));
            take(answers, rows * wide);
            take(largest_so_far, rows);
            take(sums, rows);
        }
    }

    // How many queries of a sequence are one piece.
    static int64_t most_rows(const Call& call) {
        const int64_t rows = QUERIES * call.kv_heads / call.heads / ROW_BLOCK * ROW_BLOCK;
        return rows < ROW_BLOCK ? ROW_BLOCK : rows;
    }

    // Queries [first, last) of a sequence, for the heads that share this head of keys.
    void run(const Segment& segment, int64_t kv_head, int64_t first, int64_t last) {
        const int64_t rows = last - first, before = segment.prefix_length, all_keys = before + segment.keys;
        for (int64_t head = 0; head < group; ++head) lay_queries(segment.start + first, rows, kv_head, head);
        for (int64_t row = 0; row < group * rows; ++row) {
            largest_so_far[row] = -INFINITY;
            sums[row] = 0;
        }
        // Positions count the prefix.
        const int64_t begin = first_seen(before + first), end = end_seen(before + last - 1, all_keys);
        bool started[MOST_BLOCKS] = {};
        for (int64_t block = begin; block < end; block += KEYS) {
            const int64_t count = end - block < KEYS ? end - block : KEYS;
            lay_keys(segment, kv_head, block, count);
            bool* has_begun = started;
            for (int64_t head = 0; head < group; ++head)
                for (int64_t row = 0; row < rows; row += ROW_BLOCK, ++has_begun) {
                    const int64_t height = rows - row < ROW_BLOCK ? rows - row : ROW_BLOCK;
                    *has_begun |= add_block(kv_head * group + head, before + first + row, height, head * rows + row,
                                            block, count, all_keys, *has_begun);
                }
        }
        for (int64_t head = 0; head < group; ++head)
            write(segment, kv_head * group + head, first, rows, head * rows, all_keys);
    }

    // All queries of a sequence, for the heads that share this head of keys.
    void run(const Segment& segment, int64_t kv_head) {
        for (int64_t first = 0; first < segment.length; first += rows_each) {
            const int64_t last = first + rows_each < segment.length ? first + rows_each : segment.length;
            run(segment, kv_head, first, last);
        }
    }

   private:
    // Row blocks of a piece: one more head per block at most than QUERIES rows make, for up to 256 heads.
    static constexpr int64_t MOST_BLOCKS = 512;

    const Call& call;
    const int64_t group, rows_each, steps, vectors;
    Unit *queries, *keys, *values;
    float *scores, *answers, *largest_so_far, *sums;

    int64_t first_seen(int64_t position) const {
        return call.window < 0 || position < call.window ? 0 : position - call.window;
    }
    int64_t end_seen(int64_t position, int64_t all_keys) const {
        int64_t end = all_keys;
        if (call.causal && position + 1 < end) end = position + 1;
        else if (call.window >= 0 && position + call.window + 1 < end) end = position + call.window + 1;
        return end;
    }

    void lay_queries(int64_t start, int64_t rows, int64_t kv_head, int64_t head) {
        const Number* from = static_cast<const Number*>(call.query) + start * call.query_row +
                             (kv_head * group + head) * call.query_head;
        Unit* to = queries + head * rows * steps;
        const int64_t count = call.head_dim / Kind::PER_UNIT;
        for (int64_t row = 0; row < rows; ++row, from += call.query_row, to += steps) {
            expect(from + call.query_head, call.head_dim * sizeof(Number));
            for (int64_t at = 0; at < count; at += 8)
                _mm256_storeu_ps(reinterpret_cast<float*>(to + at), units<Kind>(from, at, count));
        }
    }

    // The row of the pack that holds the key of a position.
    static int64_t row_of(const Segment& segment, int64_t position) {
        return position < segment.prefix_length ? segment.prefix_start + position
                                                : segment.start + position - segment.prefix_length;
    }

    // Keys as [keys / WIDTH, steps, WIDTH], and values as [keys / PER_UNIT, features]; zeros behind the last one.
    void lay_keys(const Segment& segment, int64_t kv_head, int64_t block, int64_t count) {
        const Number* key = static_cast<const Number*>(call.key) + kv_head * call.key_head;
        const Number* value = static_cast<const Number*>(call.value) + kv_head * call.value_head;
        const int64_t units_of_row = call.head_dim / Kind::PER_UNIT, wide = vectors * WIDTH;
        const Number* rows[8];
        for (int64_t first = 0; first < up_to(count, WIDTH); first += 8) {
            Unit* to = keys + first / WIDTH * WIDTH * steps + first % WIDTH;
            for (int i = 0; i < 8; ++i) {
                rows[i] = first + i < count ? key + row_of(segment, block + first + i) * call.key_row : nullptr;
                // The next head's are a few lines further, too far from row to row to be fetched by the CPU itself.
                if (rows[i] != nullptr) expect(rows[i] + call.key_head, call.head_dim * sizeof(Number));
            }
            for (int64_t at = 0; at < units_of_row; at += 8) {
                __m256 x[8];
                for (int i = 0; i < 8; ++i)
                    x[i] = rows[i] != nullptr ? units<Kind>(rows[i], at, units_of_row) : _mm256_setzero_ps();
                transpose(x);
                for (int i = 0; i < 8; ++i) _mm256_storeu_ps(reinterpret_cast<float*>(to + (at + i) * WIDTH), x[i]);
            }
        }
        if constexpr (Kind::PER_UNIT == 1) {
            for (int64_t row = 0; row < count; ++row) {
                const Number* from = value + row_of(segment, block + row) * call.value_row;
                auto* to = reinterpret_cast<float*>(values) + row * wide;
                expect(from + call.value_head, call.head_dim * sizeof(Number));
                for (int64_t at = 0; at < call.head_dim; at += 8)
                    _mm256_storeu_ps(to + at, units<Kind>(from, at, call.head_dim));
                if (call.head_dim < wide) _mm256_storeu_ps(to + wide - 8, _mm256_setzero_ps());
            }
        } else {
            auto* to = reinterpret_cast<uint16_t*>(values);
            for (int64_t row = 0; row < count; row += 2, to += 2 * wide) {
                const Number* a = value + row_of(segment, block + row) * call.value_row;
                const Number* b =
                    row + 1 < count ? value + row_of(segment, block + row + 1) * call.value_row : nullptr;
                expect(a + call.value_head, call.head_dim * sizeof(Number));
                if (b != nullptr) expect(b + call.value_head, call.head_dim * sizeof(Number));
                for (int64_t at = 0; at < call.head_dim; at += 8) {
                    const __m128i even = narrow_8(a + at);
                    const __m128i odd = b != nullptr ? narrow_8(b + at) : _mm_setzero_si128();
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * at), _mm_unpacklo_epi16(even, odd));
                    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * at + 8), _mm_unpackhi_epi16(even, odd));
                }
                if (call.head_dim < wide)
                    _mm256_storeu_ps(reinterpret_cast<float*>(to + 2 * call.head_dim), _mm256_setzero_ps());
            }
        }
    }

    // Some rows of a head and a block of keys. position: of the first row. at: its place among the rows of this piece.
    // Returns whether there was anything to see.
    bool add_block(int64_t head, int64_t position, int64_t height, int64_t at, int64_t block, int64_t count,
                   int64_t all_keys, bool has_begun) {
        // In keys of this block, whole vectors at the front.
        int64_t from = first_seen(position) - block, to = end_seen(position + height - 1, all_keys) - block;
        from = from < 0 ? 0 : from / WIDTH * WIDTH;
        to = to > count ? count : to;
        if (from >= to) return false;
        const int64_t wide = up_to(to, WIDTH);
        // A line more than the keys, so that neighbouring rows do not share places of the cache.
        const int64_t score_row = up_to(count, 16) + 16;
        product<Kind>(queries + at * steps, steps, height, keys + from * steps, WIDTH, WIDTH * steps,
                      (wide - from) / WIDTH, steps, scores + from, score_row, false);
        const bool limited = call.causal || call.window >= 0;
        for (int64_t row = 0; row < height; ++row) {
            float* line = scores + row * score_row;
            if (call.bias != nullptr) {
                // Scores are scaled later.
                const float* bias = call.bias + (head * call.longest + position + row) * call.longest + block;
                for (int64_t key = from; key < to; ++key) line[key] += bias[key] * (LOG2_E / call.scale);
            }
            int64_t begin = from, end = to;
            if (limited) {
                const int64_t seen = first_seen(position + row) - block, until = end_seen(position + row, all_keys) - block;
                begin = seen > begin ? (seen < to ? seen : to) : begin;
                end = until < end ? (until > begin ? until : begin) : end;
                for (int64_t key = from; key < begin; ++key) line[key] = -INFINITY;
            }
            for (int64_t key = end; key < wide; ++key) line[key] = -INFINITY;
            weigh(line, from, wide, at + row, has_begun);
        }
        const auto* weights = reinterpret_cast<const Unit*>(scores) + from / Kind::PER_UNIT;
        product<Kind>(weights, score_row, height, values + from / Kind::PER_UNIT * vectors * WIDTH, vectors * WIDTH, WIDTH,
                      vectors, (to - from + Kind::PER_UNIT - 1) / Kind::PER_UNIT, answers + at * vectors * WIDTH,
                      vectors * WIDTH, has_begun);
        return true;
    }

    // The scores of a row become weights, in place, and what it has so far is scaled to its new largest score.
    void weigh(float* line, int64_t from, int64_t to, int64_t row, bool has_begun) {
        V most = load(line + from);
        for (int64_t key = from + WIDTH; key < to; key += WIDTH) most = larger(most, load(line + key));
        const float before = largest_so_far[row], found = largest(most), now = found > before ? found : before;
        // Where nothing is seen yet all differences would be NaN.
        const V scale = all(call.scale), shift = all(now == -INFINITY ? 0.0f : now * call.scale);
        V total = zero();
        for (int64_t key = from; key < to; key += WIDTH) {
            const V weight = power_of_2<Kind::DEGREE>(multiply_subtract(load(line + key), scale, shift));
            total = add(total, weight);
            if constexpr (Kind::PER_UNIT == 1) store(line + key, weight);
            else store(reinterpret_cast<uint16_t*>(line) + key, weight);
        }
        float kept = 1.0f;
        if (has_begun && now > before) {
            kept = std::exp2((before - now) * call.scale);
            float* answer = answers + row * vectors * WIDTH;
            for (int64_t n = 0; n < vectors; ++n) store(answer + n * WIDTH, mul(load(answer + n * WIDTH), all(kept)));
        }
        largest_so_far[row] = now;
        sums[row] = sums[row] * kept + sum(total);
    }

    void write(const Segment& segment, int64_t head, int64_t first, int64_t rows, int64_t at, int64_t all_keys) {
        Number* out = static_cast<Number*>(call.out) + (segment.start + first) * call.out_row + head * call.out_head;
        for (int64_t row = 0; row < rows; ++row, out += call.out_row) {
            const int64_t position = segment.prefix_length + first + row;
            if (first_seen(position) >= end_seen(position, all_keys)) {
                std::memset(out, 0, call.head_dim * sizeof(Number));
                continue;
            }
            const V share = all(1.0f / sums[at + row]);
            const float* answer = answers + (at + row) * vectors * WIDTH;
            int64_t feature = 0;
            for (; feature + WIDTH <= call.head_dim; feature += WIDTH)
                store(out + feature, mul(load(answer + feature), share));
            if (feature < call.head_dim) {
                Number last[WIDTH];
                store(last, mul(load(answer + feature), share));
                std::memcpy(out + feature, last, (call.head_dim - feature) * sizeof(Number));
            }
        }
    }
};

}  // namespace attention
