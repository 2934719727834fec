// The encodings of the pairs of some rows: attention over one pair's images, with no content score.
#pragma once

#include "forces.h"
#include "heads.h"
#include "kernels.h"
#include "shells.h"

namespace crystalformer::LEVEL {

// Equations (6) and (7).
template <class T>
void encoding_rows(const EncodingRows<T>& x, int64_t first, int64_t last, T* scratch) {
    const EncodingInputs<T>& in = x.in;
    const Layout<T>& layout = in.layout;
    const int padded = in.window.padded(), num = in.window.num, values = tiled(in.value_dim);
    T* basis = scratch;
    T* c = basis + BLOCK * in.window.size;
    T* beta = c + HEADS * padded;
    T slot[HEADS], slot_sum[HEADS];
    const T log2_tol = T(__builtin_log2(in.tol));
    for (int64_t i = first; i < last; ++i)
        for (int g = 0; g < groups_of(in.heads); ++g) {
            const Heads<T> decay = load_heads(in.decay + i * in.heads, in.heads, g, T(PADDING_DECAY)) * T(LOG2_E);
            for (int64_t pair = layout.pair_ptr[i]; pair < layout.pair_ptr[i + 1]; ++pair) {
                const Heads<T> norm = decay * -layout.pair_near2[pair];
                const Weights<T> w = prepare(layout, pair, decay, norm * T(-1), log2_tol);
                w.slot_factor(Heads<T>::all(0)).store(slot);
                for (int m = 0; m < HEADS * padded; ++m) c[m] = 0;
                Heads<T>::all(0).store(slot_sum);
                sum_segment(layout, in.window, w, slot, slot_sum, c, basis);
                store_heads((log2(Heads<T>::load(slot_sum)) + norm) * T(LN_2), in.heads, g,
                            x.out.alpha + pair * in.heads);
                for (int h = 0; h < HEADS && HEADS * g + h < in.heads && values; ++h) {
                    const int64_t head = HEADS * g + h;
                    for (int d = 0; d < values; ++d) beta[d] = 0;
                    add_rows<1>(x.weight_by_basis + head * num * values, num, values,
                                c + h * padded + in.window.half + 1, 0, 1, beta, 0);
                    T* to = x.out.beta + (pair * in.heads + head) * in.value_dim;
                    for (int d = 0; d < in.value_dim; ++d) to[d] = slot_sum[h] == 0 ? T(0) : beta[d] / slot_sum[h];
                }
            }
        }
}

// Equation (B11). Adds the rows' part of the gradient of the weight to `grad_weight` (H,Dv,tiled K).
template <class T>
void encoding_backward_rows(const EncodingRows<T>& x, int64_t first, int64_t last, T* grad_weight, T* scratch) {
    const EncodingInputs<T>& in = x.in;
    const Layout<T>& layout = in.layout;
    const int padded = in.window.padded(), num = in.window.num, columns = tiled(num), begin = in.window.half + 1;
    T* basis = scratch;
    T* c = basis + BLOCK * in.window.size;
    T* u = c + HEADS * padded + TILE;  // c is read in whole tiles
    T* u_head = u + HEADS * padded;
    T* slope = x.pair_force ? u_head + columns : nullptr;
    T slot[HEADS], content[HEADS], slot_p[HEADS], slot_ds[HEADS];
    const T log2_tol = T(__builtin_log2(in.tol));
    for (int m = 0; m < BLOCK * in.window.size; ++m) basis[m] = 0;  // dot_products reads past the last shell
    for (int m = 0; m < HEADS * padded; ++m) u[m] = 0;
    for (int64_t i = first; i < last; ++i) {
        if (slope)
            for (int m = 0; m < 9; ++m) x.row_lattice[9 * i + m] = 0;
        for (int64_t pair = layout.pair_ptr[i]; pair < layout.pair_ptr[i + 1]; ++pair) {
            const int64_t members = layout.entry_ptr[pair + 1] - layout.entry_ptr[pair];
            if (slope)
                for (int64_t m = 0; m < members; ++m) slope[m] = 0;
            for (int g = 0; g < groups_of(in.heads); ++g) {
                const int64_t head = pair * in.heads + HEADS * g;
                const int real = in.heads - HEADS * g < HEADS ? in.heads - HEADS * g : HEADS;
                for (int h = 0; h < HEADS; ++h) {
                    content[h] = 0;
                    for (int m = 0; m < columns; ++m) u_head[m] = 0;
                    if (h < real) {
                        const T* grad_beta = x.grad.beta + (head + h) * in.value_dim;
                        add_rows<1>(x.weight + int64_t(HEADS * g + h) * in.value_dim * columns, in.value_dim, columns,
                                    grad_beta, 0, 1, u_head, 0);
                        content[h] = x.grad.alpha[head + h] -
                                     dot_flat(grad_beta, x.saved.beta + (head + h) * in.value_dim, in.value_dim);
                    }
                    for (int m = 0; m < num; ++m) u[HEADS * (begin + m) + h] = u_head[m];
                }
                Transposed<T> t;
                t.decay = load_heads(in.decay + i * in.heads, in.heads, g, T(PADDING_DECAY));
                t.slots = slot;
                t.content = content;
                t.u = u;
                t.slot_p = slot_p;
                t.slot_ds = slot_ds;
                t.c = num ? c : nullptr;
                t.slope = slope;
                t.grad_decay = pair == layout.pair_ptr[i]
                                   ? Heads<T>::all(0)
                                   : load_heads(x.result.decay + i * in.heads, in.heads, g, T(0));
                const Heads<T> norm = load_heads(x.saved.alpha + pair * in.heads, in.heads, g, T(0)) * T(LOG2_E);
                const Heads<T> zero = Heads<T>::all(0);
                const Weights<T> w = prepare(layout, pair, t.decay * T(LOG2_E), norm * T(-1), log2_tol);
                w.slot_factor(zero).store(slot);
                zero.store(slot_p);
                zero.store(slot_ds);
                T shown[HEADS];  // zero, or NaN that every basis function has to show
                (norm * T(0)).store(shown);
                for (int h = 0; h < HEADS; ++h)
                    for (int m = 0; m < padded; ++m) c[h * padded + m] = shown[h];
                transpose_segment(layout, in.window, w, t, basis);
                store_heads(t.grad_decay, in.heads, g, x.result.decay + i * in.heads);
                for (int h = 0; h < real; ++h)
                    for (int d = 0; d < in.value_dim; ++d)
                        add_rows<1>(c + h * padded + begin, 1, columns, x.grad.beta + (head + h) * in.value_dim + d, 0,
                                    1, grad_weight + (int64_t(HEADS * g + h) * in.value_dim + d) * columns, 0);
            }
            if (slope)
                add_forces(layout, in.positions, in.lattice + 9 * x.crystal[i], in.shift, pair, 1,
                           layout.pair_col + pair, i, slope, x.pair_force + 3 * pair, x.row_lattice + 9 * i);
        }
    }
}

// The gradient of the positions, gathered over the mirror images of each pair.
template <class T>
void gather_force_rows(const Layout<T>& layout, const T* pair_force, int64_t first, int64_t last, T* positions) {
    for (int64_t i = first; i < last; ++i) {
        const int64_t pair = layout.pair_ptr[i], n = layout.pair_ptr[i + 1] - pair;
        gather_forces(pair_force, pair, n, layout.pair_mirror + pair, positions + 3 * i);
    }
}

}  // namespace crystalformer::LEVEL
