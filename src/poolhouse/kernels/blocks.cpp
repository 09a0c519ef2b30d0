// Blocks: all blocks of a Transformer over a few rows, in one call, by the caller's thread and by helpers that are awake.
//
//     x --norm?--> qkv --norm?, rope?--> attention --> out, + x --norm?--> up --activation--> down, + x --norm?--> x
//
// A short query is a few rows: dozens of operators of a few microseconds each, and as much again to call them. Here is one
// call. Weights lie as oneDNN lays them out where it has AVX-512, and are not copied:
//
//     float32   [out / 64, in, 64]          a panel: 64 columns, row by row
//     bfloat16  [out / 64, in / 2, 64, 2]   two neighbouring rows together, for one instruction
//
// Sums, norms and the residual stream are in float32. What enters a product is in the type of the weights.

#include "activations.h"
#include "parallel.h"
#include "team.h"

#include <cmath>

namespace {

struct Matrix {
    const void* weight;
    const float* bias;  // [out], or null
    int64_t out, in;
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
    int64_t gated, causal, root_mean_square, half;
    float eps, scale;
};

#ifdef __AVX512F__

using lanes::V;
constexpr int64_t PANEL = 64, WIDTH = lanes::WIDTH;
constexpr float LOG2_E = 1.4426950408889634f;

// Where a product is written: floats with what is added to them, or the operand of the next product.
template <class Out>
struct Target {
    Out* to;
    int64_t stride;
    const float* added;  // [rows, stride], or null
    int64_t activation;
};

// ROWS rows times `VECTORS` vectors of a panel, from column `column` of it on.
template <int ROWS, int VECTORS, class Operand, class Out>
void tile(const Operand* x, int64_t in, const Operand* panel, const float* bias, Target<Out> target) {
    V sums[ROWS][VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
        const V first = bias == nullptr ? lanes::zero() : lanes::load(bias + v * WIDTH);
        for (int row = 0; row < ROWS; ++row) sums[row][v] = first;
    }
    if constexpr (sizeof(Operand) == sizeof(float)) {
        for (int64_t k = 0; k < in; ++k) {
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

template <class Operand, class Out>
void some_rows(int64_t rows, const Operand* x, int64_t in, const Operand* panel, const float* bias, Target<Out> target) {
    constexpr int VECTORS = PANEL / WIDTH;
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
template <class Operand, class Out>
void multiply(team::Leader& leader, const Matrix& matrix, const Operand* x, int64_t rows, Target<Out> target) {
    const auto* weight = static_cast<const Operand*>(matrix.weight);
    // Tiles of nearly equal height; a panel stays in the cache while they pass.
    const int64_t tiles = (rows + TALLEST - 1) / TALLEST, low = rows / tiles, taller = rows % tiles;
    leader.each(matrix.out / PANEL, [&](int64_t number, int) {
        const int64_t column = number * PANEL;
        const Operand* panel = weight + column * matrix.in;
        const float* bias = matrix.bias == nullptr ? nullptr : matrix.bias + column;
        for (int64_t turn = 0, row = 0; turn < tiles; ++turn) {
            const int64_t count = low + (turn < taller), at = row * target.stride + column;
            const float* added = target.added == nullptr ? nullptr : target.added + at;
            const Target<Out> there{target.to + at, target.stride, added, target.activation};
            some_rows(count, x + row * matrix.in, matrix.in, panel, bias, there);
            row += count;
        }
    });
}

// One row of `size` numbers; `to` may be `from`.
template <class Out>
void normalized(const Spec& spec, const Norm& norm, const float* from, Out* to, int64_t size) {
    V sum = lanes::zero(), squares = lanes::zero();
    float mean = 0.0f;
    if (!spec.root_mean_square) {
        for (int64_t i = 0; i < size; i += WIDTH) sum = lanes::add(sum, lanes::load(from + i));
        mean = lanes::sum(sum) / float(size);
    }
    for (int64_t i = 0; i < size; i += WIDTH) {
        const V x = lanes::subtract(lanes::load(from + i), lanes::all(mean));
        squares = lanes::multiply_add(x, x, squares);
    }
    const V factor = lanes::all(1.0f / std::sqrt(lanes::sum(squares) / float(size) + spec.eps));
    for (int64_t i = 0; i < size; i += WIDTH) {
        const V x = lanes::mul(lanes::subtract(lanes::load(from + i), lanes::all(mean)), factor);
        const V weight = lanes::load(norm.weight + i);
        lanes::store(to + i, norm.bias == nullptr ? lanes::mul(x, weight) : lanes::multiply_add(x, weight, lanes::load(norm.bias + i)));
    }
}

template <class Out>
void converted(const float* from, Out* to, int64_t size) {
    for (int64_t i = 0; i < size; i += WIDTH) lanes::store(to + i, lanes::load(from + i));
}

// The operand of a product: all rows, behind a norm where there is one.
template <class Operand>
void operand(const Spec& spec, const Norm& norm, const float* x, Operand* to, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
        const float* from = x + row * spec.hidden;
        if (norm.weight != nullptr) normalized(spec, norm, from, to + row * spec.hidden, spec.hidden);
        else converted(from, to + row * spec.hidden, spec.hidden);
    }
}

// Pairs of features a half apart are turned.
void rotate(float* x, const float* cosines, const float* sines, int64_t rotated) {
    const int64_t half = rotated / 2;
    for (int64_t i = 0; i < half; i += WIDTH) {
        const V first = lanes::load(x + i), second = lanes::load(x + half + i);
        lanes::store(x + i, lanes::subtract(lanes::mul(first, lanes::load(cosines + i)), lanes::mul(second, lanes::load(sines + i))));
        lanes::store(x + half + i, lanes::multiply_add(
            second, lanes::load(cosines + half + i), lanes::mul(first, lanes::load(sines + half + i))));
    }
}

// What the attention of one block reads and writes. qkv: [rows, all heads]. bias: [heads, longest, longest], or null.
// keys: room for [head_dim, padded keys] and a row of scores, for each of those who work.
template <class Operand>
struct Attention {
    const Spec& spec;
    const Block& block;
    float* qkv;
    const int64_t rows, *bounds, sequences;
    const float* bias;
    const int64_t longest;
    float* keys;
    Operand* to;

    int64_t dim() const { return spec.head_dim; }
    int64_t stride() const { return (spec.heads + 2 * spec.kv_heads) * dim(); }

    // Norms and positions of one head of queries or keys.
    void prepare(int64_t head) const {
        const Norm& norm = head < spec.heads ? block.query : block.key;
        if (norm.weight == nullptr && block.cosines == nullptr) return;
        for (int64_t row = 0; row < rows; ++row) {
            float* x = qkv + row * stride() + head * dim();
            if (norm.weight != nullptr) normalized(spec, norm, x, x, dim());
            if (block.cosines != nullptr)
                rotate(x, block.cosines + row * spec.rotated, block.sines + row * spec.rotated, spec.rotated);
        }
    }

    // One head of keys, and the heads of queries that look at it.
    void operator()(int64_t kv, int who) const {
        const int64_t group = spec.heads / spec.kv_heads;
        prepare(spec.heads + kv);
        for (int64_t head = kv * group; head < (kv + 1) * group; ++head) prepare(head);
        float* own = keys + who * padded(longest) * (dim() + 1);
        for (int64_t sequence = 0; sequence < sequences; ++sequence) {
            const int64_t begin = bounds[sequence], length = bounds[sequence + 1] - begin;
            const float* key = qkv + begin * stride() + (spec.heads + kv) * dim();
            for (int64_t d = 0; d < dim(); ++d)
                for (int64_t j = 0; j < padded(length); ++j)
                    own[d * padded(length) + j] = j < length ? key[j * stride() + d] : 0.0f;
            for (int64_t head = kv * group; head < (kv + 1) * group; ++head)
                for (int64_t i = 0; i < length; ++i)
                    token(head, i, begin, length, own, key + spec.kv_heads * dim());
        }
    }

    static int64_t padded(int64_t length) { return (length + WIDTH - 1) / WIDTH * WIDTH; }

    void token(int64_t head, int64_t i, int64_t begin, int64_t length, const float* columns, const float* value) const {
        const int64_t size = padded(length);
        const float* query = qkv + (begin + i) * stride() + head * dim();
        float* scores = const_cast<float*>(columns) + dim() * size;
        // The keys that this token sees.
        int64_t from = 0, end = spec.causal ? i + 1 : length;
        if (block.window >= 0) {
            from = i > block.window ? i - block.window : 0;
            end = i + block.window + 1 < end ? i + block.window + 1 : end;
        }
        for (int64_t j = 0; j < size; j += WIDTH) {
            V sum = lanes::zero();
            for (int64_t d = 0; d < dim(); ++d)
                sum = lanes::multiply_add(lanes::all(query[d]), lanes::load(columns + d * size + j), sum);
            lanes::store(scores + j, lanes::mul(sum, lanes::all(spec.scale)));
        }
        if (bias != nullptr)
            for (int64_t j = from; j < end; ++j) scores[j] += bias[(head * longest + i) * longest + j];
        for (int64_t j = 0; j < from; ++j) scores[j] = -INFINITY;
        for (int64_t j = end; j < size; ++j) scores[j] = -INFINITY;
        V most = lanes::load(scores);
        for (int64_t j = WIDTH; j < size; j += WIDTH) most = lanes::larger(most, lanes::load(scores + j));
        const V top = lanes::all(lanes::largest(most));
        V sum = lanes::zero();
        for (int64_t j = 0; j < size; j += WIDTH) {
            const V below = lanes::subtract(lanes::load(scores + j), top);
            const V weight = lanes::power_of_2<5>(lanes::mul(below, lanes::all(LOG2_E)));
            sum = lanes::add(sum, weight);
            lanes::store(scores + j, weight);
        }
        const V share = lanes::all(1.0f / lanes::sum(sum));
        for (int64_t d = 0; d < dim(); d += WIDTH) {
            V mixed = lanes::zero();
            for (int64_t j = from; j < end; ++j)
                mixed = lanes::multiply_add(lanes::all(scores[j]), lanes::load(value + j * stride() + d), mixed);
            lanes::store(to + (begin + i) * spec.heads * dim() + head * dim() + d, lanes::mul(mixed, share));
        }
    }
};

template <class Operand>
void run(const Spec& spec, const Block* blocks, int64_t count, float* x, int64_t rows, const int64_t* bounds,
         int64_t sequences, const float* bias, int64_t longest, float* room, int64_t helpers) {
    team::Leader leader(helpers);
    const int64_t attended = spec.heads * spec.head_dim, joined = attended + 2 * spec.kv_heads * spec.head_dim;
    const int64_t inner = spec.gated ? 2 * spec.inner : spec.inner;
    // wide: query, key and value, or both halves of a gated layer. narrow: what enters a product.
    float* wide = room;
    float* keys = wide + rows * (joined > inner ? joined : inner);
    const int64_t padded = Attention<Operand>::padded(longest);
    auto* narrow = reinterpret_cast<Operand*>(keys + (team::MOST_HELPERS + 1) * padded * (spec.head_dim + 1));
    for (const Block* block = blocks; block < blocks + count; ++block) {
        operand(spec, block->attn_in, x, narrow, rows);
        multiply(leader, block->qkv, narrow, rows, Target<float>{wide, joined, nullptr, 0});
        leader.each(spec.kv_heads, Attention<Operand>{
            spec, *block, wide, rows, bounds, sequences, bias, longest, keys, narrow});
        multiply(leader, block->out, narrow, rows, Target<float>{x, spec.hidden, x, 0});
        if (block->attn_post.weight != nullptr)
            for (int64_t row = 0; row < rows; ++row)
                normalized(spec, block->attn_post, x + row * spec.hidden, x + row * spec.hidden, spec.hidden);
        operand(spec, block->ffn_in, x, narrow, rows);
        auto* hidden = reinterpret_cast<Operand*>(wide);
        if (spec.gated) {
            multiply(leader, block->up, narrow, rows, Target<float>{wide, inner, nullptr, 0});
            hidden = narrow;
            for (int64_t row = 0; row < rows; ++row) {
                const float* gate = wide + row * inner;
                for (int64_t i = 0; i < spec.inner; i += WIDTH)
                    lanes::store(hidden + row * spec.inner + i,
                                 lanes::mul(lanes::activated(lanes::load(gate + i), spec.activation), lanes::load(gate + spec.inner + i)));
            }
        } else {
            multiply(leader, block->up, narrow, rows, Target<Operand>{hidden, inner, nullptr, spec.activation});
        }
        multiply(leader, block->down, hidden, rows, Target<float>{x, spec.hidden, x, 0});
        if (block->ffn_post.weight != nullptr)
            for (int64_t row = 0; row < rows; ++row)
                normalized(spec, block->ffn_post, x + row * spec.hidden, x + row * spec.hidden, spec.hidden);
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

// x: [rows, hidden], which becomes the answer of the last block. bounds: [sequences + 1]. room: as `models/native/few_rows.py` counts it.
// helpers: how many threads may help.
KERNEL void poolhouse_blocks(const void* spec, const void* blocks, int64_t count, float* x, int64_t rows,
                             const int64_t* bounds, int64_t sequences, const float* bias, int64_t longest, float* room,
                             int64_t helpers) {
#ifdef __AVX512F__
    const auto& own = *static_cast<const Spec*>(spec);
    const auto* all = static_cast<const Block*>(blocks);
    if (own.half) run<uint16_t>(own, all, count, x, rows, bounds, sequences, bias, longest, room, helpers);
    else run<float>(own, all, count, x, rows, bounds, sequences, bias, longest, room, helpers);
#else
    (void)spec, (void)blocks, (void)count, (void)x, (void)rows, (void)bounds, (void)sequences, (void)bias, (void)longest, (void)room, (void)helpers;
#endif
}
