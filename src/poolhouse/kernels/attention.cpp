// Attention of a whole pack: pieces of work, by the caller's thread or by several.

#include "attention.h"
#include "parallel.h"

namespace {

using namespace attention;

// COARSE: stored in float32, multiplied in bfloat16 where the CPU can.
enum Type : int64_t { FLOAT32, BFLOAT16, COARSE };

// Multiplications that are worth waking another thread for.
constexpr int64_t WORTH_A_THREAD = 1 << 19;

// How many threads a call is worth, of those that there are.
int64_t worth(const Call& call, int64_t threads) {
    if (threads < 2) return 1;
    int64_t pairs = 0;
    for (int64_t number = 0; number < call.count; ++number) {
        const Segment& segment = call.segments[number];
        const int64_t keys = segment.prefix_length + segment.keys, seen = 2 * call.window + 1;
        pairs += segment.length * (call.window >= 0 && seen < keys ? seen : keys);
    }
    const int64_t most = 2 * pairs * call.heads * call.head_dim / WORTH_A_THREAD;
    return most < 1 ? 1 : most < threads ? most : threads;
}

template <class Number, class Kind>
void attend(const Call& call, int64_t threads) {
    const int64_t rows = Work<Number, Kind>::most_rows(call);
    threads = worth(call, threads);
    if (threads < 2) {
        Work<Number, Kind> work(call);
        for (int64_t number = 0; number < call.count; ++number) {
            const Segment& segment = call.segments[number];
            for (int64_t first = 0; first < segment.length; first += rows) {
                const int64_t last = first + rows < segment.length ? first + rows : segment.length;
                for (int64_t head = 0; head < call.kv_heads; ++head) work.run(segment, head, first, last);
            }
        }
        return;
    }
    // Which sequence a piece belongs to: the number of pieces before each.
    auto* before = static_cast<int64_t*>(std::malloc((call.count + 1) * sizeof(int64_t)));
    if (before == nullptr) std::abort();
    before[0] = 0;
    for (int64_t number = 0; number < call.count; ++number)
        before[number + 1] = before[number] + (call.segments[number].length + rows - 1) / rows;
    parallel::each(before[call.count] * call.kv_heads, threads, [&](int64_t turn) {
        const int64_t piece = turn / call.kv_heads;
        int64_t low = 0, high = call.count - 1;
        while (low < high) {
            const int64_t middle = (low + high + 1) / 2;
            if (before[middle] <= piece) low = middle;
            else high = middle - 1;
        }
        const Segment& segment = call.segments[low];
        const int64_t first = (piece - before[low]) * rows;
        const int64_t last = first + rows < segment.length ? first + rows : segment.length;
        Work<Number, Kind>(call).run(segment, turn % call.kv_heads, first, last);
    });
    std::free(before);
}

}  // namespace

// See poolhouse/layers/attention/compiled.py. type: see Type; how the pack is stored, and how it is multiplied. segments: [count, 5], as Segment. head_dim: a multiple of 8. scale: above 0.
// bias: [heads, longest, longest], or null.
KERNEL void poolhouse_attention(const void* query, const void* key, const void* value, void* out, int64_t query_row,
                                int64_t query_head, int64_t key_row, int64_t key_head, int64_t value_row,
                                int64_t value_head, int64_t out_row, int64_t out_head, const int64_t* segments,
                                int64_t count, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t window,
                                int64_t causal, float scale, const float* bias, int64_t longest, int64_t type,
                                int64_t threads) {
    const Call call{query,     key,        value,   out,      query_row,
                    query_head, key_row,   key_head, value_row, value_head,
                    out_row,   out_head,   reinterpret_cast<const Segment*>(segments),
                    count,     heads,      kv_heads, head_dim, window,
                    causal != 0, scale * LOG2_E, bias, longest};
    switch (type) {
        case BFLOAT16: return attend<uint16_t, BestPairs>(call, threads);
        case COARSE: return attend<float, BestPairs>(call, threads);
        default: return attend<float, Floats>(call, threads);
    }
}
