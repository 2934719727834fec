#include "list_check.h"

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

constexpr const char* SORTED = "be sorted by (col, shift) in each row, no image twice";
constexpr const char* SYMMETRIC = "be symmetric, (j, i, -n) there with each (i, j, n)";
constexpr const char* ITSELF = "hold each atom itself, (i, i, 0)";

[[noreturn]] void fail(const char* what) {
    throw std::invalid_argument(std::string("images must ") + what + ", but they are not");
}

// Whether (a, b, c) of x is less than that of y, without branches: which of the three decides cannot be predicted.
bool before(const int32_t* x, const int32_t* y) {
    const auto leading = [](const int32_t* n) { return (int64_t(n[0]) << 32) + (int64_t(n[1]) + (int64_t(1) << 31)); };
    const int64_t a = leading(x), b = leading(y);
    return (a < b) | ((a == b) & (x[2] < y[2]));
}

}  // namespace

template <class T>
Pairs find_pairs(const Images<T>& images, bool every) {
    check_offsets("ptr", images.ptr, images.crystals, images.atoms);
    check_offsets("row_ptr", images.row_ptr, images.atoms, images.images);
    Pairs pairs;
    const auto check_number = [](int64_t number) {
        if (number >> 31) throw std::invalid_argument("the CPU kernels take at most 2^31 pairs of atoms");
    };
    if (every) {
        int64_t number = 0;
        for (int64_t c = 0; c < images.crystals; ++c) {
            const int64_t atoms = images.ptr[c + 1] - images.ptr[c];
            number += atoms * atoms;
        }
        check_number(number);
        pairs.col.reserve(size_t(number));
        pairs.first.reserve(size_t(number) + 1);
    }
    const auto add = [&](int64_t j, int64_t e) {
        pairs.col.push_back(int32_t(j));
        pairs.first.push_back(e);
    };
    pairs.ptr.reserve(size_t(images.atoms) + 1);
    pairs.ptr.push_back(0);
    for (int64_t c = 0; c < images.crystals; ++c)
        for (int64_t i = images.ptr[c]; i < images.ptr[c + 1]; ++i) {
            int64_t next = images.ptr[c];  // the first j that may come
            for (int64_t e = images.row_ptr[i]; e < images.row_ptr[i + 1];) {
                const int32_t j = images.col_of(e);
                if (j < images.ptr[c] || j >= images.ptr[c + 1]) fail("be of atoms of the row's own crystal");
                if (j < next) fail(SORTED);
                for (; every && next < j; ++next) add(next, e);
                add(j, e);
                next = j + 1;
                while (e < images.row_ptr[i + 1] && images.col_of(e) == j) ++e;
            }
            for (; every && next < images.ptr[c + 1]; ++next) add(next, images.row_ptr[i + 1]);
            pairs.ptr.push_back(pairs.number());
            check_number(pairs.number());
        }
    pairs.first.push_back(images.images);

    // Rows come in order, so the pairs (i, j), j fixed, come in the order of row j: of each row, the first pair whose
    // mirror has not been met.
    const auto count = [&](int64_t pair) { return pairs.first[pair + 1] - pairs.first[pair]; };
    std::vector<int64_t> unmet(pairs.ptr.begin(), pairs.ptr.end() - 1);
    pairs.mirror.resize(pairs.col.size());
    for (int64_t i = 0; i < images.atoms; ++i) {
        bool itself = false;
        for (int64_t pair = pairs.ptr[i]; pair < pairs.ptr[i + 1]; ++pair) {
            const int64_t j = pairs.col[pair], mirror = unmet[j]++;
            if (mirror >= pairs.ptr[j + 1] || pairs.col[mirror] != i || count(mirror) != count(pair)) fail(SYMMETRIC);
            pairs.mirror[pair] = int32_t(mirror);
            itself |= i == j && count(pair);
        }
        if (!itself) fail(ITSELF);
    }
    return pairs;
}

namespace {

// `check_images` of a list of orbits, from the first pair that is looked at.
void check_distances(const OrbitEntry* orbits, const Pairs& pairs, int64_t pair, int64_t last) {
    if (orbits[pairs.first[pair]].distance != 0) fail("hold each orbit's atom itself, (I, I, 0)");
    for (; pair < last; ++pair) {
        const OrbitEntry* mirror = orbits + pairs.first[pairs.mirror[pair]];
        for (int64_t e = pairs.first[pair]; e < pairs.first[pair + 1]; ++e, ++mirror) {
            if (!(orbits[e].distance >= 0) || !(orbits[e].count > 0) || !(mirror->count > 0))
                fail("have distances from 0 and repeats above 0");
            if (e > pairs.first[pair] && !(orbits[e].distance > orbits[e - 1].distance))
                fail("be sorted by (col, distance) in each row, no entry twice");
            if (orbits[e].distance != mirror->distance) fail("be symmetric, (J, I, d) there with each (I, J, d)");
        }
    }
}

}  // namespace

template <class T>
void check_images(const Images<T>& images, const Pairs& pairs, int64_t i) {
    // Of two pairs that mirror each other one is looked at.
    int64_t pair = pairs.ptr[i];
    while (pairs.col[pair] < i) ++pair;
    if (images.orbits) return check_distances(images.orbits, pairs, pair, pairs.ptr[i + 1]);
    const int64_t own = pair;
    bool sorted = true;
    int64_t unlike = 0;
    for (; pair < pairs.ptr[i + 1]; ++pair) {
        const int32_t *n = images.shift + 3 * pairs.first[pair], *end = images.shift + 3 * pairs.first[pair + 1];
        if (n == end) continue;
        // Sorted by n, the mirror images come in the opposite order.
        const int32_t* opposite = images.shift + 3 * pairs.first[pairs.mirror[pair] + 1] - 3;
        for (int x = 0; x < 3; ++x) unlike |= int64_t(n[x]) + opposite[x];
        while ((n += 3) < end) {
            opposite -= 3;
            sorted &= before(n - 3, n);
            for (int x = 0; x < 3; ++x) unlike |= int64_t(n[x]) + opposite[x];
        }
    }
    if (!sorted) fail(SORTED);
    if (unlike) fail(SYMMETRIC);
    // Sorted and symmetric, an odd number of images of i in row i has n = 0 in its middle, an even one has none.
    if ((pairs.first[own + 1] - pairs.first[own]) % 2 == 0) fail(ITSELF);
}

#define INSTANTIATE(T)                                 \
    template Pairs find_pairs(const Images<T>&, bool); \
    template void check_images(const Images<T>&, const Pairs&, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace crystalformer
