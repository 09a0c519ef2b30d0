// Blocks: all blocks of a Transformer over a few rows, in one call, by the caller's thread and by helpers that are awake.
//
//     x --norm?--> qkv --norm?, rope?--> attention --> out, + x --norm?--> up --activation--> down, + x --norm?--> x
//
// A short query is a few rows: dozens of operators of a few microseconds each, and as much again to call them. Here is one
// call. Weights lie as oneDNN lays them out where it has AVX-512, and are not copied:
//
//     float32   [out / 64, in, 64]          a panel: 64 columns, row by row
//     bfloat16  [out / 64, in / 2, 64, 2]   two neighbouring rows together, for one instruction; beside AMX 32 columns
//     int8      [out / 64, in / 4, 64, 4]   as `Int8Linear` lays them out
//
// Sums, norms and the residual stream are in float32. What enters a product is in the type of the weights; rows of int8 are
// quantised as they come. In int8 every number goes through the very operations of longer packs, which go block by block.

#include "activations.h"
#include "attention.h"
#include "int8.h"
#include "norms.h"
#include "parallel.h"
#include "scratch.h"
#include "team.h"

namespace {

struct Matrix {
    const void* weight;
    const float* bias;      // [out], or null; never null in int8
    const float* steps;     // these two in int8 alone: what a whole number of each column is worth,
    const int32_t* totals;  // and the sum of its whole numbers
    int64_t out, in;
    int64_t panel;  // columns of one: 64, or 32
};

struct Norm {
    const float* weight;  // null: there is no norm
    const float* bias;    // null: a root mean square norm, or a layer norm without a bias
};

struct Block {
    Matrix qkv, out, up, down;
    Norm attn_in, attn_post, ffn_in, ffn_post, query, key;
    const float *cosines, *sines;  // [rows, rotated], or null
    int64_t window;                // tokens seen on each side, inclusive; negative: all
};

struct Spec {
    int64_t hidden, heads, kv_heads, head_dim, rotated, inner;
    int64_t activation;  // see activations.h
    int64_t gated, causal, root_mean_square;
    int64_t type;  // of the weights, see Type
    float eps, scale;
};

enum Type : int64_t { FLOAT32, BFLOAT16, INT8 };

#ifdef __AVX512F__

using lanes::V;
constexpr int64_t WIDTH = lanes::WIDTH, MOST_ROWS = 64;

// Where a product is written, and what is added to it.
struct Target {
    float* to;
    int64_t stride;
    const float* added;  // [rows, stride], or null
    int64_t activation;
};

// The rows that enter a product, without gaps, in the type of the weights.
template <class Number>
struct Operand {
    Number* rows;
    void take(int64_t row, const float* from, int64_t size) {
        for (int64_t i = 0; i < size; i += WIDTH) lanes::store(rows + row * size + i, lanes::load(from + i));
    }
};

template <>
struct Operand<int8_t> {
    int8::Element* rows;
    int8::Steps steps;
    void take(int64_t row, const float* from, int64_t size) {
        int8::quantise(from, size, size, rows + row * size, steps, row);
    }
};

static_assert(MOST_ROWS <= int8::BLOCK);

// Weights come from memory, or from far in the cache: a line is asked for so many steps before its turn, since a CPU's own
// prefetching ends with each page.
constexpr int64_t AHEAD = 48;

template <int VECTORS, class Number>
void fetch(const Number* at) {
    for (int v = 0; v < VECTORS; ++v) _mm_prefetch(reinterpret_cast<const char*>(at) + v * sizeof(V), _MM_HINT_T0);
}

// ROWS rows times a panel of VECTORS vectors.
template <int ROWS, int VECTORS, class Number>
void tile(const Number* x, int64_t in, const Number* panel, const float* bias, Target target) {
    constexpr int64_t PANEL = VECTORS * WIDTH;
    V sums[ROWS][VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
        const V first = bias == nullptr ? lanes::zero() : lanes::load(bias + v * WIDTH);
        for (int row = 0; row < ROWS; ++row) sums[row][v] = first;
    }
    if constexpr (sizeof(Number) == sizeof(float)) {
        for (int64_t k = 0; k < in; ++k) {
            fetch<VECTORS>(panel + (k + AHEAD) * PANEL);
            V weights[VECTORS];
            for (int v = 0; v < VECTORS; ++v) weights[v] = lanes::load(panel + k * PANEL + v * WIDTH);
            for (int row = 0; row < ROWS; ++row) {
                const V one = lanes::all(x[row * in + k]);
                for (int v = 0; v < VECTORS; ++v) sums[row][v] = lanes::multiply_add(one, weights[v], sums[row][v]);
            }
        }
    } else {
#ifdef __AVX512BF16__
        for (int64_t k = 0; k < in; k += 2) {
            fetch<VECTORS>(panel + (k + 2 * AHEAD) * PANEL);
            __m512bh weights[VECTORS];
            for (int v = 0; v < VECTORS; ++v)
                weights[v] = (__m512bh)_mm512_loadu_si512(panel + k * PANEL + v * WIDTH * 2);
            for (int row = 0; row < ROWS; ++row) {
                int32_t pair;
                std::memcpy(&pair, x + row * in + k, sizeof pair);
                const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                for (int v = 0; v < VECTORS; ++v) sums[row][v] = _mm512_dpbf16_ps(sums[row][v], both, weights[v]);
            }
        }
#else
        for (int64_t k = 0; k < in; k += 2) {
            fetch<VECTORS>(panel + (k + 2 * AHEAD) * PANEL);
            V low[VECTORS], high[VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                const __m512i both = _mm512_loadu_si512(panel + k * PANEL + v * WIDTH * 2);
                low[v] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
                high[v] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int32_t(0xffff0000))));
            }
            for (int row = 0; row < ROWS; ++row) {
                int32_t pair;
                std::memcpy(&pair, x + row * in + k, sizeof pair);
                const V first = _mm512_castsi512_ps(_mm512_set1_epi32(pair << 16));
                const V second = _mm512_castsi512_ps(_mm512_set1_epi32(pair & int32_t(0xffff0000)));
                for (int v = 0; v < VECTORS; ++v) {
                    sums[row][v] = lanes::multiply_add(first, low[v], sums[row][v]);
                    sums[row][v] = lanes::multiply_add(second, high[v], sums[row][v]);
                }
            }
        }
