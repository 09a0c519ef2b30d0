// Int8 layers: products of a weight in int8 with rows of float32, in blocks that stay in cache while they meet the weight.

#include "int8.h"
#include "parallel.h"
#include "scratch.h"

namespace {

using namespace int8;

// Of quantised rows.
thread_local Scratch scratch;

// The answers of up to BLOCK rows in some panels.
void block(const Rows& rows, const Weight& weight, int64_t activation, int64_t first, int64_t last) {
    auto* elements = reinterpret_cast<Element*>(scratch.of(rows.count * weight.width * sizeof(Element)));
    Steps steps;
    for (int64_t r = 0; r < rows.count; ++r)
        quantise(rows.x + r * rows.x_stride, weight.in, weight.width, elements + r * weight.width, steps, r);
    for (int64_t panel = first; panel < last; ++panel) {
        lanes::with_activation(activation, [&](auto kind) { tiles<kind.value>(elements, steps, rows, weight, panel); });
    }
}

}  // namespace

// Writes how a weight is laid out, [panels][groups][columns][group]: the columns of a panel, the elements of a group.
KERNEL void int8_layout(int64_t* sizes) {
    sizes[0] = PANEL;
    sizes[1] = GROUP;
}

// y = activation(x @ weight.T + bias), or residual + x @ weight.T + bias.
// x: [rows, in]; y: [rows, out]; residual: as y, or null. Strides count floats between rows; the last dimension is dense.
// packed: see int8_layout. steps, bias: [panels * columns]. totals: as many, the sums of each output's whole numbers.
KERNEL void int8_linear(const float* x, int64_t x_stride, int64_t rows, int64_t in, int64_t out, const int8_t* packed,
                        const float* steps, const int32_t* totals, const float* bias, int64_t activation,
                        const float* residual, int64_t residual_stride, float* y, int64_t y_stride, int64_t threads) {
    const Weight weight{in, out, (in + GROUP - 1) / GROUP * GROUP, packed, steps, totals, bias};
    const Rows all_rows{x, residual, y, rows, x_stride, residual_stride, y_stride};
    const int64_t panels = weight.panels();
    if (threads > 1 && rows <= BLOCK) {
        // Few rows: each thread quantises all of them, and writes some of the columns.
        const int64_t teams = threads < panels ? threads : panels;
        parallel::each(teams, threads, [&](int64_t team) {
            block(all_rows, weight, activation, panels * team / teams, panels * (team + 1) / teams);
        });
        return;
    }
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
    parallel::each(blocks, threads, [&](int64_t number) {
        const int64_t start = rows * number / blocks, end = rows * (number + 1) / blocks;
        block(all_rows.from(start, end - start), weight, activation, 0, panels);
    });
}
