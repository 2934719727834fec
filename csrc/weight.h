// The weight W (H,Dv,K) of the value encoding as products want it: rows of whole tiles.
#pragma once

#include "layout.h"
#include "memory.h"

namespace crystalformer {

inline int tiled(int64_t n) {
    return int((n + Window::TILE - 1) / Window::TILE * Window::TILE);
}

// (H,rows,tiled columns) of the elements weight[h * rows * columns + r * row + c * column], zeros in the padding.
template <class T>
Buffer<T> in_tiles(const T* weight, int64_t heads, int64_t rows, int64_t columns, int64_t row, int64_t column) {
    const int64_t width = tiled(columns);
    Buffer<T> result(heads * rows * width);
    T* to = result.data();
    for (int64_t h = 0; h < heads; ++h, weight += rows * columns)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < width; ++c) *to++ = c < columns ? weight[r * row + c * column] : T(0);
    return result;
}

// (H,K,tiled Dv)
template <class T>
Buffer<T> weight_by_basis(const T* weight, int64_t heads, int64_t values, int64_t num) {
    return in_tiles(weight, heads, num, values, 1, num);
}

// (H,Dv,tiled K)
template <class T>
Buffer<T> weight_by_value(const T* weight, int64_t heads, int64_t values, int64_t num) {
    return in_tiles(weight, heads, values, num, num, 1);
}

}  // namespace crystalformer
