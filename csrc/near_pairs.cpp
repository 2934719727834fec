#include "near_pairs.h"

#include <algorithm>

namespace crystalformer {

namespace {

constexpr int64_t NEAR_BINS = 2;      // to either side, along each axis
constexpr double SHIFTER = 0x1.8p52;  // added and subtracted, it rounds to an integer

}  // namespace

NearPairs::NearPairs(const Cell& cell, const Vector* rotated, int64_t atoms, double radius) : atoms_(atoms) {
    const auto& t = cell.t;
    // The columns of T^-1: their products with a position are its fractional coordinates.
    const Vector normals[3] = {
        {1 / t[0][0], 0, 0},
        {-t[0][1] / (t[0][0] * t[1][1]), 1 / t[1][1], 0},
        {(t[0][1] * t[1][2] / t[1][1] - t[0][2]) / (t[0][0] * t[2][2]), -t[1][2] / (t[1][1] * t[2][2]), 1 / t[2][2]}};
    for (int axis = 0; axis < 3; ++axis) {
        spacing_[axis] = 1 / std::sqrt(dot(normals[axis], normals[axis]));
        fraction_[axis].reserve(size_t(atoms));
        double low = INFINITY, high = -INFINITY;
        for (int64_t i = 0; i < atoms; ++i) {
            const double x = dot(rotated[i], normals[axis]);
            fraction_[axis].push_back(x);
            low = std::min(low, x);
            high = std::isfinite(x) ? std::max(high, x) : INFINITY;
        }
        extent_[axis] = high - low;
        const double rounding = 0x1p-50 * std::max(std::abs(low), std::abs(high)) * spacing_[axis];
        reach_[axis] = radius * (1 + 1e-9) + 1e-9 + rounding;
    }
    make_bins();
}

void NearPairs::make_bins() {
    // Atoms that may be near differ by NEAR_BINS bins at most. An axis with so few bins that all are near has one.
    for (int axis = 0; axis < 3; ++axis) {
        const double most = (1 - 1e-9) * double(NEAR_BINS) * spacing_[axis] / reach_[axis];
        bins_[axis] = std::max(int64_t(1), int64_t(std::min(most, double(atoms_))));
    }
    while (double(bins_[0]) * double(bins_[1]) * double(bins_[2]) > double(atoms_))
        *std::max_element(bins_, bins_ + 3) /= 2;
    for (int64_t& bins : bins_)
        if (bins <= 2 * NEAR_BINS + 1) bins = 1;
    const int64_t number = bins_[0] * bins_[1] * bins_[2];
    if (number == 1) return;
    std::vector<int32_t> bin(size_t(atoms_), 0);
    start_.assign(size_t(number) + 2, 0);
    for (int64_t i = 0; i < atoms_; ++i) {
        bin[i] = int32_t((bin_of(i, 0) * bins_[1] + bin_of(i, 1)) * bins_[2] + bin_of(i, 2));
        ++start_[bin[i] + 2];
    }
    for (int64_t b = 0; b < number; ++b) start_[b + 2] += start_[b + 1];
    binned_.resize(size_t(atoms_));
    for (int64_t i = 0; i < atoms_; ++i)
        binned_[start_[bin[i] + 1]++] = {{fraction_[0][i], fraction_[1][i], fraction_[2][i]}, int32_t(i)};
}

int64_t NearPairs::bin_of(int64_t i, int axis) const {
    const double x = fraction_[axis][i];
    return std::min(int64_t((x - std::floor(x)) * double(bins_[axis])), bins_[axis] - 1);
}

double NearPairs::most_cells(double radius) const {
    double cells = 0;
    for (int axis = 0; axis < 3; ++axis) cells = std::max(cells, extent_[axis] + radius / spacing_[axis]);
    return cells;
}

bool NearPairs::may_be_near(int64_t i, const Vector& fraction) const {
    bool near = true;
    for (int axis = 0; axis < 3; ++axis) {
        const double x = fraction[axis] - fraction_[axis][i];
        near &= std::abs(x - ((x + SHIFTER) - SHIFTER)) * spacing_[axis] <= reach_[axis];
    }
    return near;
}

void NearPairs::of(int64_t i, NearAtoms& near) const {
    if (binned_.empty()) {
        near.atoms.resize(size_t(atoms_));
        size_t count = 0;
        for (int64_t j = 0; j < atoms_; ++j) {
            near.atoms[count] = int32_t(j);
            count += may_be_near(i, {fraction_[0][j], fraction_[1][j], fraction_[2][j]});
        }
        near.atoms.resize(count);
        return;
    }
    near.sorter.resize(atoms_);
    int64_t bin[3][2 * NEAR_BINS + 1], number[3];
    for (int axis = 0; axis < 3; ++axis) {
        number[axis] = bins_[axis] > 1 ? 2 * NEAR_BINS + 1 : 1;
        const int64_t first = bins_[axis] > 1 ? bin_of(i, axis) - NEAR_BINS + bins_[axis] : 0;
        for (int64_t b = 0; b < number[axis]; ++b) bin[axis][b] = (first + b) % bins_[axis];
    }
    for (int64_t x = 0; x < number[0]; ++x)
        for (int64_t y = 0; y < number[1]; ++y)
            for (int64_t z = 0; z < number[2]; ++z) {
                const int64_t here = (bin[0][x] * bins_[1] + bin[1][y]) * bins_[2] + bin[2][z];
                for (int32_t a = start_[here]; a < start_[here + 1]; ++a) {
                    near.sorter.add_if(may_be_near(i, binned_[a].fraction), binned_[a].atom);
                }
            }
    near.atoms.clear();
    near.sorter.move_to(near.atoms);
}

}  // namespace crystalformer
