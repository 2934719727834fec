#include "images.h"

#include <array>
#include <atomic>
#include <cmath>

#include "crystals.h"

namespace crystalformer {

namespace {

// As in crystalformer/truncation.py.
constexpr int SPLITS = 25, BISECTIONS = 12, GRID = 1 << BISECTIONS;

using Vector = std::array<double, 3>;

double dot(const Vector& a, const Vector& b) {
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

// Squared radius beyond which a Gaussian sum over the lattice is at most exp(slack), equation (10).
class TailRadius {
  public:
    TailRadius(const Cell& cell, double a) : a_(a) {
        const double step = (0.5 - 0.02) / (SPLITS - 1);
        for (int s = 0; s < SPLITS; ++s) {
            const double split = s < SPLITS / 2 ? 0.02 + step * s : 0.5 - step * (SPLITS - 1 - s);
            b_[s] = split * a;
            bound_[s] = 0;
            for (int k = 0; k < 3; ++k) bound_[s] += std::log1p(std::sqrt(M_PI / b_[s]) / cell.t[k][k]);
        }
    }
    double squared(double slack) const {
        double best = (bound_[0] - slack) / (a_ - b_[0]);
        for (int s = 1; s < SPLITS; ++s) best = std::min(best, (bound_[s] - slack) / (a_ - b_[s]));
        return std::max(best, 0.0);
    }

  private:
    double a_, b_[SPLITS], bound_[SPLITS];
};

// All images with |center + n T|^2 <= radius2, axis by axis, with no candidate outside (Fincke and Pohst, 1985).
void add_points(const Cell& cell, const Vector& center, double radius2, int32_t col, std::vector<FoundImage>& found) {
    const auto range = [](double x, double step, double left, double& first, double& last) {
        const double middle = -x / step, half = std::sqrt(std::max(left, 0.0)) / step;
        first = std::ceil(middle - half);
        last = std::floor(middle + half);
    };
    const auto& t = cell.t;
    double first[3], last[3];
    range(center[0], t[0][0], radius2, first[0], last[0]);
    for (double n0 = first[0]; n0 <= last[0]; ++n0) {
        const double x = center[0] + n0 * t[0][0], y0 = center[1] + n0 * t[0][1], z0 = center[2] + n0 * t[0][2];
        const double left_y = radius2 - x * x;
        range(y0, t[1][1], left_y, first[1], last[1]);
        for (double n1 = first[1]; n1 <= last[1]; ++n1) {
            const double y = y0 + n1 * t[1][1], z1 = z0 + n1 * t[1][2], left_z = left_y - y * y;
            range(z1, t[2][2], left_z, first[2], last[2]);
            for (double n2 = first[2]; n2 <= last[2]; ++n2) {
                const double z = z1 + n2 * t[2][2];
                found.push_back({x * x + y * y + z * z, col, {int32_t(n0), int32_t(n1), int32_t(n2)}});
            }
        }
    }
}

// Sorts out pairs of atoms that are too far apart: no image of j is nearer to i than the nearest of the lattice planes
// through its images, for each of the three families of planes that bound the cell.
class NearPairs {
  public:
    NearPairs(const Cell& cell, const Vector* rotated, int64_t atoms) : atoms_(atoms) {
        const auto& t = cell.t;
        // The columns of T^-1: their products with a position are its fractional coordinates.
        const Vector normals[3] = {{1 / t[0][0], 0, 0},
                                   {-t[0][1] / (t[0][0] * t[1][1]), 1 / t[1][1], 0},
                                   {(t[0][1] * t[1][2] / t[1][1] - t[0][2]) / (t[0][0] * t[2][2]),
                                    -t[1][2] / (t[1][1] * t[2][2]), 1 / t[2][2]}};
        for (int axis = 0; axis < 3; ++axis) {
            spacing_[axis] = 1 / std::sqrt(dot(normals[axis], normals[axis]));
            for (int64_t i = 0; i < atoms; ++i) fraction_[axis].push_back(dot(rotated[i], normals[axis]));
        }
    }
    // The atoms, in order, that may have images within `radius` of atom i.
    void of(int64_t i, double radius, std::vector<int32_t>& near) const {
        constexpr double SHIFTER = 0x1.8p52;  // added and subtracted, it rounds to an integer
        near.resize(size_t(atoms_));
        int64_t count = 0;
        for (int64_t j = 0; j < atoms_; ++j) {
            double distance = 0;
            for (int axis = 0; axis < 3; ++axis) {
                const double x = fraction_[axis][j] - fraction_[axis][i];
                distance = std::max(distance, std::abs(x - ((x + SHIFTER) - SHIFTER)) * spacing_[axis]);
            }
            near[count] = int32_t(j);
            count += distance <= radius * (1 + 1e-9) + 1e-9;  // fractions are rounded
        }
        near.resize(size_t(count));
    }

  private:
    int64_t atoms_;
    double spacing_[3];
    std::vector<double> fraction_[3];
};

// Squared distance of an image near to the nearest one (Babai's nearest plane).
double near_image2(const Cell& cell, Vector x) {
    for (int axis = 0; axis < 3; ++axis) {
        const double n = std::nearbyint(x[axis] / cell.t[axis][axis]);
        for (int k = 0; k < 3; ++k) x[k] -= n * cell.t[axis][k];
    }
    return dot(x, x);
}

// The bisection of (0, high] to one part in GRID ends at the value number `k` of these, k = 1..GRID.
double grid_value(double high, int k) {
    double low = 0;
    for (int step = GRID / 2, at = 0; step; step /= 2) {
        const double middle = 0.5 * (low + high);
        if (at + step >= k)
            high = middle;
        else
            low = middle, at += step;
    }
    return high;
}

// The smallest k in (low, GRID] at which a monotone condition holds; it is known to hold at GRID.
template <class Holds>
int bisect(int low, const Holds& holds) {
    int high = GRID;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (holds(middle) ? high : low) = middle;
    }
    return high;
}

// One row's images, their weights, and where each pair's begin.
struct Row {
    std::vector<FoundImage>& images;
    std::vector<double> weight;
    std::vector<size_t> first;  // (pairs+1)

