#include "attention.h"

#include "crystals.h"
#include "kernels.h"
#include "memory.h"

namespace crystalformer {

namespace {

constexpr int64_t ROWS = 4;  // rows that a thread takes at once

template <class T>
Buffer<T> grouped(const T* x, int64_t atoms, int heads, int dim, const Threads& threads) {
    Buffer<T> result(atoms * groups_of(heads) * dim * 8);
    threads.for_chunks(atoms, 64, [&] {
        return [&](int64_t first, int64_t last) {
            kernels<T>().group_heads(x, first, last, heads, dim, result.data());
        };
    });
    return result;
}

// Runs a kernel over all rows, each thread with scratch memory of its own.
template <class T, class Kernel>
void for_rows(const AttentionRows<T>& rows, Kernel kernel, const Threads& threads) {
    threads.for_chunks(rows.in.atoms, ROWS, [&] {
        return [&, scratch = Buffer<T>(rows.scratch)](int64_t first, int64_t last) mutable {
            kernel(rows, first, last, scratch.data());
        };
    });
}

template <class T>
int64_t scratch_size(const AttentionInputs<T>& in) {
    int64_t slots = 0, images = 0;
    for (int64_t i = 0; i < in.atoms; ++i) {
        slots = std::max(slots, in.layout.pair_ptr[i + 1] - in.layout.pair_ptr[i]);
        images = std::max(images, in.layout.entry_ptr[i + 1] - in.layout.entry_ptr[i]);
    }
    return 32 * in.window.size + 8 * in.window.padded() + 16 * slots + images;
}

}  // namespace

template <class T>
void attention(const AttentionInputs<T>& in, const AttentionOutputs<T>& out, const Threads& threads) {
    const auto q = grouped(in.q, in.atoms, in.heads, in.dim, threads);
    const auto k = grouped(in.k, in.atoms, in.heads, in.dim, threads);
    const auto v = grouped(in.v, in.atoms, in.heads, in.value_dim, threads);
    AttentionRows<T> rows{.in = in, .out = out, .q = q.data(), .k = k.data(), .v = v.data(), .scratch = scratch_size(in)};
    for_rows(rows, kernels<T>().attention_rows, threads);
}

template <class T>
void attention_backward(const AttentionOutputs<const T>& grad, const AttentionInputs<T>& in,
                        const AttentionOutputs<const T>& out, const AttentionGrads<T>& result, const Threads& threads) {
    const auto q = grouped(in.q, in.atoms, in.heads, in.dim, threads);
    const auto k = grouped(in.k, in.atoms, in.heads, in.dim, threads);
    const auto v = grouped(in.v, in.atoms, in.heads, in.value_dim, threads);
    const auto grad_o = grouped(grad.o, in.atoms, in.heads, in.value_dim, threads);
    const int64_t pairs = in.layout.pair_ptr[in.atoms], groups = groups_of(in.heads);
    const bool geometry = result.positions;
    Buffer<T> pair_p(groups * pairs * 8), pair_ds(groups * pairs * 8), pair_force(geometry ? 3 * pairs : 0);
    Buffer<T> row_lattice(geometry ? 9 * in.atoms : 0);
    const std::vector<int64_t> crystal = crystal_of_atom(in.ptr, in.crystals);
    const AttentionRows<T> rows{
        .in = in,
        .saved = out,
        .grad = grad,
        .result = result,
        .q = q.data(),
        .k = k.data(),
        .v = v.data(),
        .grad_o = grad_o.data(),
        .pair_p = pair_p.data(),
        .pair_ds = pair_ds.data(),
        .crystal = crystal.data(),
        .pair_force = geometry ? pair_force.data() : nullptr,
        .row_lattice = row_lattice.data(),
        .scratch = scratch_size(in),
    };
    for_rows(rows, kernels<T>().attention_backward_rows, threads);
    for_rows(rows, kernels<T>().attention_backward_columns, threads);
    if (geometry) sum_by_crystal(row_lattice.data(), in.ptr, in.crystals, result.lattice);
}

#define INSTANTIATE(T)                                                                                           \
    template void attention(const AttentionInputs<T>&, const AttentionOutputs<T>&, const Threads&);              \
    template void attention_backward(const AttentionOutputs<const T>&, const AttentionInputs<T>&,                \
                                     const AttentionOutputs<const T>&, const AttentionGrads<T>&, const Threads&);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace crystalformer
