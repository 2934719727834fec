// From dloss/dd of each image to the gradients of positions and lattice. Equation (B9) of docs/math.md.
#pragma once

#include "layout.h"
#include "simd.h"

namespace crystalformer::LEVEL {

// force (slots,3) = sum over a slot's images of (dloss/dd / d) r, and lattice (9) += sum n (dloss/dd / d) r.
// slope: (members) of the segment, dloss/dd / d. r is made in fp64, as the layout made d.
template <class T>
INLINE void add_forces(const Layout<T>& layout, const T* positions, const T* cell, const int32_t* shift,
                       int64_t segment, int64_t slots, const int32_t* atom, int64_t i, const T* slope, T* force,
                       T* lattice) {
    for (int64_t x = 0; x < 3 * slots; ++x) force[x] = 0;
    double own[3], vectors[9];
    for (int x = 0; x < 3; ++x) own[x] = positions[3 * i + x];
    for (int x = 0; x < 9; ++x) vectors[x] = cell[x];
    const int64_t first = layout.entry_ptr[segment], end = layout.shell_end[segment];
    if (end == first) return;
    for (int64_t m = first; m < layout.member_end[end - 1]; ++m) {
        const int64_t s = layout.slot[m], j = atom[s];
        const int32_t* n = shift + 3 * layout.entry[m];
        for (int x = 0; x < 3; ++x) {
            double r = double(positions[3 * j + x]) - own[x];
            for (int y = 0; y < 3; ++y) r += n[y] * vectors[3 * y + x];
            const T f = T(r) * slope[m - first];
            force[3 * s + x] += f;
            for (int y = 0; y < 3; ++y) lattice[3 * y + x] += T(n[y]) * f;
        }
    }
}

// The gradient of an atom's position, (B10): pulled as j by the rows that see it, and as i by its own.
template <class T>
INLINE void gather_forces(const T* pair_force, int64_t pair, int64_t slots, const int32_t* mirror, T* position) {
    T sum[3] = {};
    for (int64_t s = 0; s < slots; ++s)
        for (int x = 0; x < 3; ++x) sum[x] += pair_force[3 * int64_t(mirror[s]) + x] - pair_force[3 * (pair + s) + x];
    for (int x = 0; x < 3; ++x) position[x] = sum[x];
}

}  // namespace crystalformer::LEVEL
