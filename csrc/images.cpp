#include "images.h"

#include <atomic>
#include <cmath>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "crystals.h"
#include "near_pairs.h"

namespace crystalformer {

namespace {

// As in geometry/truncation.py.
constexpr int SPLITS = 25, BISECTIONS = 12, GRID = 1 << BISECTIONS;

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

// About how many images a crystal has, as in geometry/limits.py.
double expected_images(const Cell& cell, double rows, double atoms, double radius2, bool every_pair) {
    constexpr double BALL = M_PI / 6;  // of the box around it
    double box = 1, own = 1;
    for (int k = 0; k < 3; ++k) {
        const double cells = 2 * std::sqrt(radius2) / cell.t[k][k];
        box *= cells;
        own *= std::max(1.0, cells);
    }
    own = std::max(1.0, BALL * own);
    return every_pair ? rows * atoms * own : rows * std::max(atoms * BALL * box, own);
}

[[noreturn]] void refuse(const ImageRequest& in, const std::string& number, double radius2, int64_t crystal) {
    std::ostringstream message;
    message << "images must number at most max_images=" << in.max_images << ", but there are " << number << " within "
            << std::sqrt(radius2) << " Å of the atoms of lattice[" << crystal
            << "]: raise decay_min, tol or max_images, or take a shorter cutoff";
    throw std::invalid_argument(message.str());
}

// Ends a row's search early, when it is given up or there are too many images.
struct Watch {
    static constexpr size_t OFTEN = 1 << 16;
    const ImageRequest& in;
    const Threads& threads;
    std::atomic<int64_t>& found;  // images of the rows that have been searched
    const int64_t crystal;
    const double radius2;
    size_t next = OFTEN;

    // To be called during a row's search, with its number of images so far.
    void operator()(size_t images) {
        if (images >= next) look(images);
    }
    void look(size_t images) {
        next = images + OFTEN;
        threads.poll();
        if (found + int64_t(images) > in.max_images) refuse(in, "more", radius2, crystal);
    }
    void done(size_t images) {
        look(images);
        found += int64_t(images);
    }
};

// All images with |center + n T|^2 <= radius2, axis by axis, with no candidate outside (Fincke and Pohst, 1985).
void add_points(const Cell& cell, const Vector& center, double radius2, int32_t col, std::vector<FoundImage>& found,
                Watch& watch) {
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
            watch(found.size());
            for (double n2 = first[2]; n2 <= last[2]; ++n2) {
                const double z = z1 + n2 * t[2][2];
                found.push_back({x * x + y * y + z * z, col, {int32_t(n0), int32_t(n1), int32_t(n2)}});
            }
        }
    }
}

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
    NearAtoms near;
    std::vector<FoundImage> images;
    std::vector<double> weight;
    std::vector<size_t> first;                           // (pairs+1)
    std::vector<double> pair_outer2, pair_beyond, sums;  // with every_pair the first two, else the third

    void clear() {
        images.clear();
        weight.clear();
        first.clear();
        pair_outer2.clear();
        pair_beyond.clear();
        sums.clear();
    }
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

// A crystal, and how far its images are looked for.
struct Crystal {
    Cell cell;
    TailRadius tail;
    double rows, atoms, decay_min, log_beyond;
    double outer2;    // squared radius of what is enumerated; with every_pair of a pair of middling distance
    double longest2;  // of any pair

    Crystal(const ImageRequest& in, int64_t c, double slack)
        : cell(in.lattice + 9 * c),
          tail(cell, in.decay_min[c]),
          rows(double(in.orbits ? in.orbits->ptr[c + 1] - in.orbits->ptr[c] : in.ptr[c + 1] - in.ptr[c])),
          atoms(double(in.ptr[c + 1] - in.ptr[c])),
          decay_min(in.decay_min[c]),
          log_beyond(slack - in.logit_range - std::log(atoms)) {
        if (in.cutoff) {
            longest2 = outer2 = *in.cutoff * *in.cutoff;
        } else if (in.every_pair) {
            // The near image of a pair lies in the box around the atom whose edges are the diagonal of T.
            double box2 = 0;
            for (int k = 0; k < 3; ++k) box2 += cell.t[k][k] * cell.t[k][k];
            outer2 = tail.squared(slack - decay_min * box2 / 12);
            longest2 = tail.squared(slack - decay_min * box2 / 4);
        } else {
            longest2 = outer2 = tail.squared(log_beyond);
        }
    }
};

