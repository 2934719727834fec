// Atoms of crystals packed in a row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace crystalformer {

inline std::vector<int64_t> crystal_of_atom(const int64_t* ptr, int64_t crystals) {
    std::vector<int64_t> crystal(size_t(ptr[crystals]));
    for (int64_t c = 0; c < crystals; ++c) std::fill(crystal.begin() + ptr[c], crystal.begin() + ptr[c + 1], c);
    return crystal;
}

// lattice (C,9) = the sum of the rows (N,9) of each crystal, in order.
template <class T>
void sum_by_crystal(const T* rows, const int64_t* ptr, int64_t crystals, T* lattice) {
    for (int64_t c = 0; c < crystals; ++c)
        for (int x = 0; x < 9; ++x) {
            T sum = 0;
            for (int64_t i = ptr[c]; i < ptr[c + 1]; ++i) sum += rows[9 * i + x];
            lattice[9 * c + x] = sum;
        }
}

}  // namespace crystalformer