    // exp(a (relative2 - d^2)) of the images of the pair enumerated last.
    void weigh_last_pair(double a, double relative2) {
        for (size_t e = first.back(); e < images.size(); ++e)
            weight.push_back(std::exp(a * (relative2 - images[e].d2)));
    }
    double last_pair_nearest2() const {
        double nearest2 = INFINITY;
        for (size_t e = first.back(); e < images.size(); ++e) nearest2 = std::min(nearest2, images[e].d2);
        return nearest2;
    }
    double whole(size_t pair) const { return beyond(pair, -1); }
    double beyond(size_t pair, double cutoff2) const {
        double sum = 0;
        for (size_t e = first[pair]; e < first[pair + 1]; ++e) sum += images[e].d2 > cutoff2 ? weight[e] : 0;
        return sum;
    }
};

}  // namespace

ImageSearch::ImageSearch(const ImageRequest& in, const Threads& threads, int64_t* row_ptr, double* cutoff)
    : rows_(size_t(in.atoms)) {
    const std::vector<int64_t> crystal = crystal_of_atom(in.ptr, in.crystals);
    std::vector<Cell> cells;
    std::vector<TailRadius> tails;
    for (int64_t c = 0; c < in.crystals; ++c) {
        cells.emplace_back(in.lattice + 9 * c);
        tails.emplace_back(cells.back(), in.decay_min[c]);
    }
    std::vector<Vector> rotated(size_t(in.atoms));
    for (size_t i = 0; i < rotated.size(); ++i) rotated[i] = cells[crystal[i]].rotate(in.positions + 3 * i);
    std::vector<NearPairs> pairs_of;
    for (int64_t c = 0; c < in.crystals; ++c)
        pairs_of.emplace_back(cells[c], rotated.data() + in.ptr[c], in.ptr[c + 1] - in.ptr[c]);

    const double slack = std::log(in.tol * in.beyond);
    std::vector<double> log_beyond(size_t(in.crystals)), outer2(size_t(in.crystals));
    for (size_t c = 0; c < outer2.size(); ++c) {
        log_beyond[c] = slack - in.logit_range - std::log(double(in.ptr[c + 1] - in.ptr[c]));
        outer2[c] = in.cutoff ? *in.cutoff * *in.cutoff : tails[c].squared(log_beyond[c]);
    }

    // Each row's cutoff as a number of the bisection's grid: the crystal's is the largest. With every_pair each pair
    // has its own squared cutoff.
    std::vector<std::atomic<int>> largest(size_t(in.crystals));
    std::vector<int64_t> first_pair(size_t(in.atoms) + 1);
    for (int64_t i = 0; i < in.atoms; ++i)
        first_pair[i + 1] = first_pair[i] + in.ptr[crystal[i] + 1] - in.ptr[crystal[i]];
    std::vector<double> pair_cutoff2(in.every_pair ? size_t(first_pair[in.atoms]) : 0);

    const auto search_row = [&](int64_t i, Row& row) {
        const int64_t c = crystal[i], begin = in.ptr[c], atoms = in.ptr[c + 1] - begin;
        const double a = in.decay_min[c];
        const Cell& cell = cells[c];
        std::vector<int32_t> near;
        std::vector<double> pair_outer2, pair_beyond;  // with every_pair
        pairs_of[c].of(i - begin, in.every_pair ? INFINITY : std::sqrt(outer2[c]), near);
        for (const int32_t in_crystal : near) {
            const int64_t j = begin + in_crystal;
            const Vector r = {rotated[j][0] - rotated[i][0], rotated[j][1] - rotated[i][1],
                              rotated[j][2] - rotated[i][2]};
            const double near2 = in.every_pair ? near_image2(cell, r) : 0;
            const double radius2 = in.every_pair ? tails[c].squared(slack - a * near2) : outer2[c];
            row.first.push_back(row.images.size());
            add_points(cell, r, radius2, int32_t(j), row.images);
            if (in.every_pair) {
                // Relative to the pair's nearest image: far pairs would underflow, and relative to the image at near2,
                // which a skewed cell has far from the nearest, they would overflow.
                const double nearest2 = row.last_pair_nearest2();
                pair_outer2.push_back(radius2);
                pair_beyond.push_back(std::exp(slack - a * (near2 - nearest2)));
                row.weigh_last_pair(a, nearest2);
            } else if (!in.cutoff) {
                row.weigh_last_pair(a, 0);
            }
        }
        row.first.push_back(row.images.size());
        if (in.cutoff) return;
        const size_t pairs = near.size();
        if (in.every_pair) {
            for (size_t p = 0; p < pairs; ++p) {
                const double allowed = in.tol * row.whole(p);
                const int k = bisect(
                    0, [&](int k) { return row.beyond(p, grid_value(pair_outer2[p], k)) + pair_beyond[p] <= allowed; });
                pair_cutoff2[first_pair[i] + p] = grid_value(pair_outer2[p], k);
            }
            return;
        }
        // Equation (12).
        const double beyond = std::exp(log_beyond[c]), spread = std::exp(in.logit_range);
        std::vector<double> whole;
        for (size_t p = 0; p < pairs; ++p) whole.push_back(row.whole(p));
        const auto holds = [&](int k) {
            const double cutoff2 = grid_value(outer2[c], k);
            double sum = double(atoms - int64_t(pairs)) * beyond * spread;  // pairs too far apart for any image
            for (size_t p = 0; p < pairs; ++p) {
                const double excess = row.beyond(p, cutoff2) + beyond - in.tol * whole[p];
                sum += excess > 0 ? excess * spread : excess;
            }
            return !(sum > 0);
        };
        int known = largest[c].load(std::memory_order_relaxed);
        if (known && holds(known)) return;
        const int k = bisect(known, holds);
        while (known < k && !largest[c].compare_exchange_weak(known, k, std::memory_order_relaxed)) {
        }
    };
    threads.for_chunks(in.atoms, 1, [&] {
        return [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
                Row row{rows_[i], {}, {}};
                search_row(i, row);
            }
        };
    });