void check_number(const ImageRequest& in, const std::vector<Crystal>& crystals) {
    double total = 0, most = 0;
    int64_t largest = 0;
    for (size_t c = 0; c < crystals.size(); ++c) {
        const Crystal& x = crystals[c];
        const double number = expected_images(x.cell, x.rows, x.atoms, x.outer2, in.every_pair);
        if (number > most) largest = int64_t(c), most = number;
        total += number;
    }
    if (total <= double(in.max_images)) return;
    std::ostringstream number;
    number << "about " << total << ", most of them";
    refuse(in, number.str(), crystals[size_t(largest)].outer2, largest);
}

void check_shifts(const NearPairs& pairs, double longest2, int64_t crystal) {
    const double cells = pairs.most_cells(std::sqrt(longest2));
    if (cells < double(INT32_MAX)) return;
    std::ostringstream message;
    message << "positions must be less than 2^31 cells apart, but those of lattice[" << crystal << "] are " << cells;
    throw std::invalid_argument(message.str());
}

// The squared cutoffs (n,n) of the pairs of a crystal, so that the list is symmetric: the sums of (i, j) and (j, i) are
// equal up to rounding. With orbits all pairs of two orbits have one.
double make_symmetric(double* chosen, int64_t n, const int64_t* orbit, int64_t first_orbit, int64_t orbits) {
    const auto of = [&](int64_t i) { return orbit ? orbit[i] - first_orbit : i; };
    std::vector<double> largest(size_t(orbits * orbits));
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j)
            for (const int64_t at : {of(i) * orbits + of(j), of(j) * orbits + of(i)})
                largest[size_t(at)] = std::max(largest[size_t(at)], chosen[i * n + j]);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) chosen[i * n + j] = largest[size_t(of(i) * orbits + of(j))];
    return *std::max_element(largest.begin(), largest.end());
}

}  // namespace

std::vector<int64_t> Orbits::first_atoms(int64_t atoms, int64_t crystals) const {
    std::vector<int64_t> first(size_t(ptr[crystals]), -1);
    for (int64_t i = 0; i < atoms; ++i)
        if (first[size_t(orbit[i])] < 0) first[size_t(orbit[i])] = i;
    return first;
}

