// Embed: for each token a row of every table, added up and normed, in one pass over memory.
//
//     tokens[id] * scale + types[type] + positions[position + offset] --norm--> row
//
// Every operation is rounded as torch's own are, one after another.

#include "norms.h"
#include "parallel.h"

namespace {

using namespace norms;

// Features that are worth waking another thread for.
constexpr int64_t WORTH_A_THREAD = 1 << 17;

struct Table {
    const float* rows;  // [count, width]; null: there is none
    int64_t count;
};

struct Tables {
    Table tokens, types, positions;
    const float *weight, *bias;  // of the norm; null: there is no norm, or no bias
    int64_t width, offset, root_mean_square;
    float scale, eps;
};

}  // namespace

// tables: as above. ids, types, positions: [rows]; types: null where all are 0. to: [rows, width].
// found: 1, or 0 where a number is in no table; what is written is then incomplete.
KERNEL void poolhouse_embed(const void* tables, int64_t rows, const int64_t* ids, const int64_t* types,
                            const int64_t* positions, float* to, int64_t* found, int64_t threads) {
    const Tables& own = *static_cast<const Tables*>(tables);
    const int64_t width = own.width;
    std::atomic<bool> missing{false};
    parallel::ranges(rows, threads, rows * width / WORTH_A_THREAD, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const float* parts[3];
            int64_t count = 0;
            const auto take = [&](const Table& table, int64_t number) {
                if (table.rows == nullptr) return true;
                parts[count++] = table.rows + number * width;
                return number >= 0 && number < table.count;
            };
            if (!take(own.tokens, ids[row]) || !take(own.types, types == nullptr ? 0 : types[row]) ||
                !take(own.positions, positions[row] + own.offset)) {
                missing = true;
                return;
            }
            float* answer = to + row * width;
            for (int64_t at = 0; at < width; at += WIDTH) {
                V x = load(parts[0] + at);
                if (own.scale != 1.0f) x = mul(x, all(own.scale));
                for (int64_t part = 1; part < count; ++part) x = add(x, load(parts[part] + at));
                store(answer + at, x);
            }
            if (own.weight == nullptr) continue;
            if (own.root_mean_square)
                rms_row<float, false>(answer, width, own.weight, rms_factor(answer, width, own.eps), answer);
            else layer_row(answer, width, own.weight, own.bias, own.eps, answer);
        }
    });
    *found = !missing;
}
