// The inner loops of attention and encoding: sums over the shells of one segment, for eight heads at once.
//
// The weight of a member (an image of slot j in shell s) is p = count * 2^(score_j - a d_s^2 - norm), all in base 2. It
// is a product of one factor per slot and one per shell, so that the exponential and the radial basis are evaluated
// once a shell, however many atoms are in it. Where the scores differ so much that the factors could leave the range of
// T, p is evaluated member by member (WIDE).
#pragma once

#include "products.h"

namespace crystalformer::LEVEL {

constexpr int HEADS = 8;   // heads of one pack: heads come in groups of so many, the last one padded
constexpr int BLOCK = 32;  // shells worked on at once
constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

template <class T>
using Heads = Pack<T, HEADS>;

// Factors below 2^LOWEST count as zero: then no product of two of them and a basis function is denormal.
template <class T>
constexpr T LOWEST = sizeof(T) == 4 ? -45 : -400;
// How far the largest score may be above the norm for the factors to be safe.
template <class T>
constexpr T FACTORS_SAFE = sizeof(T) == 4 ? 24 : 200;

// Whether a shell is summed, and with it the slots whose nearest shell it is: the one comparison that decides both. A
// NaN on either side is summed, so that it shows.
template <class T>
INLINE bool within(T d2, T reach2) {
    return !(d2 > reach2);
}

// How the weights of one segment are made of its scores, and which shells matter. Scores are in base 2 and relative to
// the segment's largest one, so that their differences are exact however large they are.
template <class T>
struct Weights {
    Heads<T> decay;                    // in base 2
    Heads<T> slot_shift, shell_shift;  // added to the exponents of slots and shells
    bool wide;
    int64_t begin;       // the segment's first shell
    int64_t first, end;  // those that matter: its last, far shells come first
    T reach2;            // the largest squared distance that matters

    // The factor of a slot, or its exponent when wide.
    INLINE Heads<T> slot_factor(Heads<T> score) const {
        return wide ? score + slot_shift : exp2_above(score + slot_shift, LOWEST<T>);
    }
};

// `above`: the largest score over the norm. The shells left out hold less than the fraction `tol` of the weight, since
// each image beyond d has less than 2^(above - a d^2) of it. `shown`: zero, or NaN where every shell has to show it.
template <class T>
INLINE Weights<T> prepare(const Layout<T>& layout, int64_t segment, Heads<T> decay, Heads<T> above, T log2_tol,
                          Heads<T> shown = Heads<T>::all(0)) {
    Weights<T> w;
    w.decay = decay;
    w.begin = layout.entry_ptr[segment];
    w.end = layout.shell_end[segment];
    w.wide = !(largest(above) <= FACTORS_SAFE<T>);
    w.slot_shift = w.wide ? above : above * T(0.5);
    w.shell_shift = w.wide ? Heads<T>::all(0) : w.slot_shift;
    const int64_t images = layout.entry_ptr[segment + 1] - w.begin;
    const T log2_images = T(64 - __builtin_clzll(uint64_t(images) | 1));
    w.reach2 = largest((above + (log2_images - log2_tol)) / decay + shown);
    int64_t low = w.begin, high = w.end;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (within(layout.d2[middle], w.reach2))
            high = middle;
        else
            low = middle + 1;
    }
    w.first = low;
    return w;
}

// The basis functions of one bin's window at a distance `offset` spacings from the bin's start, (size).
template <class T>
INLINE void basis_window(const Window& window, T offset, T* b) {
    const T sharpness = T(-0.5 * LOG2_E / (window.width * window.width));
    Pack<T, TILE> m;
    for (int i = 0; i < TILE; ++i) m.part[i / m.LANES][i % m.LANES] = T(i);
    for (int tile = 0; tile < window.size; tile += TILE) {
        const Pack<T, TILE> z = m + (T(tile - window.half) - offset);
        exp2_above(z * z * sharpness, T(-100)).store(b + tile);
    }
}

// c (8, padded) += weights (n, 8)^T basis (n, size), from the bin's place on.
template <class T>
INLINE void add_products(const Window& window, int n, const T* weight, const T* basis, T* c) {
    const int64_t stride = window.padded();
    for (int h = 0; h < HEADS; h += 4) add_rows<4>(basis, n, window.size, weight + h, 1, HEADS, c + h * stride, stride);
}

// One block: shells of one bin, with their exponents.
template <class T>
struct Block {
    alignas(64) T factor[BLOCK * HEADS];  // of each shell, or the exponent when wide
    alignas(64) T total[BLOCK * HEADS];
    int64_t member, member_end;
    int shells, bin;

