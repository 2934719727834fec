// The periodic images that each atom attends to, with certified cutoffs: what geometry/images.py does in PyTorch,
// with the same result. Equation numbers are those of docs/math.md.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "threads.h"

namespace crystalformer {

// Atoms that symmetry makes equivalent. Only the first atom of each orbit has a row of images.
struct Orbits {
    const int64_t* orbit;  // (N), rising from crystal to crystal
    const int64_t* ptr;    // (C+1) the first orbit of each crystal
    double spread;         // what the distances of equivalent images may differ by, Å

    std::vector<int64_t> first_atoms(int64_t atoms, int64_t crystals) const;
};

struct ImageRequest {
    int64_t atoms, crystals;
    const double *positions, *lattice;  // (N,3) (C,3,3)
    const int64_t* ptr;                 // (C+1)
    const double* decay_min;            // (C)
    double tol, logit_range;
    double beyond;                 // fraction of tol spent on the images that are bounded and never enumerated
    std::optional<double> cutoff;  // a radius to use instead
    bool every_pair;
    int64_t max_images;  // more than these are refused
    std::optional<Orbits> orbits = std::nullopt;
};

struct FoundImage {
    double d2;
    int32_t col, n[3];
};

// The images of each row, sorted by col, then n. Two steps, because the caller owns the memory of the result.
class ImageSearch {
  public:
    // Finds them; row_ptr (N+1), cutoff (C). Throws std::invalid_argument for too many images, or atoms too far apart.
    ImageSearch(const ImageRequest& request, const Threads& threads, int64_t* row_ptr, double* cutoff);
    // Writes col (M) and shift (M,3).
    void write(const int64_t* row_ptr, int32_t* col, int32_t* shift, const Threads& threads) const;
    // The images of atom i.
    const std::vector<FoundImage>& row(int64_t i) const { return rows_[size_t(i)]; }

  private:
    std::vector<std::vector<FoundImage>> rows_;
};

}  // namespace crystalformer
