// Products with the matrices W of the value encoding, and the micro-kernel that every product here is made of.
#pragma once

#include "layout.h"
#include "simd.h"

namespace crystalformer::LEVEL {

constexpr int TILE = Window::TILE;

// result[r] (n) += sum_s x[r * x_row + s * x_step] row_s for R rows of the result, `stride` apart, and `count` rows of
// n numbers, n a multiple of TILE. Each load of a row serves all R.
template <int R, class T>
INLINE void add_rows(const T* rows, int count, int n, const T* x, int64_t x_row, int64_t x_step, T* result,
                     int64_t stride) {
    using P = Pack<T, TILE>;
    constexpr int CHAINS = R == 1 ? 2 : 1;  // sums that do not wait for each other
    for (int tile = 0; tile < n; tile += TILE) {
        P sum[R][CHAINS];
        for (int r = 0; r < R; ++r) {
            sum[r][0] = P::load(result + r * stride + tile);
            if constexpr (CHAINS == 2) sum[r][1] = P::all(0);
        }
        int s = 0;
        for (; s + CHAINS <= count; s += CHAINS)
            for (int chain = 0; chain < CHAINS; ++chain) {
                const P row = P::load(rows + int64_t(s + chain) * n + tile);
                for (int r = 0; r < R; ++r) sum[r][chain] += row * x[r * x_row + (s + chain) * x_step];
            }
        for (; s < count; ++s)
            for (int r = 0; r < R; ++r) sum[r][0] += P::load(rows + int64_t(s) * n + tile) * x[r * x_row + s * x_step];
        for (int r = 0; r < R; ++r) {
            if constexpr (CHAINS == 2) sum[r][0] += sum[r][1];
            sum[r][0].store(result + r * stride + tile);
        }
    }
}

// result (count,n) = x (count,m) matrix (m,n) for count <= 4 rows; x has its rows x_stride apart, n is whole tiles.
template <class T>
INLINE void multiply(const T* x, int64_t x_stride, int count, int m, const T* matrix, int n, T* result) {
    for (int i = 0; i < count * n; ++i) result[i] = 0;
    if (count == 4) return add_rows<4>(matrix, m, n, x, x_stride, 1, result, n);
    for (int r = 0; r < count; ++r) add_rows<1>(matrix, m, n, x + r * x_stride, 0, 1, result + r * n, 0);
}

// Heads first..last-1 of result (H,Dv,K) = sum_i g_i (x) c_i, of g (N,H,Dv) and c (N,H,K), atom after atom in blocks.
template <class T>
void sum_outer_products(const T* g, const T* c, int64_t atoms, int heads, int values, int num, int64_t first,
                        int64_t last, T* result) {
    using P = Pack<T, TILE>;
    constexpr int WIDE = 8;        // values at once
    constexpr int64_t ATOMS = 64;  // a sum over many atoms is one of shorter sums: less rounding
    for (int64_t h = first; h < last; ++h) {
        T* matrix = result + h * values * num;
        for (int x = 0; x < values * num; ++x) matrix[x] = 0;
        for (int64_t begin = 0; begin < atoms; begin += ATOMS) {
            const int64_t end = begin + ATOMS < atoms ? begin + ATOMS : atoms;
            for (int d = 0; d < values; d += WIDE) {
                const int n = values - d < WIDE ? values - d : WIDE;
                int m = 0;
                for (; m + TILE <= num; m += TILE) {
                    P sum[WIDE];
                    for (int k = 0; k < WIDE; ++k) sum[k] = P::all(0);
                    for (int64_t i = begin; i < end; ++i) {
                        const P row = P::load(c + (i * heads + h) * num + m);
                        const T* at = g + (i * heads + h) * values + d;
                        if (n == WIDE)
                            for (int k = 0; k < WIDE; ++k) sum[k] += row * at[k];
                        else
                            for (int k = 0; k < n; ++k) sum[k] += row * at[k];
                    }
                    for (int k = 0; k < n; ++k) {
                        T* place = matrix + (d + k) * num + m;
                        (P::load(place) + sum[k]).store(place);
                    }
                }
                for (; m < num; ++m)
                    for (int k = 0; k < n; ++k) {
                        T sum = 0;
                        for (int64_t i = begin; i < end; ++i)
                            sum += g[(i * heads + h) * values + d + k] * c[(i * heads + h) * num + m];
                        matrix[(d + k) * num + m] += sum;
                    }
            }
        }
    }
}

}  // namespace crystalformer::LEVEL
