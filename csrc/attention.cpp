#include "attention.h"

#include <vector>

#include "crystals.h"
#include "kernels.h"

namespace crystalformer {

namespace {

constexpr int64_t BLOCK_PAIRS = 1 << 14;  // pairs whose sums the backward keeps: 512 KiB of each in fp32

// q, k, v and, for the backward, grad_y with the heads last.
template <class T>
struct Grouped {
    Buffer<T> q, k, v, grad_y;

    Grouped(const AttentionInputs<T>& in, const T* grad, const Threads& threads)
        : q(size(in, in.dim)),
          k(size(in, in.dim)),
          v(size(in, in.value_dim)),
          grad_y(grad ? size(in, in.value_dim) : 0) {
        threads.for_chunks(in.atoms, 32, [&] {
            return [&](int64_t first, int64_t last) {
                const auto group = kernels<T>().group_heads;
                group(in.q, first, last, in.heads, in.dim, q.data());
                group(in.k, first, last, in.heads, in.dim, k.data());
                group(in.v, first, last, in.heads, in.value_dim, v.data());
                if (grad) group(grad, first, last, in.heads, in.value_dim, grad_y.data());
            };
        });
    }
    static int64_t size(const AttentionInputs<T>& in, int dim) { return in.atoms * groups_of(in.heads) * dim * 8; }
};

// Runs a kernel over some rows, each thread with scratch memory of its own.
template <class T, class Kernel>
void for_rows(const AttentionRows<T>& rows, int64_t begin, int64_t end, Kernel kernel, const Threads& threads) {
    threads.for_chunks(end - begin, AttentionRows<T>::TOGETHER, [&] {
        return [&, scratch = Buffer<T>(rows.scratch)](int64_t first, int64_t last) mutable {
            kernel(rows, begin + first, begin + last, scratch.data());
        };
    });
}

// See the kernel; `width` numbers of an atom.
template <class T>
void pass_on_nan(const AttentionInputs<T>& in, const T* x, int width, T* y, const Threads& threads) {
    threads.for_chunks(in.crystals, 16, [&] {
        return [&](int64_t first, int64_t last) { kernels<T>().pass_on_nan(x, in.ptr, first, last, width, y); };
    });
}

template <class T>
int64_t scratch_size(const AttentionInputs<T>& in) {
    int64_t slots = 0, images = 0;
    for (int64_t i = 0; i < in.atoms; ++i) {
        slots = std::max(slots, in.layout.pair_ptr[i + 1] - in.layout.pair_ptr[i]);
        images = std::max(images, in.layout.entry_ptr[i + 1] - in.layout.entry_ptr[i]);
    }
    const int products = AttentionRows<T>::TOGETHER * std::max(tiled(in.value_dim), in.heads * tiled(in.window.num));
    return 32 * in.window.size + 8 * in.window.padded() + 17 * slots + images + 8 * std::max(in.dim, in.value_dim) +
           products;
}

// Where blocks of rows with about BLOCK_PAIRS pairs start, and the end.
template <class T>
std::vector<int64_t> row_blocks(const AttentionInputs<T>& in) {
    std::vector<int64_t> blocks = {0};
    for (int64_t i = 0; i < in.atoms; ++i)
        if (in.layout.pair_ptr[i + 1] - in.layout.pair_ptr[blocks.back()] >= BLOCK_PAIRS) blocks.push_back(i + 1);
    if (blocks.back() < in.atoms) blocks.push_back(in.atoms);
    return blocks;
}

}  // namespace

template <class T>
void attention(const AttentionInputs<T>& in, const AttentionOutputs<T>& out, const Threads& threads) {
    const Grouped<T> grouped(in, nullptr, threads);
    const auto weight = weight_by_basis(in.edge_weight, in.heads, in.value_dim, in.window.num);
    const AttentionRows<T> rows{.in = in,
                                .out = out,
                                .q = grouped.q.data(),
                                .k = grouped.k.data(),
                                .v = grouped.v.data(),
                                .weight = weight.data(),
                                .scratch = scratch_size(in)};
    for_rows(rows, 0, in.atoms, kernels<T>().attention_rows, threads);
    pass_on_nan(in, in.v, in.heads * in.value_dim, out.y, threads);
}

template <class T>
void attention_backward(const AttentionOutputs<const T>& grad, const AttentionInputs<T>& in,
                        const AttentionOutputs<const T>& out, const AttentionGrads<T>& result, const Threads& threads) {
    const Grouped<T> grouped(in, grad.y, threads);
    const auto weight = weight_by_value(in.edge_weight, in.heads, in.value_dim, in.window.num);
    const int64_t pairs = in.layout.pair_ptr[in.atoms], groups = groups_of(in.heads);
    const bool geometry = result.positions;
    const std::vector<int64_t> blocks = row_blocks(in);
    int64_t most_pairs = 0;
    for (size_t b = 0; b + 1 < blocks.size(); ++b)
        most_pairs = std::max(most_pairs, in.layout.pair_ptr[blocks[b + 1]] - in.layout.pair_ptr[blocks[b]]);
    Buffer<T> pair_p(groups * most_pairs * 8), pair_ds(groups * most_pairs * 8), reach2(in.atoms * groups);
    Buffer<T> grad_k(Grouped<T>::size(in, in.dim)), grad_v(Grouped<T>::size(in, in.value_dim));
    Buffer<T> pair_force(geometry ? 3 * pairs : 0), row_lattice(geometry ? 9 * in.atoms : 0);
    const std::vector<int64_t> crystal = crystal_of_atom(in.ptr, in.crystals);
    std::vector<int64_t> next_pair(in.layout.pair_ptr, in.layout.pair_ptr + in.atoms);
    AttentionRows<T> rows{
        .in = in,
        .saved = out,
        .grad = grad,
        .result = result,
        .q = grouped.q.data(),
        .k = grouped.k.data(),
        .v = grouped.v.data(),
        .grad_y = grouped.grad_y.data(),
        .weight = weight.data(),
        .block_pairs = most_pairs,
        .pair_p = pair_p.data(),
        .pair_ds = pair_ds.data(),
        .next_pair = next_pair.data(),
        .grad_k = grad_k.data(),
        .grad_v = grad_v.data(),
        .reach2 = reach2.data(),
        .crystal = crystal.data(),
        .pair_force = geometry ? pair_force.data() : nullptr,
        .row_lattice = row_lattice.data(),
        .scratch = scratch_size(in),
    };
    for (size_t b = 0; b + 1 < blocks.size(); ++b) {
        rows.first_row = blocks[b];
        rows.last_row = blocks[b + 1];
        rows.first_pair = in.layout.pair_ptr[rows.first_row];
        for_rows(rows, rows.first_row, rows.last_row, kernels<T>().attention_backward_rows, threads);
        for_rows(rows, in.ptr[crystal[rows.first_row]], in.ptr[crystal[rows.last_row - 1] + 1],
                 kernels<T>().attention_backward_columns, threads);
    }
    for_rows(rows, 0, in.atoms, kernels<T>().attention_backward_finish, threads);
    pass_on_nan(in, in.k, in.heads * in.dim, result.q, threads);
    pass_on_nan(in, in.q, in.heads * in.dim, result.k, threads);
    pass_on_nan(in, grad.y, in.heads * in.value_dim, result.v, threads);
    threads.for_chunks(in.heads, 1, [&] {
        return [&](int64_t first, int64_t last) {
            kernels<T>().sum_outer_products(grad.y, out.c, in.atoms, in.heads, in.value_dim, in.window.num, first, last,
                                            result.edge_weight);
        };
    });
    if (!geometry) return;
    kernels<T>().gather_force_rows(in.layout, pair_force.data(), 0, in.atoms, result.positions);
    sum_by_crystal(row_lattice.data(), in.ptr, in.crystals, result.lattice);
}

#define INSTANTIATE(T)                                                                              \
    template void attention(const AttentionInputs<T>&, const AttentionOutputs<T>&, const Threads&); \
    template void attention_backward(const AttentionOutputs<const T>&, const AttentionInputs<T>&,   \
                                     const AttentionOutputs<const T>&, const AttentionGrads<T>&, const Threads&);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace crystalformer