#endif
    }
    for (int row = 0; row < ROWS; ++row)
        for (int v = 0; v < VECTORS; ++v) {
            V sum = lanes::activated(sums[row][v], target.activation);
            const int64_t at = row * target.stride + v * WIDTH;
            if (target.added != nullptr) sum = lanes::add(sum, lanes::load(target.added + at));
            lanes::store(target.to + at, sum);
        }
}

constexpr int64_t TALLEST = 6;

template <int VECTORS, class Number>
void some_rows(int64_t rows, const Number* x, int64_t in, const Number* panel, const float* bias, Target target) {
    switch (rows) {
        case 1: return tile<1, VECTORS>(x, in, panel, bias, target);
        case 2: return tile<2, VECTORS>(x, in, panel, bias, target);
        case 3: return tile<3, VECTORS>(x, in, panel, bias, target);
        case 4: return tile<4, VECTORS>(x, in, panel, bias, target);
        case 5: return tile<5, VECTORS>(x, in, panel, bias, target);
        default: return tile<TALLEST, VECTORS>(x, in, panel, bias, target);
    }
}

// target = activation(x @ weight + bias) + added
template <class Number>
void multiply(team::Leader& leader, const Matrix& matrix, const Operand<Number>& x, int64_t rows, Target target) {
    const auto* weight = static_cast<const Number*>(matrix.weight);
    // Tiles of nearly equal height; a panel stays in the cache while they pass.
    const int64_t tiles = (rows + TALLEST - 1) / TALLEST, low = rows / tiles, taller = rows % tiles;
    leader.each(matrix.out / matrix.panel, [&](int64_t number, int) {
        const int64_t column = number * matrix.panel;
        const Number* panel = weight + column * matrix.in;
        const float* bias = matrix.bias == nullptr ? nullptr : matrix.bias + column;
        for (int64_t turn = 0, row = 0; turn < tiles; ++turn) {
            const int64_t count = low + (turn < taller), at = row * target.stride + column;
            const float* added = target.added == nullptr ? nullptr : target.added + at;
            const Target there{target.to + at, target.stride, added, target.activation};
            const Number* own = x.rows + row * matrix.in;
            if (matrix.panel == 2 * WIDTH)
                some_rows<2>(count, own, matrix.in, panel, bias, there);
            else
                some_rows<4>(count, own, matrix.in, panel, bias, there);
            row += count;
        }
    });
}

