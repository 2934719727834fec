// Moving between rows of heads, as the caller has them, and packs of eight heads.
#pragma once

#include "kernels.h"
#include "shells.h"

namespace crystalformer::LEVEL {

// Decay of the heads that pad a group: they see nothing but the atom itself.
constexpr double PADDING_DECAY = 1e10;

// Rows of n numbers, `stride` apart, one for each of `real` heads -> (n,8), zeros where there is no head.
template <class T>
INLINE void heads_last(const T* rows, int64_t stride, int real, int n, T* result) {
    int m = 0;
    for (; m + HEADS <= n; m += HEADS) {
        Heads<T> x[HEADS];
        for (int h = 0; h < HEADS; ++h) x[h] = h < real ? Heads<T>::load(rows + h * stride + m) : Heads<T>::all(0);
        transpose(x);
        for (int i = 0; i < HEADS; ++i) x[i].store(result + HEADS * (m + i));
    }
    for (; m < n; ++m)
        for (int h = 0; h < HEADS; ++h) result[HEADS * m + h] = h < real ? rows[h * stride + m] : T(0);
}

// (N,H,D) -> (N,G,D,8).
template <class T>
void group_heads(const T* x, int64_t first, int64_t last, int heads, int dim, T* grouped) {
    const int groups = groups_of(heads);
    for (int64_t row = first * groups; row < last * groups; ++row) {
        const int head = int(row % groups) * HEADS, real = heads - head < HEADS ? heads - head : HEADS;
        heads_last(x + (row / groups * heads + head) * dim, dim, real, dim, grouped + row * dim * HEADS);
    }
}

// The inverse for one row and group: (D,8) times a factor for each head -> (H,D).
template <class T>
INLINE void ungroup_heads(const T* grouped, Heads<T> scale, int heads, int group, int dim, T* row) {
    const int real = heads - HEADS * group < HEADS ? heads - HEADS * group : HEADS;
    T* to = row + int64_t(HEADS) * group * dim;
    int d = 0;
    for (; d + HEADS <= dim; d += HEADS) {
        Heads<T> x[HEADS];
        for (int i = 0; i < HEADS; ++i) x[i] = Heads<T>::load(grouped + HEADS * (d + i)) * scale;
        transpose(x);
        for (int h = 0; h < real; ++h) x[h].store(to + h * dim + d);
    }
    for (; d < dim; ++d) {
        T lanes[HEADS];
        (Heads<T>::load(grouped + HEADS * d) * scale).store(lanes);
        for (int h = 0; h < real; ++h) to[h * dim + d] = lanes[h];
    }
}

// The numbers of one row's heads that the group holds; `missing` for the rest.
template <class T>
INLINE Heads<T> load_heads(const T* row, int heads, int group, T missing) {
    T x[HEADS];
    for (int h = 0; h < HEADS; ++h) x[h] = HEADS * group + h < heads ? row[HEADS * group + h] : missing;
    return Heads<T>::load(x);
}

template <class T>
INLINE void store_heads(Heads<T> x, int heads, int group, T* row) {
    T lanes[HEADS];
    x.store(lanes);
    for (int h = 0; h < HEADS && HEADS * group + h < heads; ++h) row[HEADS * group + h] = lanes[h];
}

template <class T>
INLINE Heads<T> log2(Heads<T> x) {
    T lanes[HEADS];
    x.store(lanes);
    for (int h = 0; h < HEADS; ++h) lanes[h] = __builtin_log2(lanes[h]);
    return Heads<T>::load(lanes);
}

// Sum over dim of x (dim,8) y (dim,8), two dimensions at a time.
template <class T>
INLINE Heads<T> dot(const T* x, const T* y, int dim) {
    using Two = Pack<T, 2 * HEADS>;
    Two sum = Two::all(0);
    int d = 0;
    for (; d + 1 < dim; d += 2) sum += Two::load(x + HEADS * d) * Two::load(y + HEADS * d);
    Heads<T> result = fold(sum);
    if (d < dim) result += Heads<T>::load(x + HEADS * d) * Heads<T>::load(y + HEADS * d);
    return result;
}

template <class T>
INLINE T dot_flat(const T* x, const T* y, int64_t n) {
    using P = Pack<T, TILE>;
    P sum = P::all(0);
    int64_t i = 0;
    for (; i + TILE <= n; i += TILE) sum += P::load(x + i) * P::load(y + i);
    T rest = 0;
    for (; i < n; ++i) rest += x[i] * y[i];
    return sum.sum() + rest;
}

}  // namespace crystalformer::LEVEL
