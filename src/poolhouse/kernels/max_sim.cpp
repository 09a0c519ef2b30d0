// MaxSim: the late-interaction score of a query with documents; products become maxima in registers and are never stored.
//
// A lane is a row of the query. A tile multiplies ROWS rows of a document with VECTORS registers of rows of the query and
// keeps the largest product of each lane. A document is read once for every so many rows of a query, part by part.

#include <cmath>
#include <cstdlib>

#include "lanes.h"
#include "parallel.h"

namespace {

using namespace lanes;

// Bytes of a document that stay in the nearest cache while all rows of the query pass over them.
constexpr int64_t PART = 16384;
// Multiplications that are worth starting another thread for: a few milliseconds of work.
constexpr int64_t WORTH_A_THREAD = int64_t(1) << 27;

// The maxima so far, [N vectors], with those of up to ROWS rows; a tile beyond the end takes the last row again.
template <int N>
void tile(const float* rows, int64_t count, const float* query, int64_t width, float* largest) {
    const float* row[ROWS];
    for (int r = 0; r < ROWS; ++r) row[r] = rows + (r < count ? r : count - 1) * width;
    V sums[ROWS][N];
    for (int r = 0; r < ROWS; ++r)
        for (int n = 0; n < N; ++n) sums[r][n] = zero();
    for (int64_t k = 0; k < width; ++k) {
        V right[N];
        for (int n = 0; n < N; ++n) right[n] = load(query + (n * width + k) * WIDTH);
        for (int r = 0; r < ROWS; ++r) {
            const V left = all(row[r][k]);
            for (int n = 0; n < N; ++n) sums[r][n] = multiply_add(left, right[n], sums[r][n]);
        }
    }
    for (int n = 0; n < N; ++n) {
        V most = load(largest + n * WIDTH);
        for (int r = 0; r < ROWS; ++r) most = larger_or_nan(most, sums[r][n]);
        store(largest + n * WIDTH, most);
    }
}

// The score of a document, [rows, width]. query: [vectors, width, WIDTH]. largest: room for the maxima.
float score(const float* document, int64_t rows, int64_t width, const float* query, int64_t query_rows, float* largest) {
    const int64_t vectors = (query_rows + WIDTH - 1) / WIDTH;
    for (int64_t n = 0; n < vectors; ++n) store(largest + n * WIDTH, all(-INFINITY));
    int64_t part = PART / 4 / width / ROWS * ROWS;
    if (part < ROWS) part = ROWS;
    for (int64_t first = 0; first < rows; first += part) {
        const int64_t last = first + part < rows ? first + part : rows;
        for (int64_t n = 0; n < vectors;) {
            const int64_t left = vectors - n, parts = (left + VECTORS - 1) / VECTORS, wide = (left + parts - 1) / parts;
            const float* lanes_of_query = query + n * width * WIDTH;
            for (int64_t row = first; row < last; row += ROWS) {
                const int64_t count = last - row < ROWS ? last - row : ROWS;
                const float* from = document + row * width;
                if (n == 0) expect(from + ROWS * width, (row + 2 * ROWS <= rows ? ROWS : 0) * width * sizeof(float));
                if (wide == 1) tile<1>(from, count, lanes_of_query, width, largest + n * WIDTH);
                else if (wide == 2) tile<2>(from, count, lanes_of_query, width, largest + n * WIDTH);
                else tile<VECTORS>(from, count, lanes_of_query, width, largest + n * WIDTH);
            }
            n += wide;
        }
    }
    V total = zero();
    int64_t row = 0;
    for (; row + WIDTH <= query_rows; row += WIDTH) total = add(total, load(largest + row));
    float sum_of_rest = 0;
    for (; row < query_rows; ++row) sum_of_rest += largest[row];
    return sum(total) + sum_of_rest;
}

}  // namespace

// query: [query_rows, width] floats. documents: the address of each, [rows, width] floats. rows: [count]; scores: [count],
// 0 of a document without rows.
KERNEL void poolhouse_max_sim(const float* query, int64_t query_rows, int64_t width, const float* const* documents,
                              const int64_t* rows, int64_t count, float* scores, int64_t threads) {
    const int64_t vectors = (query_rows + WIDTH - 1) / WIDTH;
    auto* memory = static_cast<float*>(std::malloc((vectors * width * WIDTH + 16) * sizeof(float)));
    if (memory == nullptr) std::abort();
    for (int64_t n = 0; n < vectors; ++n)
        for (int64_t k = 0; k < width; ++k)
            for (int64_t lane = 0; lane < WIDTH; ++lane) {
                const int64_t row = n * WIDTH + lane;
                memory[(n * width + k) * WIDTH + lane] = row < query_rows ? query[row * width + k] : 0.0f;
            }
    int64_t all_rows = 0;
    for (int64_t document = 0; document < count; ++document) all_rows += rows[document];
    const int64_t worth = all_rows * query_rows * width / WORTH_A_THREAD;
    threads = threads < worth ? threads : worth;
    parallel::each_of_its_own(count, threads, [=](int64_t document) {
        float largest[1024];
        const float* from = documents[document];
        scores[document] = rows[document] == 0 ? 0.0f : score(from, rows[document], width, memory, query_rows, largest);
    });
    std::free(memory);
}
