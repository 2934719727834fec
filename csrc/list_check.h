// Whether an image list is valid: sorted, symmetric, of atoms of one crystal. geometry/image_list.py checks the same.
#pragma once

#include "layout.h"

namespace crystalformer {

// Offsets of `segments` segments in a row of `entries`: from 0 to their number, never falling.
void check_offsets(const char* name, const int64_t* offsets, int64_t segments, int64_t entries);

// Throws std::invalid_argument that says what is wrong. Reads nothing beyond the arrays, whatever they hold.
template <class T>
void check_list(const Images<T>& images);

}  // namespace crystalformer
