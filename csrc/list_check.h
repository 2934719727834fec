// Whether an image list is valid: sorted, symmetric, of atoms of one crystal. geometry/image_list.py checks the same.
// The pairs are checked when they are counted, the translations of a row when its distances are computed.
#pragma once

#include <vector>

#include "layout.h"

namespace crystalformer {

// Offsets of `segments` segments in a row of `entries`: from 0 to their number, never falling.
void check_offsets(const char* name, const int64_t* offsets, int64_t segments, int64_t entries);

// The pairs (i, j) of a list, by i, then by j. The images of a pair stand together.
struct Pairs {
    std::vector<int64_t> ptr;     // (N+1) the pairs of each atom i
    std::vector<int32_t> col;     // (pairs) j
    std::vector<int64_t> first;   // (pairs+1) the first image
    std::vector<int32_t> mirror;  // (pairs) the place of (j, i), which has as many images

    int64_t number() const { return int64_t(col.size()); }
};

// every: all pairs of atoms of a crystal, not only those that have images.
// Throws std::invalid_argument that says what is wrong. Reads nothing beyond the arrays, whatever they hold.
template <class T>
Pairs find_pairs(const Images<T>& images, bool every);

// Throws if the images of row i are not sorted by translation (those of orbits by distance), or the mirror image of one
// is missing.
template <class T>
void check_images(const Images<T>& images, const Pairs& pairs, int64_t i);

}  // namespace crystalformer
