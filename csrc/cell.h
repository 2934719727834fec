// A crystal's cell in the rotated frame in which it is triangular.
#pragma once

#include <array>
#include <cmath>

namespace crystalformer {

using Vector = std::array<double, 3>;

inline double dot(const Vector& a, const Vector& b) {
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}

// L = T Q, T upper triangular with a positive diagonal, Q orthogonal: Gram-Schmidt from the last row up.
struct Cell {
    Vector t[3], q[3];

    explicit Cell(const double* lattice) {
        for (int row = 2; row >= 0; --row) {
            Vector rest = {lattice[3 * row], lattice[3 * row + 1], lattice[3 * row + 2]};
            t[row] = {};
            for (int k = 2; k > row; --k) {
                t[row][k] = dot(rest, q[k]);
                for (int x = 0; x < 3; ++x) rest[x] -= t[row][k] * q[k][x];
            }
            t[row][row] = std::sqrt(dot(rest, rest));
            for (int x = 0; x < 3; ++x) q[row][x] = rest[x] / t[row][row];
        }
    }
    Vector rotate(const double* p) const {
        return {dot({p[0], p[1], p[2]}, q[0]), dot({p[0], p[1], p[2]}, q[1]), dot({p[0], p[1], p[2]}, q[2])};
    }
};

}  // namespace crystalformer
