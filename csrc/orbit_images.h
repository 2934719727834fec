// The images of orbits of equivalent atoms: one row for each orbit, and in it one entry for all images of an orbit at
// one distance. What geometry/orbit_images.py does in PyTorch, with the same result.
#pragma once

#include <cstdint>
#include <vector>

#include "images.h"
#include "layout.h"

namespace crystalformer {

// Throws std::invalid_argument unless each crystal's atoms are of its own orbits, and no orbit is empty.
void check_orbits(const ImageRequest& request);

// The entries of each row, sorted by col, then distance.
class OrbitSearch {
  public:
    // Finds them; row_ptr (orbits+1), cutoff (C). Throws as ImageSearch does. request.orbits is there.
    OrbitSearch(const ImageRequest& request, const Threads& threads, int64_t* row_ptr, double* cutoff);
    // Writes col (M), distance (M) and count (M).
    void write(int32_t* col, double* distance, float* count) const;

  private:
    std::vector<std::vector<OrbitEntry>> rows_;
};

}  // namespace crystalformer
