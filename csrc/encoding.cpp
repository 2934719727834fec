#include "encoding.h"

#include "crystals.h"
#include "kernels.h"
#include "weight.h"

namespace crystalformer {

namespace {

template <class T>
int64_t scratch_size(const EncodingInputs<T>& in) {
    int64_t images = 0;
    for (int64_t s = 0; s < in.layout.segments; ++s)
        images = std::max(images, in.layout.entry_ptr[s + 1] - in.layout.entry_ptr[s]);
    const int tiles = tiled(in.value_dim) + tiled(in.window.num) + Window::TILE;
    return 32 * in.window.size + 16 * in.window.padded() + tiles + images;
}

}  // namespace

template <class T>
void encoding(const EncodingInputs<T>& in, const EncodingOutputs<T>& out, const Threads& threads) {
    const int64_t values = in.value_dim, num = in.window.num;
    const auto weight = weight_by_basis(in.edge_weight, in.heads, values, num);
    const EncodingRows<T> rows{.in = in, .out = out, .weight_by_basis = weight.data(), .scratch = scratch_size(in)};
    threads.for_chunks(in.atoms, 1, [&] {
        return [&, scratch = Buffer<T>(rows.scratch)](int64_t first, int64_t last) mutable {
            kernels<T>().encoding_rows(rows, first, last, scratch.data());
        };
    });
}

template <class T>
void encoding_backward(const EncodingOutputs<const T>& grad, const EncodingInputs<T>& in,
                       const EncodingOutputs<const T>& out, const EncodingGrads<T>& result, const Threads& threads) {
    const int64_t values = in.value_dim, num = in.window.num, columns = tiled(in.window.num);
    const auto weight = weight_by_value(in.edge_weight, in.heads, values, num);
    const bool geometry = result.positions;
    Buffer<T> pair_force(geometry ? 3 * in.layout.segments : 0), row_lattice(geometry ? 9 * in.atoms : 0);
    const std::vector<int64_t> crystal = crystal_of_atom(in.ptr, in.crystals);
    const EncodingRows<T> rows{
        .in = in,
        .saved = out,
        .grad = grad,
        .result = result,
        .weight = weight.data(),
        .crystal = crystal.data(),
        .pair_force = geometry ? pair_force.data() : nullptr,
        .row_lattice = row_lattice.data(),
        .scratch = scratch_size(in),
    };
    // The gradient of the weight is a sum over all rows: over parts that do not depend on the number of threads.
    constexpr int64_t PARTS = 64;
    const int64_t part_rows = (in.atoms + PARTS - 1) / PARTS, size = in.heads * values * columns;
    const int64_t parts = in.atoms ? (in.atoms + part_rows - 1) / part_rows : 0;
    Buffer<T> grad_weight(parts * size);
    threads.for_chunks(parts, 1, [&] {
        return [&, scratch = Buffer<T>(rows.scratch)](int64_t first, int64_t last) mutable {
            for (int64_t part = first; part < last; ++part) {
                T* sum = grad_weight.data() + part * size;
                std::fill(sum, sum + size, T(0));
                kernels<T>().encoding_backward_rows(rows, part * part_rows, std::min((part + 1) * part_rows, in.atoms),
                                                    sum, scratch.data());
            }
        };
    });
    threads.for_chunks(in.heads * values, 16, [&] {
        return [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row)
                for (int64_t m = 0; m < num; ++m) {
                    T sum = 0;
                    for (int64_t part = 0; part < parts; ++part)
                        sum += grad_weight.data()[part * size + row * columns + m];
                    result.edge_weight[row * num + m] = sum;
                }
        };
    });
    if (!geometry) return;
    kernels<T>().gather_force_rows(in.layout, pair_force.data(), 0, in.atoms, result.positions);
    sum_by_crystal(row_lattice.data(), in.ptr, in.crystals, result.lattice);
}

#define INSTANTIATE(T)                                                                           \
    template void encoding(const EncodingInputs<T>&, const EncodingOutputs<T>&, const Threads&); \
    template void encoding_backward(const EncodingOutputs<const T>&, const EncodingInputs<T>&,   \
                                    const EncodingOutputs<const T>&, const EncodingGrads<T>&, const Threads&);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace crystalformer