template <>
void multiply(team::Leader& leader, const Matrix& matrix, const Operand<int8_t>& x, int64_t count, Target target) {
    const auto* packed = static_cast<const int8_t*>(matrix.weight);
    const int8::Weight weight{matrix.in, matrix.out, matrix.in, packed, matrix.steps, matrix.totals, matrix.bias};
    const int8::Rows rows{nullptr, target.added, target.to, count, 0, target.stride, target.stride};
    leader.each(weight.panels(), [&](int64_t panel, int) {
        lanes::with_activation(target.activation, [&](auto kind) {
            int8::tiles<kind.value>(x.rows, x.steps, rows, weight, panel);
        });
    });
}

// One row of `size` numbers; `to` may be `from`.
void normalized(const Spec& spec, const Norm& norm, const float* from, float* to, int64_t size) {
    if (spec.root_mean_square)
        norms::rms_row<float, false>(from, size, norm.weight, norms::rms_factor(from, size, spec.eps), to);
    else norms::layer_row(from, size, norm.weight, norm.bias, spec.eps, to);
}

// Pairs of features a half apart are turned, every operation rounded by itself.
void rotate(float* x, const float* cosines, const float* sines, int64_t rotated) {
    const int64_t half = rotated / 2;
    for (int64_t i = 0; i < half; i += WIDTH) {
        const V first = lanes::load(x + i), second = lanes::load(x + half + i);
        const auto turned = [&](int64_t at, V own) { return lanes::mul(own, lanes::load(cosines + at)); };
        const auto crossed = [&](int64_t at, V other) { return lanes::mul(other, lanes::load(sines + at)); };
        lanes::store(x + i, lanes::subtract(turned(i, first), crossed(i, second)));
        lanes::store(x + half + i, lanes::add(turned(half + i, second), crossed(half + i, first)));
    }
}

// Attention of one block: heads of queries, keys and values side by side, [rows, all heads]; first norms and positions.
template <class Kind>
struct Attention {
    const Spec& spec;
    const Block& block;
    float* qkv;
    int64_t rows;
    attention::Call call;

    // Of one head of queries or keys.
    void prepare(int64_t head) const {
        const Norm& norm = head < spec.heads ? block.query : block.key;
        if (norm.weight == nullptr && block.cosines == nullptr) return;
        for (int64_t row = 0; row < rows; ++row) {
            float* x = qkv + row * call.query_row + head * spec.head_dim;
            if (norm.weight != nullptr) normalized(spec, norm, x, x, spec.head_dim);
            if (block.cosines != nullptr)
                rotate(x, block.cosines + row * spec.rotated, block.sines + row * spec.rotated, spec.rotated);
        }
    }

    // One head of keys, and the heads of queries that look at it.
    void operator()(int64_t kv, int) const {
        const int64_t group = spec.heads / spec.kv_heads;
        prepare(spec.heads + kv);
        for (int64_t head = kv * group; head < (kv + 1) * group; ++head) prepare(head);
        attention::Work<float, Kind> work(call);
        for (int64_t number = 0; number < call.count; ++number) work.run(call.segments[number], kv);
    }
};

// Numbers that are worth more than one thread.
constexpr int64_t WORTH_A_PHASE = 1 << 13;

// work(row, who) for all rows, several at a turn.
template <class Work>
void each_row(team::Leader& leader, int64_t rows, int64_t size, Work work) {
    const int64_t part = rows * size < WORTH_A_PHASE ? rows : (rows + 7) / 8;
    leader.each((rows + part - 1) / part, [&](int64_t turn, int who) {
        for (int64_t row = turn * part; row < rows && row < (turn + 1) * part; ++row) work(row, who);
    });
}

