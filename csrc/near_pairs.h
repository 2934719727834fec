// Which atoms of a crystal may have images near which.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "cell.h"

namespace crystalformer {

// Takes numbers in any order and returns them sorted, each once.
class Sorter {
  public:
    // For numbers below `size`; it is empty.
    void resize(int64_t size) {
        bits_.resize(size_t(size) / 64 + 1);
        words_.resize(size_t(size) / 4096 + 1);
    }
    void add_if(bool wanted, int32_t x) {
        bits_[x / 64] |= uint64_t(wanted) << (x % 64);
        words_[x / 4096] |= uint64_t(wanted) << (x / 64 % 64);
    }
    void move_to(std::vector<int32_t>& sorted) {
        for (size_t group = 0; group < words_.size(); ++group)
            for (; words_[group]; words_[group] &= words_[group] - 1) {
                const size_t word = 64 * group + size_t(std::countr_zero(words_[group]));
                for (; bits_[word]; bits_[word] &= bits_[word] - 1)
                    sorted.push_back(int32_t(64 * word) + std::countr_zero(bits_[word]));
            }
    }

  private:
    std::vector<uint64_t> bits_, words_;  // of the numbers; of the words of bits_ that are not zero
};

// The atoms near one, in order; and the memory that it takes to find them.
struct NearAtoms {
    std::vector<int32_t> atoms;
    Sorter sorter;
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
    struct Binned {
        Vector fraction;
        int32_t atom;
    };

    bool may_be_near(int64_t i, const Vector& fraction) const;
    void make_bins();
    int64_t bin_of(int64_t i, int axis) const;

    int64_t atoms_;
    double spacing_[3], extent_[3];  // of the planes, Å; of the atoms, in cells
    double reach_[3];                // the radius, Å, with what rounding may add
    std::vector<double> fraction_[3];
    int64_t bins_[3] = {1, 1, 1};  // along each axis
    std::vector<int32_t> start_;   // of each bin
    std::vector<Binned> binned_;   // bin by bin, in order; none where there is one bin
};

}  // namespace crystalformer
