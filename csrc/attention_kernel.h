// Attention of some rows. Equation numbers are those of docs/math.md.
#pragma once

#include "forces.h"
#include "heads.h"
#include "kernels.h"
#include "shells.h"

namespace crystalformer::LEVEL {

// result (heads of the group, dim) of the (H,dim) of one atom = scale * sum_s weight[s] x[atom[s]].
template <class T, class Weight>
INLINE void weighted_sum(const int32_t* atom, int64_t slots, Weight weight, const T* x, int groups, int group, int dim,
                         Heads<T> scale, int heads, T* result) {
    constexpr int WIDE = 8;  // dimensions at once
    for (int d = 0; d < dim; d += WIDE) {
        const int n = dim - d < WIDE ? dim - d : WIDE;
        Heads<T> sum[WIDE];
        for (int k = 0; k < WIDE; ++k) sum[k] = Heads<T>::all(0);
        for (int64_t s = 0; s < slots; ++s) {
            const T* from = x + ((atom[s] * int64_t(groups) + group) * dim + d) * HEADS;
            const Heads<T> w = Heads<T>::load(weight(s));
            if (n == WIDE)
                for (int k = 0; k < WIDE; ++k) sum[k] += w * Heads<T>::load(from + HEADS * k);
            else
                for (int k = 0; k < n; ++k) sum[k] += w * Heads<T>::load(from + HEADS * k);
        }
        for (int k = 0; k < n; ++k) {
            T lanes[HEADS];
            (sum[k] * scale).store(lanes);
            for (int h = 0; h < HEADS && HEADS * group + h < heads; ++h)
                result[int64_t(HEADS * group + h) * dim + d + k] = lanes[h];
        }
    }
}

// Equations (2) to (5).
template <class T>
void attention_rows(const AttentionRows<T>& x, int64_t first, int64_t last, T* scratch) {
    const AttentionInputs<T>& in = x.in;
    const Layout<T>& layout = in.layout;
    const int groups = groups_of(in.heads), padded = in.window.padded();
    T* basis = scratch;
    T* c = basis + BLOCK * in.window.size;
    T* slots = c + HEADS * padded;
    const T scale = T(LOG2_E / __builtin_sqrt(double(in.dim))), log2_tol = T(__builtin_log2(in.tol));
    for (int64_t i = first; i < last; ++i) {
        const int64_t pair = layout.pair_ptr[i], n = layout.pair_ptr[i + 1] - pair;
        const int32_t* atom = layout.pair_col + pair;
        T* slot_sum = slots + HEADS * n;
        for (int g = 0; g < groups; ++g) {
            const Heads<T> decay = load_heads(in.decay + i * in.heads, in.heads, g, T(PADDING_DECAY)) * T(LOG2_E);
            const T* q = x.q + (i * groups + g) * in.dim * HEADS;
            Heads<T> largest = Heads<T>::all(-__builtin_huge_val()), norm = largest;
            for (int64_t s = 0; s < n; ++s) {
                const Heads<T> score = dot(q, x.k + (atom[s] * int64_t(groups) + g) * in.dim * HEADS, in.dim) * scale;
                score.store(slots + HEADS * s);
                Heads<T>::all(0).store(slot_sum + HEADS * s);
                largest = max(largest, score);
                norm = max(norm, score - decay * layout.pair_near2[pair + s]);
            }
            const Weights<T> w = prepare(layout, i, n, decay, norm, largest, log2_tol, slots);
            for (int m = 0; m < HEADS * padded; ++m) c[m] = 0;
            sum_segment(layout, in.window, w, slots, slot_sum, c, basis);

            Heads<T> whole = Heads<T>::all(0);
            for (int64_t s = 0; s < n; ++s) whole += Heads<T>::load(slot_sum + HEADS * s);
            const Heads<T> inverse = Heads<T>::all(1) / whole;
            weighted_sum(atom, n, [&](int64_t s) { return slot_sum + HEADS * s; }, x.v, groups, g, in.value_dim, inverse,
                         in.heads, x.out.o + i * in.heads * in.value_dim);
            store_heads((log2(whole) + norm) * T(LN_2), in.heads, g, x.out.lse + i * in.heads);
            T scales[HEADS];
            inverse.store(scales);
            for (int h = 0; h < HEADS && HEADS * g + h < in.heads; ++h) {
                T* to = x.out.c + (i * in.heads + HEADS * g + h) * in.window.num;
                const T* from = c + h * padded + in.window.half + 1;
                for (int m = 0; m < in.window.num; ++m) to[m] = from[m] * scales[h];
            }
        }
    }
}

// Equations (15) to (19), what belongs to the rows: gradients of q and decay, and the sums over the images of each pair.
template <class T>
void attention_backward_rows(const AttentionRows<T>& x, int64_t first, int64_t last, T* scratch) {
    const AttentionInputs<T>& in = x.in;
    const Layout<T>& layout = in.layout;
    const int groups = groups_of(in.heads), padded = in.window.padded(), half = in.window.half, num = in.window.num;
    const int64_t pairs = layout.pair_ptr[in.atoms];
    T* basis = scratch;
    T* u = basis + BLOCK * in.window.size;
    T* slots = u + HEADS * padded;
    const T scale = T(LOG2_E / __builtin_sqrt(double(in.dim))), log2_tol = T(__builtin_log2(in.tol));
    for (int m = 0; m < HEADS * padded; ++m) u[m] = 0;
    for (int64_t i = first; i < last; ++i) {
        const int64_t pair = layout.pair_ptr[i], n = layout.pair_ptr[i + 1] - pair;
        const int64_t members = layout.entry_ptr[i + 1] - layout.entry_ptr[i];
        const int32_t* atom = layout.pair_col + pair;
        T* content = slots + HEADS * n;
        T* slope = x.pair_force ? content + HEADS * n : nullptr;
        if (slope)
            for (int64_t m = 0; m < members; ++m) slope[m] = 0;
        for (int g = 0; g < groups; ++g) {
            const int real = in.heads - HEADS * g < HEADS ? in.heads - HEADS * g : HEADS;
            const int64_t head = i * in.heads + HEADS * g;
            const T* q = x.q + (i * groups + g) * in.dim * HEADS;
            const T* grad_o = x.grad_o + (i * groups + g) * in.value_dim * HEADS;
            T lanes[HEADS] = {};
            for (int h = 0; h < real; ++h) {
                const T* grad_c = x.grad.c + (head + h) * num;
                lanes[h] = dot_flat(x.grad.o + (head + h) * in.value_dim, x.saved.o + (head + h) * in.value_dim, in.value_dim) +
                           dot_flat(grad_c, x.saved.c + (head + h) * num, num) - x.grad.lse[head + h];
                for (int m = 0; m < num; ++m) u[HEADS * (half + 1 + m) + h] = grad_c[m];
            }
            for (int h = real; h < HEADS; ++h)
                for (int m = 0; m < num; ++m) u[HEADS * (half + 1 + m) + h] = 0;
            const Heads<T> delta = Heads<T>::load(lanes);

            Transposed<T> t;
            t.decay = load_heads(in.decay + i * in.heads, in.heads, g, T(PADDING_DECAY));
            const Heads<T> norm = load_heads(x.saved.lse + i * in.heads, in.heads, g, T(0)) * T(LOG2_E);
            t.slots = slots;
            t.content = content;
            t.u = u;
            t.slot_p = x.pair_p + (g * pairs + pair) * HEADS;
            t.slot_ds = x.pair_ds + (g * pairs + pair) * HEADS;
            t.c = nullptr;
            t.slope = slope;
            t.grad_decay = Heads<T>::all(0);
            Heads<T> largest = Heads<T>::all(-__builtin_huge_val());
            for (int64_t s = 0; s < n; ++s) {
                const int64_t j = atom[s] * int64_t(groups) + g;
                const Heads<T> score = dot(q, x.k + j * in.dim * HEADS, in.dim) * scale;
                score.store(slots + HEADS * s);
                largest = max(largest, score);
                (dot(grad_o, x.v + j * in.value_dim * HEADS, in.value_dim) - delta).store(content + HEADS * s);
                Heads<T>::all(0).store(t.slot_p + HEADS * s);
                Heads<T>::all(0).store(t.slot_ds + HEADS * s);
            }
            const Weights<T> w = prepare(layout, i, n, t.decay * T(LOG2_E), norm, largest, log2_tol, slots);
            transpose_segment(layout, in.window, w, t, basis);
            store_heads(t.grad_decay, in.heads, g, x.result.decay + i * in.heads);
            weighted_sum(atom, n, [&](int64_t s) { return t.slot_ds + HEADS * s; }, x.k, groups, g, in.dim,
                         Heads<T>::all(scale * T(LN_2)), in.heads, x.result.q + i * in.heads * in.dim);
        }
        if (slope) {
            for (int m = 0; m < 9; ++m) x.row_lattice[9 * i + m] = 0;
            add_forces(layout, in.positions, in.lattice + 9 * x.crystal[i], in.shift, i, n, atom, i, slope,
                       x.pair_force + 3 * pair, x.row_lattice + 9 * i);
        }
    }
}

// What belongs to the columns, gathered over the mirror images (j, i) of each pair (i, j): gradients of k, v, positions.
template <class T>
void attention_backward_columns(const AttentionRows<T>& x, int64_t first, int64_t last, T*) {
    const AttentionInputs<T>& in = x.in;
    const Layout<T>& layout = in.layout;
    const int groups = groups_of(in.heads);
    const int64_t pairs = layout.pair_ptr[in.atoms];
    const Heads<T> scale = Heads<T>::all(T(1 / __builtin_sqrt(double(in.dim))));
    for (int64_t i = first; i < last; ++i) {
        const int64_t pair = layout.pair_ptr[i], n = layout.pair_ptr[i + 1] - pair;
        const int32_t *atom = layout.pair_col + pair, *mirror = layout.pair_mirror + pair;
        for (int g = 0; g < groups; ++g) {
            const T *p = x.pair_p + g * pairs * HEADS, *ds = x.pair_ds + g * pairs * HEADS;
            weighted_sum(atom, n, [&](int64_t s) { return ds + HEADS * int64_t(mirror[s]); }, x.q, groups, g, in.dim,
                         scale, in.heads, x.result.k + i * in.heads * in.dim);
            weighted_sum(atom, n, [&](int64_t s) { return p + HEADS * int64_t(mirror[s]); }, x.grad_o, groups, g,
                         in.value_dim, Heads<T>::all(1), in.heads, x.result.v + i * in.heads * in.value_dim);
        }
        if (x.pair_force) gather_forces(x.pair_force, pair, n, mirror, x.result.positions + 3 * i);
    }
}

}  // namespace crystalformer::LEVEL
