// The sums S of reciprocal attention alone, which alpha is made of.
#pragma once

#include "reciprocal_kernel.h"

namespace crystalformer::LEVEL {

// S of some rows with all atoms of their crystals, (P,H). Equation (13), first part.
template <class T>
void reciprocal_sum_rows(const ReciprocalRows<T>& x, int64_t first, int64_t last, T* scratch) {
    const ReciprocalInputs<T>& in = x.in;
    for (int64_t i = first; i < last; ++i) {
        const ReciprocalCrystal<T>& crystal = x.crystals[x.crystal[i]];
        T* own = scratch;
        T* weight = own + 2 * crystal.vectors;
        T* sums = weight + HEADS * crystal.shells;
        own_phases(in, crystal, i, own);
        for (int first_head = 0; first_head < in.heads; first_head += HEADS) {
            const int real = in.heads - first_head < HEADS ? in.heads - first_head : HEADS;
            reciprocal_weights(crystal, load_heads(in.decay + i * in.heads, in.heads, first_head / HEADS, T(1)),
                               weight);
            if (real > 4)
                sum_vectors<8, false>(crystal, own, weight, 0, sums, sums);
            else
                sum_vectors<4, false>(crystal, own, weight, 0, sums, sums);
            T* to = x.y + x.first_pair[i] * in.heads + first_head;
            for (int64_t j = 0; j < crystal.atoms(); ++j)
                for (int h = 0; h < real; ++h) to[j * in.heads + h] = sums[h * crystal.columns() + j];
        }
    }
}

// From the gradient of S. Equation (B12), second part.
template <class T>
void reciprocal_sum_backward_rows(const ReciprocalRows<T>& x, int64_t first, int64_t last, T* scratch) {
    const int heads = x.in.heads;
    backward_rows(x, first, last, scratch, [&](const ReciprocalCrystal<T>& crystal, int64_t i, int h, T* sum, T*) {
        const T* grad = x.grad + x.first_pair[i] * heads + h;
        for (int64_t j = 0; j < crystal.columns(); ++j) sum[j] = j < crystal.atoms() ? grad[j * heads] : T(0);
    });
}

template <class T>
void reciprocal_sum_backward_columns(const ReciprocalRows<T>& x, int64_t first, int64_t last, T*) {
    for (int64_t j = first; j < last; ++j) {
        const ReciprocalCrystal<T>& crystal = x.crystals[x.crystal[j]];
        add_column_force(x, crystal, j, block_begin(x, crystal), block_end(x, crystal));
    }
}

}  // namespace crystalformer::LEVEL