    for (int64_t c = 0; c < in.crystals; ++c) {
        if (in.cutoff) {
            cutoff[c] = *in.cutoff;
            continue;
        }
        double cutoff2 = grid_value(outer2[c], std::max(1, largest[c].load()));
        const int64_t n = in.ptr[c + 1] - in.ptr[c];
        if (in.every_pair) {  // the sums of (i, j) and (j, i) are equal up to rounding; the list must be symmetric
            double* chosen = pair_cutoff2.data() + first_pair[in.ptr[c]];
            cutoff2 = 0;
            for (int64_t i = 0; i < n; ++i)
                for (int64_t j = 0; j <= i; ++j) {
                    chosen[i * n + j] = chosen[j * n + i] = std::max(chosen[i * n + j], chosen[j * n + i]);
                    cutoff2 = std::max(cutoff2, chosen[i * n + j]);
                }
        }
        cutoff[c] = std::sqrt(cutoff2);
        outer2[c] = cutoff2;
    }
    threads.for_chunks(in.atoms, 4, [&] {
        return [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last && !in.cutoff; ++i) {
                const int64_t begin = in.ptr[crystal[i]];
                std::erase_if(rows_[i], [&](const FoundImage& e) {
                    const double cutoff2 =
                        in.every_pair ? pair_cutoff2[first_pair[i] + e.col - begin] : outer2[crystal[i]];
                    return e.d2 > cutoff2;
                });
            }
        };
    });
    row_ptr[0] = 0;
    for (int64_t i = 0; i < in.atoms; ++i) row_ptr[i + 1] = row_ptr[i] + int64_t(rows_[i].size());
}

void ImageSearch::write(const int64_t* row_ptr, int32_t* col, int32_t* shift, const Threads& threads) const {
    threads.for_chunks(int64_t(rows_.size()), 4, [&] {
        return [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i)
                for (size_t e = 0; e < rows_[i].size(); ++e) {
                    col[row_ptr[i] + int64_t(e)] = rows_[i][e].col;
                    std::copy(rows_[i][e].n, rows_[i][e].n + 3, shift + 3 * (row_ptr[i] + int64_t(e)));
                }
        };
    });
}

}  // namespace crystalformer