template <class Number>
void run(const Spec& spec, const Block* blocks, int64_t count, float* x, int64_t rows,
         const attention::Segment* segments, int64_t sequences, const float* bias, int64_t longest, int64_t helpers) {
    team::Leader leader(helpers);
    const int64_t hidden = spec.hidden, inner = spec.inner, attended = spec.heads * spec.head_dim;
    const int64_t keys = spec.kv_heads * spec.head_dim, joined = attended + 2 * keys;
    const int64_t up = spec.gated ? 2 * inner : inner;
    const auto larger = [](int64_t a, int64_t b) { return a > b ? a : b; };
    const int64_t widest = larger(hidden, larger(attended, inner));
    // wide: query, key and value, or what `up` answers. mixed: what attention answers. lines: a row for each who works.
    static thread_local Scratch scratch;
    const int64_t floats = rows * (larger(joined, up) + attended) + (team::MOST_HELPERS + 1) * widest;
    auto* wide = reinterpret_cast<float*>(scratch.of(floats * sizeof(float) + rows * widest * sizeof(Number)));
    float *mixed = wide + rows * larger(joined, up), *lines = mixed + rows * attended;
    Operand<Number> entering;
    entering.rows = reinterpret_cast<decltype(entering.rows)>(wide + floats);

    // x --after?--> x --before?--> what enters the next product.
    const auto norm_rows = [&](const Norm* after, const Norm* before) {
        each_row(leader, rows, hidden, [&](int64_t row, int who) {
            float *own = x + row * hidden, *line = lines + who * widest;
            if (after != nullptr && after->weight != nullptr) normalized(spec, *after, own, own, hidden);
            if (before == nullptr) return;
            if (before->weight != nullptr) normalized(spec, *before, own, line, hidden);
            entering.take(row, before->weight != nullptr ? line : own, hidden);
        });
    };

    // As longer packs of this type are multiplied.
    using Kind = std::conditional_t<std::is_same_v<Number, int8_t>, attention::BestPairs, attention::Floats>;
    norm_rows(nullptr, &blocks->attn_in);
    for (const Block* block = blocks; block < blocks + count; ++block) {
        multiply(leader, block->qkv, entering, rows, Target{wide, joined, nullptr, 0});
        const float *key = wide + attended, *value = key + keys;
        leader.each(spec.kv_heads, Attention<Kind>{spec, *block, wide, rows, {
            wide, key, value, mixed, joined, spec.head_dim, joined, spec.head_dim, joined, spec.head_dim, attended,
            spec.head_dim, segments, sequences, spec.heads, spec.kv_heads, spec.head_dim, block->window,
            spec.causal != 0, spec.scale * attention::LOG2_E, bias, longest}});
        each_row(leader, rows, attended, [&](int64_t row, int) { entering.take(row, mixed + row * attended, attended); });
        multiply(leader, block->out, entering, rows, Target{x, hidden, x, 0});
        norm_rows(&block->attn_post, &block->ffn_in);
        multiply(leader, block->up, entering, rows, Target{wide, up, nullptr, spec.gated ? 0 : spec.activation});
        each_row(leader, rows, up, [&](int64_t row, int who) {
            const float *gate = wide + row * up, *values = gate + inner;
            float* line = lines + who * widest;
            if (!spec.gated) return entering.take(row, gate, inner);
            lanes::with_activation(spec.activation, [&](auto kind) {
                for (int64_t i = 0; i < inner; i += WIDTH)
                    lanes::store(line + i, lanes::mul(lanes::activated<kind.value>(lanes::load(gate + i)), lanes::load(values + i)));
            });
            entering.take(row, line, inner);
        });
        multiply(leader, block->down, entering, rows, Target{x, hidden, x, 0});
        norm_rows(&block->ffn_post, block + 1 < blocks + count ? &block[1].attn_in : nullptr);
    }
}

#endif

}  // namespace

// Writes 1 into `answer` where this library's instructions suffice for `poolhouse_blocks`, else 0.
KERNEL void poolhouse_blocks_run(int64_t* answer) {
#ifdef __AVX512F__
    *answer = 1;
#else
    *answer = 0;
#endif
}

// x: [rows, hidden], which becomes the answer of the last block; at most 64 rows. segments: [sequences, 5], as
// attention::Segment. bias: [heads, longest, longest], or null. helpers: how many threads may help.
KERNEL void poolhouse_blocks(const void* spec, const void* blocks, int64_t count, float* x, int64_t rows,
                             const void* segments, int64_t sequences, const float* bias, int64_t longest,
                             int64_t helpers) {
#ifdef __AVX512F__
    const auto& own = *static_cast<const Spec*>(spec);
    const auto* all = static_cast<const Block*>(blocks);
    const auto* table = static_cast<const attention::Segment*>(segments);
    const auto by = [&](auto number) {
        run<decltype(number)>(own, all, count, x, rows, table, sequences, bias, longest, helpers);
    };
    switch (own.type) {
        case BFLOAT16: return by(uint16_t());
        case INT8: return by(int8_t());
        default: return by(float());
    }
#else
    (void)spec, (void)blocks, (void)count, (void)x, (void)rows, (void)segments, (void)sequences, (void)bias, (void)longest, (void)helpers;
#endif
}
