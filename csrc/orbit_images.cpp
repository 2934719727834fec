#include "orbit_images.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace crystalformer {

namespace {

// The entries of an atom's images of the orbits from `least` on.
std::vector<OrbitEntry> merge(const std::vector<FoundImage>& images, const Orbits& orbits, int64_t least) {
    std::vector<OrbitEntry> sorted;
    for (const FoundImage& e : images)
        if (orbits.orbit[e.col] >= least) sorted.push_back({std::sqrt(e.d2), 1, int32_t(orbits.orbit[e.col])});
    std::sort(sorted.begin(), sorted.end(), [](const OrbitEntry& a, const OrbitEntry& b) {
        return a.col != b.col ? a.col < b.col : a.distance < b.distance;
    });
    std::vector<OrbitEntry> merged;
    for (size_t begin = 0, end; begin < sorted.size(); begin = end) {
        const OrbitEntry& first = sorted[begin];
        double sum = 0;
        for (end = begin; end < sorted.size() && sorted[end].col == first.col &&
                          sorted[end].distance - first.distance <= orbits.spread;
             ++end)
            sum += sorted[end].distance;
        const float count = float(end - begin);
        merged.push_back({sum / double(count), count, first.col});
    }
    return merged;
}

}  // namespace

void check_orbits(const ImageRequest& in) {
    const Orbits& orbits = *in.orbits;
    for (int64_t c = 0; c < in.crystals; ++c)
        for (int64_t i = in.ptr[c]; i < in.ptr[c + 1]; ++i)
            if (orbits.orbit[i] < orbits.ptr[c] || orbits.orbit[i] >= orbits.ptr[c + 1])
                throw std::invalid_argument("orbit must be of the atom's own crystal, but that of atom " +
                                            std::to_string(i) + " is " + std::to_string(orbits.orbit[i]));
    for (const int64_t i : orbits.first_atoms(in.atoms, in.crystals))
        if (i < 0) throw std::invalid_argument("orbit must have an atom of each orbit, but it has none of one");
}

OrbitSearch::OrbitSearch(const ImageRequest& in, const Threads& threads, int64_t* row_ptr, double* cutoff)
    : rows_(size_t(in.orbits->ptr[in.crystals])) {
    const Orbits& orbits = *in.orbits;
    const std::vector<int64_t> first = orbits.first_atoms(in.atoms, in.crystals);
    std::vector<int64_t> unused(size_t(in.atoms) + 1);
    const ImageSearch search(in, threads, unused.data(), cutoff);
    std::vector<int64_t> size(rows_.size());
    for (int64_t i = 0; i < in.atoms; ++i) ++size[size_t(orbits.orbit[i])];
    threads.for_chunks(in.crystals, 1, [&] {
        return [&](int64_t begin, int64_t end) {
            for (int64_t I = orbits.ptr[begin]; I < orbits.ptr[end]; ++I) {
                // Of the rows before, as they have I: so (I, J) and (J, I) have the same distances in the same order.
                std::vector<OrbitEntry>& row = rows_[size_t(I)];
                for (const OrbitEntry& e : merge(search.row(first[size_t(I)]), orbits, I)) {
                    row.push_back(e);
                    if (e.col != I) {
                        const float count = e.count * float(size[size_t(I)]) / float(size[size_t(e.col)]);
                        rows_[size_t(e.col)].push_back({e.distance, count, int32_t(I)});
                    }
                }
            }
        };
    });
    row_ptr[0] = 0;
    for (size_t I = 0; I < rows_.size(); ++I) row_ptr[I + 1] = row_ptr[I] + int64_t(rows_[I].size());
}

void OrbitSearch::write(int32_t* col, double* distance, float* count) const {
    for (const std::vector<OrbitEntry>& row : rows_)
        for (const OrbitEntry& e : row) *col++ = e.col, *distance++ = e.distance, *count++ = e.count;
}

}  // namespace crystalformer
