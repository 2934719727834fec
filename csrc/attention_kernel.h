// Attention of some rows. Equation numbers are those of docs/math.md.
#pragma once

#include "forces.h"
#include "heads.h"
#include "kernels.h"
#include "products.h"
#include "shells.h"

namespace crystalformer::LEVEL {

// result (dim,8) = the sum over some slots of weight x[atom], or += .
template <class T, class Weight>
INLINE void weighted_sum(const int32_t* slots, int64_t count, const int32_t* atom, Weight weight, const T* x,
                         int groups, int group, int dim, bool add, T* result) {
    constexpr int WIDE = REGISTER_BYTES == 64 ? 16 : 8;  // dimensions at once
    for (int d = 0; d < dim; d += WIDE) {
        const int n = dim - d < WIDE ? dim - d : WIDE;
        Heads<T> sum[WIDE];
        for (int k = 0; k < WIDE; ++k)
            sum[k] = add && k < n ? Heads<T>::load(result + HEADS * (d + k)) : Heads<T>::all(0);
        for (int64_t s = 0; s < count; ++s) {
            const T* from = x + ((atom[slots[s]] * int64_t(groups) + group) * dim + d) * HEADS;
            const Heads<T> w = Heads<T>::load(weight(slots[s]));
            if (n == WIDE)
                for (int k = 0; k < WIDE; ++k) sum[k] += w * Heads<T>::load(from + HEADS * k);
            else
                for (int k = 0; k < n; ++k) sum[k] += w * Heads<T>::load(from + HEADS * k);
        }
        for (int k = 0; k < n; ++k) sum[k].store(result + HEADS * (d + k));
    }
}

// The slots (at most n) with an image in a shell that is summed, in order; returns how many.
template <class T>
INLINE int64_t near_slots(const T* near2, int64_t n, T reach2, int32_t* slots) {
    int64_t count = 0;
    for (int64_t s = 0; s < n; ++s) {
        slots[count] = int32_t(s);
        count += within(near2[s], reach2);
    }
    return count;
}

// scores (n,8), in base 2 and relative to the largest, of a row with the atoms of its slots; returns the largest.
template <class T>
INLINE Heads<T> content_scores(const AttentionInputs<T>& in, const T* q, const T* k, const int32_t* atom, int64_t n,
                               int group, T* scores) {
    const T scale = T(LOG2_E / __builtin_sqrt(double(in.dim)));
    Heads<T> largest = Heads<T>::all(-__builtin_huge_val());
    for (int64_t s = 0; s < n; ++s) {
        const T* from = k + (atom[s] * int64_t(groups_of(in.heads)) + group) * in.dim * HEADS;
        const Heads<T> score = dot(q, from, in.dim) * scale;
        score.store(scores + HEADS * s);
        largest = max(largest, score);
    }
    for (int64_t s = 0; s < HEADS * n; s += HEADS) (Heads<T>::load(scores + s) - largest).store(scores + s);
    return largest;
}

// The largest exponent of a row's images, of the scores of its slots.
template <class T>
INLINE Heads<T> largest_exponent(const T* scores, const T* near2, int64_t n, Heads<T> decay) {
    Heads<T> norm = Heads<T>::all(-__builtin_huge_val());
    for (int64_t s = 0; s < n; ++s) norm = max(norm, Heads<T>::load(scores + HEADS * s) - decay * near2[s]);
    return norm;
}

// y += W c of some rows. Equation (5).
template <class T>
INLINE void add_values(const AttentionRows<T>& x, int64_t first, int rows, T* scratch) {
    const AttentionInputs<T>& in = x.in;
    const int num = in.window.num, width = tiled(in.value_dim);
    for (int64_t h = 0; h < in.heads; ++h) {
        multiply(x.out.c + (first * in.heads + h) * num, int64_t(in.heads) * num, rows, num, x.weight + h * num * width,
                 width, scratch);
        for (int r = 0; r < rows; ++r) {
            T* y = x.out.y + ((first + r) * in.heads + h) * in.value_dim;
            for (int d = 0; d < in.value_dim; ++d) y[d] += scratch[r * width + d];
        }
    }
}

// y (N,width) += 0 x_j for every atom j of the crystal: what is not finite reaches each row, as in a product over all
// pairs, although pairs without images near enough are never summed.
template <class T>
void pass_on_nan(const T* x, const int64_t* ptr, int64_t first, int64_t last, int width, T* y) {
    using P = Pack<T, TILE>;
    for (int64_t crystal = first; crystal < last; ++crystal)
        for (int column = 0; column < width; column += TILE) {
            const int n = width - column < TILE ? width - column : TILE;
            T zero[TILE] = {};
            P sum = P::all(0);
            for (int64_t j = ptr[crystal]; j < ptr[crystal + 1]; ++j) {
                const T* from = x + j * width + column;
                if (n == TILE)
                    sum += P::load(from) * T(0);
                else
                    for (int d = 0; d < n; ++d) zero[d] += from[d] * T(0);
            }
            if (n == TILE) sum.store(zero);
            if (P::load(zero).sum() == 0) continue;
            for (int64_t i = ptr[crystal]; i < ptr[crystal + 1]; ++i)
                for (int d = 0; d < n; ++d) y[i * width + column + d] += zero[d];
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
    T* grouped = c + HEADS * padded;
    T* slots = grouped + HEADS * in.value_dim;
    const T log2_tol = T(__builtin_log2(in.tol));
    for (int64_t i = first; i < last; ++i) {
        const int64_t pair = layout.pair_ptr[i], n = layout.pair_ptr[i + 1] - pair;
        const int32_t* atom = layout.pair_col + pair;
        T* slot_sum = slots + HEADS * n;
        int32_t* near = reinterpret_cast<int32_t*>(slot_sum + HEADS * n);
        for (int g = 0; g < groups; ++g) {
            const Heads<T> decay = load_heads(in.decay + i * in.heads, in.heads, g, T(PADDING_DECAY)) * T(LOG2_E);
            const T *q = x.q + (i * groups + g) * in.dim * HEADS, *near2 = layout.pair_near2 + pair;
            const Heads<T> largest = content_scores(in, q, x.k, atom, n, g, slots);
            const Heads<T> norm = largest_exponent(slots, near2, n, decay);
            const Weights<T> w = prepare(layout, i, decay, norm * T(-1), log2_tol);
            const int64_t count = near_slots(near2, n, w.reach2, near);
            for (int64_t s = 0; s < count; ++s) {
                T* slot = slots + HEADS * near[s];
                w.slot_factor(Heads<T>::load(slot)).store(slot);
                Heads<T>::all(0).store(slot_sum + HEADS * near[s]);
            }
            for (int m = 0; m < HEADS * padded; ++m) c[m] = 0;
            sum_segment(layout, in.window, w, slots, slot_sum, c, basis);

            Heads<T> whole = Heads<T>::all(0);
            for (int64_t s = 0; s < count; ++s) whole += Heads<T>::load(slot_sum + HEADS * near[s]);
            const Heads<T> inverse = Heads<T>::all(1) / whole;
            weighted_sum(
                near, count, atom, [&](int64_t s) { return slot_sum + HEADS * s; }, x.v, groups, g, in.value_dim, false,
                grouped);
            ungroup_heads(grouped, inverse, in.heads, g, in.value_dim, x.out.y + i * in.heads * in.value_dim);
            store_heads((log2(whole) + norm + largest) * T(LN_2), in.heads, g, x.out.lse + i * in.heads);
            T scales[HEADS];
            inverse.store(scales);
            for (int h = 0; h < HEADS && HEADS * g + h < in.heads; ++h) {
                T* to = x.out.c + (i * in.heads + HEADS * g + h) * in.window.num;
                const T* from = c + h * padded + in.window.half + 1;
                for (int m = 0; m < in.window.num; ++m) to[m] = from[m] * scales[h];
            }
        }
        const int64_t together = (i - first) % x.TOGETHER + 1;
        if (in.window.num && (together == x.TOGETHER || i + 1 == last))
            add_values(x, i + 1 - together, int(together), scratch);
    }
}

// A logarithm of a sum, in base 2, that is larger has lost digits that the weights need: 2^8 u = 2e-5 in fp32.
constexpr int EXACT_LOGARITHM = 256;

// The largest score, `top`, over the sum of a row, in base 2, for backward: from the logarithm that the forward
// returned, or, where that is too large, from the sum made once more. factors (n,8) is scratch.
template <class T>
INLINE Heads<T> above_sum(const Layout<T>& layout, int64_t row, Heads<T> decay, Heads<T> top, Heads<T> sum,
                          const T* scores, const T* near2, int64_t n, T log2_tol, T* factors) {
    if (largest(max(sum, sum * T(-1))) <= EXACT_LOGARITHM) return top - sum;
    const Heads<T> norm = largest_exponent(scores, near2, n, decay);
    const Weights<T> w = prepare(layout, row, decay, norm * T(-1), log2_tol);
    for (int64_t s = 0; s < HEADS * n; s += HEADS) w.slot_factor(Heads<T>::load(scores + s)).store(factors + s);
    return (norm + log2(sum_weights(layout, w, factors))) * T(-1);
}

// Equations (B1) to (B8), what belongs to the rows: gradients of q and decay, and the sums over the images of each
// pair.
template <class T>
void attention_backward_rows(const AttentionRows<T>& x, int64_t first, int64_t last, T* scratch) {
    const AttentionInputs<T>& in = x.in;
    const Layout<T>& layout = in.layout;
    const int groups = groups_of(in.heads), padded = in.window.padded(), half = in.window.half;
    const int columns = tiled(in.window.num);
    T* basis = scratch;
    T* u = basis + BLOCK * in.window.size;
    T* grouped = u + HEADS * padded;
    T* grad_c = grouped + HEADS * in.dim;  // (H, TOGETHER, columns)
    T* slots = grad_c + int64_t(in.heads) * x.TOGETHER * columns;
    const T scale = T(1 / __builtin_sqrt(double(in.dim))), log2_tol = T(__builtin_log2(in.tol));
    for (int m = 0; m < BLOCK * in.window.size; ++m) basis[m] = 0;  // dot_products reads past the last shell
    for (int m = 0; m < HEADS * padded; ++m) u[m] = 0;
    for (int64_t i = first; i < last; ++i) {
        const int64_t together = (i - first) % x.TOGETHER;
        if (!together)
            for (int64_t h = 0; h < in.heads; ++h)
                multiply(x.grad.y + (i * in.heads + h) * in.value_dim, int64_t(in.heads) * in.value_dim,
                         int(last - i < x.TOGETHER ? last - i : x.TOGETHER), in.value_dim,
                         x.weight + h * in.value_dim * columns, columns, grad_c + h * x.TOGETHER * columns);
        const int64_t pair = layout.pair_ptr[i], n = layout.pair_ptr[i + 1] - pair;
        const int64_t members = layout.entry_ptr[i + 1] - layout.entry_ptr[i];
        const int32_t* atom = layout.pair_col + pair;
        T* content = slots + HEADS * n;
        int32_t* near = reinterpret_cast<int32_t*>(content + HEADS * n);
        T* slope = x.pair_force ? content + HEADS * n + n : nullptr;
        if (slope)
            for (int64_t m = 0; m < members; ++m) slope[m] = 0;
        for (int g = 0; g < groups; ++g) {
            const int real = in.heads - HEADS * g < HEADS ? in.heads - HEADS * g : HEADS;
            const int64_t head = i * in.heads + HEADS * g;
            const T* q = x.q + (i * groups + g) * in.dim * HEADS;
            const T* grad_y = x.grad_y + (i * groups + g) * in.value_dim * HEADS;
            T lanes[HEADS] = {};
            for (int h = 0; h < real; ++h) {
                const int64_t row = (head + h) * in.value_dim;
                lanes[h] = dot_flat(x.grad.y + row, x.saved.y + row, in.value_dim) - x.grad.lse[head + h];
            }
            heads_last(grad_c + (HEADS * g * x.TOGETHER + together) * columns, x.TOGETHER * columns, real,
                       in.window.num, u + HEADS * (half + 1));
            const Heads<T> delta = Heads<T>::load(lanes);

            Transposed<T> t;
            t.decay = load_heads(in.decay + i * in.heads, in.heads, g, T(PADDING_DECAY));
            const Heads<T> norm = load_heads(x.saved.lse + i * in.heads, in.heads, g, T(0)) * T(LOG2_E);
            t.slots = slots;
            t.content = content;
            t.u = u;
            t.slot_p = x.pair_p + (g * x.block_pairs + pair - x.first_pair) * HEADS;
            t.slot_ds = x.pair_ds + (g * x.block_pairs + pair - x.first_pair) * HEADS;
            t.c = nullptr;
            t.slope = slope;
            t.grad_decay = Heads<T>::all(0);
            const Heads<T> decay = t.decay * T(LOG2_E);
            const Heads<T> largest = content_scores(in, q, x.k, atom, n, g, slots);
            const Heads<T> above =
                above_sum(layout, i, decay, largest, norm, slots, layout.pair_near2 + pair, n, log2_tol, t.slot_p);
            const Weights<T> w = prepare(layout, i, decay, above, log2_tol, delta * T(0));
            x.reach2[i * groups + g] = w.reach2;
            const int64_t count = near_slots(layout.pair_near2 + pair, n, w.reach2, near);
            for (int64_t k = 0; k < count; ++k) {
                const int64_t s = HEADS * int64_t(near[k]), j = atom[near[k]] * int64_t(groups) + g;
                w.slot_factor(Heads<T>::load(slots + s)).store(slots + s);
                (dot(grad_y, x.v + j * in.value_dim * HEADS, in.value_dim) - delta).store(content + s);
                Heads<T>::all(0).store(t.slot_p + s);
                Heads<T>::all(0).store(t.slot_ds + s);
            }
            transpose_segment(layout, in.window, w, t, basis);
            store_heads(t.grad_decay, in.heads, g, x.result.decay + i * in.heads);
            weighted_sum(
                near, count, atom, [&](int64_t s) { return t.slot_ds + HEADS * s; }, x.k, groups, g, in.dim, false,
                grouped);
            ungroup_heads(grouped, Heads<T>::all(scale), in.heads, g, in.dim, x.result.q + i * in.heads * in.dim);
        }
        if (slope) {
            for (int m = 0; m < 9; ++m) x.row_lattice[9 * i + m] = 0;
            add_forces(layout, in.positions, in.lattice + 9 * x.crystal[i], in.shift, i, n, atom, i, slope,
                       x.pair_force + 3 * pair, x.row_lattice + 9 * i);
        }
    }
}

// What belongs to the columns, gathered from the rows of one block over the mirror images (j, i) of each pair (i, j):
// gradients of k and v. Equation (B10).
template <class T>
void attention_backward_columns(const AttentionRows<T>& x, int64_t first, int64_t last, T* scratch) {
    const AttentionInputs<T>& in = x.in;
    const Layout<T>& layout = in.layout;
    const int groups = groups_of(in.heads);
    int32_t* near = reinterpret_cast<int32_t*>(scratch);
    for (int64_t i = first; i < last; ++i) {
        const int64_t begin = x.next_pair[i];
        int64_t end = begin;
        while (end < layout.pair_ptr[i + 1] && layout.pair_col[end] < x.last_row) ++end;
        x.next_pair[i] = end;
        const int32_t *atom = layout.pair_col + begin, *mirror = layout.pair_mirror + begin;
        const bool add = x.in.ptr[x.crystal[i]] < x.first_row;  // earlier blocks hold rows of this crystal
        if (add && begin == end) continue;                      // in a large cell, as good as always
        for (int g = 0; g < groups; ++g) {
            const auto at = [&](const T* sums) {
                return [=](int64_t s) { return sums + (g * x.block_pairs + mirror[s] - x.first_pair) * HEADS; };
            };
            int64_t count = 0;
            for (int64_t s = 0; s < end - begin; ++s) {
                __builtin_prefetch(at(x.pair_ds)(s));  // mirror images lie in rows far apart
                __builtin_prefetch(at(x.pair_p)(s));
                near[count] = int32_t(s);
                count += within(layout.pair_near2[mirror[s]], x.reach2[atom[s] * int64_t(groups) + g]);
            }
            const int64_t row = (i * groups + g) * HEADS;
            weighted_sum(near, count, atom, at(x.pair_ds), x.q, groups, g, in.dim, add, x.grad_k + row * in.dim);
            weighted_sum(near, count, atom, at(x.pair_p), x.grad_y, groups, g, in.value_dim, add,
                         x.grad_v + row * in.value_dim);
        }
    }
}

// The gradients of k and v as the caller has them.
template <class T>
void attention_backward_finish(const AttentionRows<T>& x, int64_t first, int64_t last, T*) {
    const AttentionInputs<T>& in = x.in;
    const int groups = groups_of(in.heads);
    const Heads<T> one = Heads<T>::all(1), scale = one * T(1 / __builtin_sqrt(double(in.dim)));
    for (int64_t i = first; i < last; ++i)
        for (int g = 0; g < groups; ++g) {
            const int64_t row = (i * groups + g) * HEADS;
            ungroup_heads(x.grad_k + row * in.dim, scale, in.heads, g, in.dim, x.result.k + i * in.heads * in.dim);
            ungroup_heads(x.grad_v + row * in.value_dim, one, in.heads, g, in.value_dim,
                          x.result.v + i * in.heads * in.value_dim);
        }
}

}  // namespace crystalformer::LEVEL
