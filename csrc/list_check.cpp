#include "list_check.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace crystalformer {

void check_offsets(const char* name, const int64_t* offsets, int64_t segments, int64_t entries) {
    const auto fail = [&](const std::string& what) {
        throw std::invalid_argument(name + (" must " + what) + ", but it does not");
    };
    if (offsets[0] != 0 || offsets[segments] != entries) fail("run from 0 to " + std::to_string(entries));
    for (int64_t s = 0; s < segments; ++s)
        if (offsets[s] > offsets[s + 1]) fail("never fall");
}

namespace {

void fail(const char* what) {
    throw std::invalid_argument(std::string("images must ") + what + ", but they are not");
}

// In lexicographic order, without branches: which of the three decides cannot be predicted.
bool before(const int32_t* a, const int32_t* b) {
    return (a[0] < b[0]) | ((a[0] == b[0]) & ((a[1] < b[1]) | ((a[1] == b[1]) & (a[2] < b[2]))));
}

// One past the images of the pair that begins at `first`.
template <class T>
int64_t pair_end(const Images<T>& images, int64_t first, int64_t row_end) {
    int64_t last = first + 1;
    while (last < row_end && images.col[last] == images.col[first]) ++last;
    return last;
}

// Whether the images first..last-1 of a pair are sorted by n.
template <class T>
bool sorted(const Images<T>& images, int64_t first, int64_t last) {
    bool result = true;
    for (int64_t e = first + 1; e < last; ++e) result &= before(images.shift + 3 * e - 3, images.shift + 3 * e);
    return result;
}

// Whether as many images from `mirror` on are the negatives of first..last-1: sorted by n, they come in the opposite
// order.
template <class T>
bool mirrored(const Images<T>& images, int64_t first, int64_t last, int64_t mirror) {
    int64_t wrong = 0;
    for (int64_t e = first; e < last; ++e) {
        const int32_t *n = images.shift + 3 * e, *opposite = images.shift + 3 * (mirror + last - 1 - e);
        for (int x = 0; x < 3; ++x) wrong |= int64_t(n[x]) + int64_t(opposite[x]);
    }
    return !wrong;
}

}  // namespace

template <class T>
void check_list(const Images<T>& images) {
    check_offsets("ptr", images.ptr, images.crystals, images.atoms);
    check_offsets("row_ptr", images.row_ptr, images.atoms, images.images);
    // Rows come in order, so the pairs (i, j), j fixed, come in the order of row j: of each row, the first image whose
    // mirror has not been met.
    std::vector<int64_t> next(images.row_ptr, images.row_ptr + images.atoms);
    for (int64_t c = 0; c < images.crystals; ++c)
        for (int64_t i = images.ptr[c]; i < images.ptr[c + 1]; ++i) {
            bool itself = false;
            for (int64_t first = images.row_ptr[i], last; first < images.row_ptr[i + 1]; first = last) {
                const int64_t j = images.col[first];
                if (j < images.ptr[c] || j >= images.ptr[c + 1]) fail("be of atoms of the row's own crystal");
                last = pair_end(images, first, images.row_ptr[i + 1]);
                // Of two pairs that mirror each other, the translations are looked at when the first is met.
                const bool met = j < i;
                if ((last < images.row_ptr[i + 1] && images.col[last] < j) || !(met || sorted(images, first, last)))
                    fail("be sorted by (col, shift) in each row, no image twice");
                const int64_t mirror = next[j];
                next[j] += last - first;
                if (next[j] > images.row_ptr[j + 1] || images.col[mirror] != i || images.col[next[j] - 1] != i ||
                    !(met || mirrored(images, first, last, mirror)))
                    fail("be symmetric, (j, i, -n) there with each (i, j, n)");
                for (int64_t e = first; e < last && i == j; ++e)
                    itself |= !images.shift[3 * e] && !images.shift[3 * e + 1] && !images.shift[3 * e + 2];
            }
            if (!itself) fail("hold each atom itself, (i, i, 0)");
        }
}

template void check_list(const Images<float>&);
template void check_list(const Images<double>&);

}  // namespace crystalformer