    // Takes the next shells from `from` on.
    INLINE void take(const Layout<T>& layout, const Weights<T>& w, int64_t from) {
        bin = layout.bin[from];
        member = from == w.begin ? w.begin : layout.member_end[from - 1];
        const int64_t limit = from + BLOCK < w.end ? from + BLOCK : w.end;
        int64_t s = from;
        for (; s < limit && layout.bin[s] == bin; ++s) {
            const Heads<T> x = w.shell_shift - w.decay * layout.d2[s];
            (w.wide ? x : exp2_above(x, LOWEST<T>)).store(factor + HEADS * (s - from));
            Heads<T>::all(0).store(total + HEADS * (s - from));
        }
        shells = int(s - from);
        member_end = layout.member_end[s - 1];
    }

    // p of a member, for all heads, given the shell's place in the block.
    template <bool WIDE>
    INLINE Heads<T> weight(const Layout<T>& layout, int64_t m, int64_t s, const T* slot) const {
        const Heads<T> a = Heads<T>::load(slot), b = Heads<T>::load(factor + HEADS * s);
        if constexpr (WIDE) return exp2_above(a + b, 2 * LOWEST<T>) * layout.count[m];
        return a * (b * layout.count[m]);
    }
};

// slot_sum (slots, 8) += p of each slot, c (8, padded) += sum p b(d).
template <class T, bool WIDE>
void sum_shells(const Layout<T>& layout, const Window& window, const Weights<T>& w, const T* slots, T* slot_sum, T* c,
                T* basis) {
    Block<T> block;
    for (int64_t s = w.first; s < w.end; s += block.shells) {
        block.take(layout, w, s);
        for (int64_t m = block.member; m < block.member_end; ++m) {
            const int64_t local = layout.shell[m] - (s - w.begin), j = layout.slot[m];
            const Heads<T> p = block.template weight<WIDE>(layout, m, local, slots + HEADS * j);
            (Heads<T>::load(slot_sum + HEADS * j) + p).store(slot_sum + HEADS * j);
            (Heads<T>::load(block.total + HEADS * local) + p).store(block.total + HEADS * local);
        }
        if (block.bin >= window.bins) continue;
        for (int e = 0; e < block.shells; ++e) basis_window(window, layout.offset[s + e], basis + e * window.size);
        add_products(window, block.shells, block.total, basis, c + block.bin * window.step);
    }
}

// The sum of p over all images.
template <class T, bool WIDE>
Heads<T> sum_members(const Layout<T>& layout, const Weights<T>& w, const T* slots) {
    Heads<T> sum = Heads<T>::all(0);
    Block<T> block;
    for (int64_t s = w.first; s < w.end; s += block.shells) {
        block.take(layout, w, s);
        for (int64_t m = block.member; m < block.member_end; ++m)
            sum +=
                block.template weight<WIDE>(layout, m, layout.shell[m] - (s - w.begin), slots + HEADS * layout.slot[m]);
    }
    return sum;
}

// What the transposed sums read and write.
template <class T>
struct Transposed {
    const T* slots;    // (slots, 8) from `prepare`
    const T* content;  // (slots, 8) the part of ds/p that depends on the slot
    const T* u;        // (padded, 8) gradient of c
    T* slot_p;         // (slots, 8) += p
    T* slot_ds;        // (slots, 8) += ds = p (content + u b(d))
    T* c;              // (8, padded) += p b(d), or null
    T* slope;          // (members) of dloss/dd / d, added to, or null
    Heads<T> decay;    // not in base 2
    Heads<T> grad_decay;
};

