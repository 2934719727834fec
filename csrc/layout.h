// The image list as the kernels want it: for one geometry and one radial basis, sorted by distance.
#pragma once

#include <cstdint>

#include "threads.h"

namespace crystalformer {

// Which of the basis functions b_m(d) = exp(-(d - mu_m)^2 / (2 w^2)), mu_m = m * spacing, m = 1..num, matter at d:
// those within `half` spacings. Distances are cut into bins of `step` spacings; all of one bin share one window of
// `size` functions, m = bin * step - half + (0..size-1).
struct Window {
    static constexpr int TILE = 16;  // the size is a multiple of it

    int num = 0, half = 0, step = 1, size = 0, bins = 0;
    double spacing = 1, width = 1;  // width in spacings

    // `smallest`: basis functions below it are left out.
    static Window make(int64_t num, double r_max, double width, double smallest);

    bool operator==(const Window&) const = default;

    // Functions in all windows together: a buffer of it holds function m at m + half.
    int padded() const { return bins ? (bins - 1) * step + size : 0; }
};

// All images of atoms of the orbit `col` that an atom of another orbit sees at one distance.
struct OrbitEntry {
    double distance;
    float count;
    int32_t col;
};

// The list as the caller has it, and where the atoms are. Its entries are images, or those of orbits: then rows are
// orbits, and nothing is known of directions.
template <class T>
struct Images {
    int64_t atoms, crystals, images;
    const int64_t *ptr, *row_ptr;
    const int32_t *col, *shift;  // null in a list of orbits
    const OrbitEntry* orbits;    // null in a list of atoms
    const T *positions, *lattice;

    int32_t col_of(int64_t e) const { return orbits ? orbits[e].col : col[e]; }
    T count_of(int64_t e) const { return orbits ? T(orbits[e].count) : T(1); }
};

// Segments are what the weights are summed over: rows (atoms) for attention, pairs of atoms for the encoding. A segment
// has slots, one for each atom it sees (one only when it is a pair). Its images are grouped into shells of equal
// distance; a shell has members, one for each image, or for each slot with a count when merged. The farthest shell
// comes first: what is small is added up before what is large, and few images round a sum at its full size. Shells and
// members of segment s are at entry_ptr[s] and on: fewer than it has images, so some places stay unused.
template <class T>
struct Layout {
    int64_t segments;
    int64_t* pair_ptr;     // (N+1) the pairs of each atom
    int32_t* pair_col;     // (pairs) the other atom
    int32_t* pair_mirror;  // (pairs) the place of (j, i)
    T* pair_near2;         // (pairs) d2 of the nearest shell with an image of the pair
    int64_t* entry_ptr;    // (segments+1)
    int64_t* shell_end;    // (segments)
    T* d2;                 // (shells) squared distance
    T* offset;             // (shells) distance from the start of the bin, in spacings
    int32_t* bin;          // (shells)
    int64_t* member_end;   // (shells)
    int32_t* slot;         // (members)
    int32_t* shell;        // (members) counted from the segment's first
    T* count;              // (members)
    int64_t* entry;        // (members) place in the list, or null when merged
};

struct Pairs;  // list_check.h

struct LayoutSizes {
    int64_t atoms, images, pairs;
    int64_t by_pair;  // segments are the pairs of all atoms of a crystal, whether they have images or not
    int64_t merge;    // images of one slot at one distance are one member; then `entry` is null
};

// What a layout was made for. It lies in one block of memory that starts with this, and serves nothing else.
struct LayoutHeader {
    uint64_t magic, number_bytes;  // of a number T
    LayoutSizes sizes;
    Window window;
    uint64_t list, geometry;  // hashes: of the offsets and some images, of positions and lattice
};

// The header of a layout. It takes little time beside a sum over the images, because it hashes only some of them.
template <class T>
LayoutHeader layout_header(const Images<T>& images, const Window& window, bool by_pair, bool merge, int64_t pairs);

// Throws std::invalid_argument if a layout was not made for what a kernel wants, the number of pairs apart.
// wanted.sizes.merge: whether the kernel can read a layout that is merged.
void check_header(const LayoutHeader& wanted, const LayoutHeader& found);

// The layout in `memory`, which is aligned to 64 bytes; null only measures. `bytes` returns the size of the block.
template <class T>
Layout<T> place_layout(const LayoutSizes& sizes, char* memory, int64_t* bytes = nullptr);

// Fills a block of memory. pairs: of find_pairs; the rest of what makes a list one is checked here. spread: distances
// that differ by less are equal, Å.
template <class T>
void build_layout(const Images<T>& images, const Pairs& pairs, double spread, const LayoutHeader& header, char* memory,
                  const Threads& threads);

}  // namespace crystalformer
