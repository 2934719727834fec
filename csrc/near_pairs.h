// Which atoms of a crystal may have images near which.
#pragma once

#include <cstdint>
#include <vector>

#include "cell.h"

namespace crystalformer {

// The atoms near one, in order; and the memory that it takes to find them.
struct NearAtoms {
    std::vector<int32_t> atoms;
    std::vector<uint64_t> marked;  // a bit for each atom of the crystal; none is set between searches
};

// Sorts out pairs of atoms that are too far apart: no image of j is nearer to i than the nearest of the lattice planes
// through its images, for each of the three families of planes that bound the cell. Where the cell is large beside the
// radius it is cut into bins, and only atoms of near bins are looked at: the work grows with the number of atoms, not
// with its square.
class NearPairs {
  public:
    // rotated: positions (atoms) in the frame of the cell. radius: of the searches, infinite to find all atoms.
    NearPairs(const Cell& cell, const Vector* rotated, int64_t atoms, double radius);

    // The atoms that may have images within the radius of atom i.
    void of(int64_t i, NearAtoms& near) const;

    // A bound on |n| of all images (i, j, n) within a radius, of all atoms.
    double most_cells(double radius) const;

  private:
    bool may_be_near(int64_t i, int64_t j) const;
    void make_bins();
    int64_t bin_of(int64_t i, int axis) const;

    int64_t atoms_;
    double spacing_[3], extent_[3];  // of the planes, Å; of the atoms, in cells
    double reach_[3];                // the radius, Å, with what rounding may add
    std::vector<double> fraction_[3];
    int64_t bins_[3] = {1, 1, 1};        // along each axis
    std::vector<int32_t> start_, atom_;  // the atoms of each bin, in order; empty where there is one bin
};

}  // namespace crystalformer