// ub (n, 8) = basis (n, size) u (size, 8), n rounded up to whole tiles of rows; with GEOMETRY also slope (n, 8), the
// same with the derivatives of the basis by the distance, in spacings and but for the factor 1 / width^2. A tile of
// rows is summed at once: each load of u serves all of them, and none waits for another.
template <class T, bool GEOMETRY>
INLINE void dot_products(const Window& window, int n, const T* basis, const T* offset, const T* u, T* ub, T* slope) {
    constexpr int ROWS = (GEOMETRY ? 4 : 8) / Heads<T>::PARTS;
    const T middle = T(0.5) * T(window.step);
    for (int e = 0; e < n; e += ROWS) {
        Heads<T> sum[ROWS], moment[ROWS];
        for (int r = 0; r < ROWS; ++r) sum[r] = moment[r] = Heads<T>::all(0);
        for (int tile = 0; tile < window.size; tile += TILE) {
            const T* b[ROWS];
            for (int r = 0; r < ROWS; ++r) b[r] = basis + (e + r) * window.size + tile;
            for (int m = 0; m < TILE; ++m) {
                const Heads<T> u_m = Heads<T>::load(u + HEADS * (tile + m));
                const Heads<T> u_moment = u_m * (T(tile + m - window.half) - middle);
                for (int r = 0; r < ROWS; ++r) {
                    sum[r] += u_m * b[r][m];
                    if constexpr (GEOMETRY) moment[r] += u_moment * b[r][m];
                }
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            sum[r].store(ub + HEADS * (e + r));
            if constexpr (GEOMETRY)
                if (e + r < n) (moment[r] - sum[r] * (offset[e + r] - middle)).store(slope + HEADS * (e + r));
        }
    }
}

template <class T, bool WIDE, bool GEOMETRY>
void transposed_shells(const Layout<T>& layout, const Window& window, const Weights<T>& w, Transposed<T>& x, T* basis) {
    Block<T> block;
    alignas(64) T ub[BLOCK * HEADS], slope[GEOMETRY ? BLOCK * HEADS : 1];
    alignas(64) T total_p[BLOCK * HEADS];
    const T steepness = T(1 / (window.width * window.width * window.spacing));
    const T *const slots = x.slots, *const content = x.content;
    T *const slot_p = x.slot_p, *const slot_ds = x.slot_ds;
    Heads<T> grad_decay = x.grad_decay;
    for (int64_t s = w.first; s < w.end; s += block.shells) {
        block.take(layout, w, s);
        const bool has_basis = block.bin < window.bins;
        if (has_basis) {
            for (int e = 0; e < block.shells; ++e) basis_window(window, layout.offset[s + e], basis + e * window.size);
            dot_products<T, GEOMETRY>(window, block.shells, basis, layout.offset + s,
                                      x.u + HEADS * block.bin * window.step, ub, slope);
        } else {
            for (int i = 0; i < HEADS * block.shells; ++i) ub[i] = 0;
            if constexpr (GEOMETRY)
                for (int i = 0; i < HEADS * block.shells; ++i) slope[i] = 0;
        }
        for (int e = 0; e < block.shells; ++e) {
            if constexpr (GEOMETRY) {
                const T d2 = layout.d2[s + e], inverse = d2 > 0 ? 1 / T(__builtin_sqrt(double(d2))) : T(0);
                (Heads<T>::load(slope + HEADS * e) * (steepness * inverse)).store(slope + HEADS * e);
            }
            Heads<T>::all(0).store(total_p + HEADS * e);
        }
        for (int64_t m = block.member; m < block.member_end; ++m) {
            const int64_t local = layout.shell[m] - (s - w.begin), j = HEADS * int64_t(layout.slot[m]);
            const Heads<T> p = block.template weight<WIDE>(layout, m, local, slots + j);
            const Heads<T> ds = p * (Heads<T>::load(content + j) + Heads<T>::load(ub + HEADS * local));
            (Heads<T>::load(slot_p + j) + p).store(slot_p + j);
            (Heads<T>::load(slot_ds + j) + ds).store(slot_ds + j);
            grad_decay -= ds * layout.d2[s + local];
            if (x.c) (Heads<T>::load(total_p + HEADS * local) + p).store(total_p + HEADS * local);
            if constexpr (GEOMETRY)
                x.slope[m - w.begin] += (p * Heads<T>::load(slope + HEADS * local) - x.decay * (ds * T(2))).sum();
        }
        if (x.c && has_basis) add_products(window, block.shells, total_p, basis, x.c + block.bin * window.step);
    }
    x.grad_decay = grad_decay;
}

template <class T>
INLINE void sum_segment(const Layout<T>& layout, const Window& window, const Weights<T>& w, const T* slots, T* slot_sum,
                        T* c, T* basis) {
    (w.wide ? sum_shells<T, true> : sum_shells<T, false>)(layout, window, w, slots, slot_sum, c, basis);
}

template <class T>
INLINE Heads<T> sum_weights(const Layout<T>& layout, const Weights<T>& w, const T* slots) {
    return (w.wide ? sum_members<T, true> : sum_members<T, false>)(layout, w, slots);
}

template <class T>
INLINE void transpose_segment(const Layout<T>& layout, const Window& window, const Weights<T>& w, Transposed<T>& x,
                              T* basis) {
    if (x.slope)
        (w.wide ? transposed_shells<T, true, true> : transposed_shells<T, false, true>)(layout, window, w, x, basis);
    else
        (w.wide ? transposed_shells<T, true, false> : transposed_shells<T, false, false>)(layout, window, w, x, basis);
}

}  // namespace crystalformer::LEVEL