ImageSearch::ImageSearch(const ImageRequest& in, const Threads& threads, int64_t* row_ptr, double* cutoff)
    : rows_(size_t(in.atoms)) {
    const std::vector<int64_t> crystal = crystal_of_atom(in.ptr, in.crystals);
    const double slack = std::log(in.tol * in.beyond);
    std::vector<Crystal> crystals;
    for (int64_t c = 0; c < in.crystals; ++c) crystals.emplace_back(in, c, slack);
    check_number(in, crystals);
    std::vector<Vector> rotated(size_t(in.atoms));
    for (size_t i = 0; i < rotated.size(); ++i) rotated[i] = crystals[crystal[i]].cell.rotate(in.positions + 3 * i);
    std::vector<NearPairs> pairs_of;
    for (int64_t c = 0; c < in.crystals; ++c) {
        const Crystal& x = crystals[c];
        pairs_of.emplace_back(x.cell, rotated.data() + in.ptr[c], in.ptr[c + 1] - in.ptr[c],
                              in.every_pair ? INFINITY : std::sqrt(x.outer2));
        check_shifts(pairs_of.back(), x.longest2, c);
    }

    // Each row's cutoff as a number of the bisection's grid: the crystal's is the largest. With every_pair each pair
    // has its own squared cutoff.
    std::vector<std::atomic<int>> largest(size_t(in.crystals));
    std::vector<int64_t> first_pair(size_t(in.atoms) + 1);
    for (int64_t i = 0; i < in.atoms; ++i)
        first_pair[i + 1] = first_pair[i] + in.ptr[crystal[i] + 1] - in.ptr[crystal[i]];
    std::vector<double> pair_cutoff2(in.every_pair ? size_t(first_pair[in.atoms]) : 0);
    std::atomic<int64_t> found{0};

    const auto search_row = [&](int64_t i, Row& row) {
        const int64_t c = crystal[i], begin = in.ptr[c];
        const Crystal& here = crystals[c];
        const double a = here.decay_min;
        Watch watch{in, threads, found, c, here.outer2};
        row.clear();
        pairs_of[c].of(i - begin, row.near);
        for (const int32_t in_crystal : row.near.atoms) {
            const int64_t j = begin + in_crystal;
            const Vector r = {rotated[j][0] - rotated[i][0], rotated[j][1] - rotated[i][1],
                              rotated[j][2] - rotated[i][2]};
            const double near2 = in.every_pair ? near_image2(here.cell, r) : 0;
            const double radius2 = in.every_pair ? here.tail.squared(slack - a * near2) : here.outer2;
            row.first.push_back(row.images.size());
            add_points(here.cell, r, radius2, int32_t(j), row.images, watch);
            if (in.every_pair) {
                // Relative to the pair's nearest image: far pairs would underflow, and relative to the image at near2,
                // which a skewed cell has far from the nearest, they would overflow.
                const double nearest2 = row.last_pair_nearest2();
                row.pair_outer2.push_back(radius2);
                row.pair_beyond.push_back(std::exp(slack - a * (near2 - nearest2)));
                row.weigh_last_pair(a, nearest2);
            } else if (!in.cutoff) {
                row.weigh_last_pair(a, 0);
            }
        }
        row.first.push_back(row.images.size());
        watch.done(row.images.size());
        rows_[i].assign(row.images.begin(), row.images.end());
        if (in.cutoff) return;
        const size_t pairs = row.near.atoms.size();
        if (in.every_pair) {
            for (size_t p = 0; p < pairs; ++p) {
                threads.poll();
                const double allowed = in.tol * row.whole(p), outer2 = row.pair_outer2[p];
                const int k = bisect(
                    0, [&](int k) { return row.beyond(p, grid_value(outer2, k)) + row.pair_beyond[p] <= allowed; });
                pair_cutoff2[first_pair[i] + int64_t(p)] = grid_value(outer2, k);
            }
            return;
        }
        // Equation (12).
        const double beyond = std::exp(here.log_beyond), spread = std::exp(in.logit_range);
        for (size_t p = 0; p < pairs; ++p) row.sums.push_back(row.whole(p));
        const auto holds = [&](int k) {
            threads.poll();
            const double cutoff2 = grid_value(here.outer2, k);
            double sum = (here.atoms - double(pairs)) * beyond * spread;  // pairs too far apart for any image
            for (size_t p = 0; p < pairs; ++p) {
                const double excess = row.beyond(p, cutoff2) + beyond - in.tol * row.sums[p];
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
    std::vector<int64_t> searched(size_t(in.atoms));
    std::iota(searched.begin(), searched.end(), 0);
    if (in.orbits) searched = in.orbits->first_atoms(in.atoms, in.crystals);
    threads.for_chunks(int64_t(searched.size()), 1, [&] {
        return [&, row = Row{}](int64_t first, int64_t last) mutable {
            for (int64_t r = first; r < last; ++r) search_row(searched[size_t(r)], row);
        };
    });

    std::vector<double> cutoff2(size_t(in.crystals));
    for (int64_t c = 0; c < in.crystals; ++c) {
        if (in.cutoff) {
            cutoff[c] = *in.cutoff;
            continue;
        }
        cutoff2[c] = grid_value(crystals[c].outer2, std::max(1, largest[c].load()));
        const int64_t n = in.ptr[c + 1] - in.ptr[c];
        if (in.every_pair) {
            double* chosen = pair_cutoff2.data() + first_pair[in.ptr[c]];
            cutoff2[c] = in.orbits ? make_symmetric(chosen, n, in.orbits->orbit + in.ptr[c], in.orbits->ptr[c],
                                                    in.orbits->ptr[c + 1] - in.orbits->ptr[c])
                                   : make_symmetric(chosen, n, nullptr, 0, n);
        }
        cutoff[c] = std::sqrt(cutoff2[c]);
    }
    threads.for_chunks(in.cutoff ? 0 : in.atoms, 4, [&] {
        return [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
                const int64_t begin = in.ptr[crystal[i]];
                std::erase_if(rows_[i], [&](const FoundImage& e) {
                    const double cutoff2_here =
                        in.every_pair ? pair_cutoff2[first_pair[i] + e.col - begin] : cutoff2[crystal[i]];
                    return e.d2 > (in.orbits ? std::pow(std::sqrt(cutoff2_here) + in.orbits->spread, 2) : cutoff2_here);
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
