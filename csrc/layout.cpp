#include "layout.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "crystals.h"
#include "list_check.h"

namespace crystalformer {

Window Window::make(int64_t num, double r_max, double width, double smallest) {
    Window w;
    if (!num) return w;
    // Wider windows would take memory without bound, narrower ones leave the range of float: as attention/basis.py.
    if (!(num <= 1 << 16 && r_max >= 1e-3 && r_max <= 1e6 && width >= 1e-3 && width <= 1e3))
        throw std::invalid_argument("basis must have at most 65536 functions, r_max from 1e-3 to 1e6, width to 1e3");
    w.num = int(num);
    w.spacing = r_max / double(num);
    w.width = width;
    const double reach = width * std::sqrt(-2 * std::log(smallest));  // in spacings
    w.half = std::max(0, int(std::ceil(reach)) - 1);
    // At least four spacings a bin, so that a block of shells often shares one.
    w.size = (2 * w.half + 1 + 4 + TILE - 1) / TILE * TILE;
    w.step = w.size - 1 - 2 * w.half;
    w.bins = (w.num + w.half) / w.step + 1;
    return w;
}

namespace {

struct Image {
    double d;
    int32_t slot, place;  // place: in the segment
};

// A stable sort. Of a few, most of them in order already, as they are here, it takes a fraction of std::sort's time.
template <class Less>
void sort_few(Image* first, Image* last, Less less) {
    if (last - first > 32) return std::stable_sort(first, last, less);
    for (Image* next = first + 1; next < last; ++next) {
        const Image x = *next;
        Image* to = next;
        for (; to > first && less(x, to[-1]); --to) *to = to[-1];
        *to = x;
    }
}

// Sorts images by distance, those of one distance as they were. Shells grow as d^2, so buckets of equal volume hold
// about one image each.
class SortByDistance {
  public:
    void operator()(const std::vector<Image>& images, std::vector<Image>& sorted) {
        const size_t count = images.size();
        double longest = 0;
        for (const Image& x : images) longest = std::max(longest, x.d);
        const double inverse = 1 / longest;
        bucket_.resize(count);
        start_.assign(count + 2, 0);
        for (size_t k = 0; k < count; ++k) {
            const double part = images[k].d * inverse;  // 0/0 or infinite over infinite: all of those in the last one
            bucket_[k] = part < 1 ? int32_t(part * part * part * double(count)) : int32_t(count);
            ++start_[size_t(bucket_[k]) + 1];
        }
        for (size_t b = 0; b <= count; ++b) start_[b + 1] += start_[b];
        sorted.resize(count);
        for (size_t k = 0; k < count; ++k) sorted[size_t(start_[size_t(bucket_[k])]++)] = images[k];
        const auto nearer = [](const Image& a, const Image& b) { return a.d < b.d; };
        int32_t first = 0;
        for (size_t b = 0; b <= count; first = start_[b++])
            if (start_[b] > first + 1) sort_few(sorted.data() + first, sorted.data() + start_[b], nearer);
    }

  private:
    std::vector<int32_t> bucket_, start_;
};

template <class T>
class Builder {
  public:
    Builder(const Images<T>& images, const Pairs& pairs, const Window& window, double spread, const Layout<T>& layout)
        : images_(images), pairs_(pairs), window_(window), spread_(spread), layout_(layout) {}

    // Distances and shells of the images of the pairs begin..end of atom i, which are segment `segment`.
    void segment(int64_t segment, int64_t begin, int64_t end, int64_t i, const double* cell) {
        const int64_t first = pairs_.first[begin];
        found_.resize(size_t(pairs_.first[end] - first));
        Image* to = found_.data();
        bool numbers = true;
        for (int64_t pair = begin; pair < end; ++pair) {
            const int32_t j = pairs_.col[pair];
            double apart[3];
            for (int x = 0; x < 3; ++x)
                apart[x] = double(images_.positions[3 * j + x]) - double(images_.positions[3 * i + x]);
            for (int64_t e = pairs_.first[pair]; e < pairs_.first[pair + 1]; ++e) {
                if (images_.orbits) {
                    // Its mirror may not have been checked yet; the sort takes what is not negative, or NaN.
                    numbers = numbers && images_.orbits[e].distance >= 0;
                    *to++ = {images_.orbits[e].distance, int32_t(pair - begin), int32_t(e - first)};
                    continue;
                }
                double d2 = 0;
                for (int x = 0; x < 3; ++x) {
                    double r = apart[x];
                    for (int y = 0; y < 3; ++y) r += double(images_.shift[3 * e + y]) * cell[3 * y + x];
                    d2 += r * r;
                }
                numbers = numbers && !std::isnan(d2);
                *to++ = {std::sqrt(d2), int32_t(pair - begin), int32_t(e - first)};
            }
        }
        if (found_.empty()) layout_.pair_near2[begin] = 0;  // a pair with no images: nothing reads it
        if (numbers) {
            sort_(found_, sorted_);
        } else {  // one NaN makes every sum of the segment NaN, and distances of which some are NaN have no order
            sorted_ = found_;
            for (Image& x : sorted_) x.d = std::numeric_limits<double>::quiet_NaN();
        }
        pack(segment, first, begin);
    }

  private:
    // Whether an image at distance d is in the shell that begins at `begin`. The shell's distance stands for d in the
    // direction r/d of a force, so near d = 0 the spread is relative.
    bool same_shell(double begin, double d) const { return d <= begin + spread_ * std::min(1.0, begin); }

    void pack(int64_t segment, int64_t first, int64_t pair) {
        start_.clear();  // of each shell, the nearest first, and where the last one ends
        for (size_t x = 0; x < sorted_.size(); ++x)
            if (!x || !same_shell(sorted_[size_t(start_.back())].d, sorted_[x].d)) start_.push_back(int32_t(x));
        start_.push_back(int32_t(sorted_.size()));
        int64_t shell = first, member = first;
        for (size_t nearer = start_.size() - 1; nearer-- > 0; ++shell) {
            const size_t begin = size_t(start_[nearer]), end = size_t(start_[nearer + 1]);
            double d = 0;
            for (size_t x = begin; x < end; ++x) d += sorted_[x].d;
            d /= double(end - begin);
            const double t = d / window_.spacing, place = t / window_.step;
            const int bin = place < window_.bins ? int(place) : window_.bins;
            layout_.d2[shell] = T(d * d);
            layout_.offset[shell] = T(t - bin * window_.step);
            layout_.bin[shell] = bin;
            if (!layout_.entry)
                sort_few(sorted_.data() + begin, sorted_.data() + end,
                         [](const Image& a, const Image& b) { return a.slot < b.slot; });
            for (size_t x = begin; x < end; ++x) {
                if (!layout_.entry && x > begin && sorted_[x].slot == sorted_[x - 1].slot) {
                    layout_.count[member - 1] += images_.count_of(first + sorted_[x].place);
                    continue;
                }
                layout_.slot[member] = sorted_[x].slot;
                layout_.pair_near2[pair + sorted_[x].slot] = layout_.d2[shell];  // nearer shells come later
                layout_.shell[member] = int32_t(shell - first);
                layout_.count[member] = images_.count_of(first + sorted_[x].place);
                if (layout_.entry) layout_.entry[member] = first + sorted_[x].place;
                ++member;
            }
            layout_.member_end[shell] = member;
        }
        layout_.shell_end[segment] = shell;
    }

    const Images<T>& images_;
    const Pairs& pairs_;
    const Window& window_;
    const double spread_;
    const Layout<T>& layout_;
    SortByDistance sort_;
    std::vector<Image> found_, sorted_;
    std::vector<int32_t> start_;
};

constexpr uint64_t MAGIC = 0x3174756f79616c63;  // "clayout1"
constexpr int64_t SAMPLES = 64;                 // images that are hashed

class Hash {
  public:
    void add(uint64_t x) {
        sum_ = (sum_ ^ x) * 0x9e3779b97f4a7c15;
        sum_ ^= sum_ >> 32;
    }
    void add(double x) {
        x += 0.0;  // -0.0 is 0.0
        uint64_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        add(bits);
    }
    template <class T>
    void add(const T* x, int64_t count) {
        for (int64_t k = 0; k < count; ++k) add(std::conditional_t<std::is_integral_v<T>, uint64_t, double>(x[k]));
    }
    uint64_t value() const { return sum_; }

  private:
    uint64_t sum_ = MAGIC;
};

}  // namespace

template <class T>
LayoutHeader layout_header(const Images<T>& images, const Window& window, bool by_pair, bool merge, int64_t pairs) {
    Hash list, geometry;
    list.add(images.ptr, images.crystals + 1);
    list.add(images.row_ptr, images.atoms + 1);
    for (int64_t k = 0; k < SAMPLES && images.images; ++k) {
        const int64_t e = images.images * k / SAMPLES;
        list.add(uint64_t(images.col_of(e)));
        if (images.orbits) {
            list.add(images.orbits[e].distance);
            list.add(double(images.orbits[e].count));
        } else {
            list.add(images.shift + 3 * e, 3);
        }
    }
    geometry.add(images.positions, 3 * images.atoms);
    geometry.add(images.lattice, 9 * images.crystals);
    return {MAGIC,  sizeof(T),    {images.atoms, images.images, pairs, by_pair, merge},
            window, list.value(), geometry.value()};
}

void check_header(const LayoutHeader& wanted, const LayoutHeader& found) {
    const auto require = [](bool same, const char* what) {
        if (!same) throw std::invalid_argument(std::string("layout must be made by cpu_layout for ") + what);
    };
    require(found.magic == wanted.magic, "these kernels, but it was made by something else");
    require(found.number_bytes == wanted.number_bytes, "this dtype, but it was made for another");
    require(found.sizes.by_pair == wanted.sizes.by_pair, "this op, but it was made for another");
    require(found.sizes.atoms == wanted.sizes.atoms && found.sizes.images == wanted.sizes.images &&
                found.list == wanted.list,
            "this image list, but it was made for another");
    require(found.geometry == wanted.geometry, "these positions and lattices, but it was made for others");
    require(found.window == wanted.window, "this basis and tol, but it was made for others");
    require(wanted.sizes.merge || !found.sizes.merge,
            "the gradients of positions and lattice, with merge=False, but it was not");
}

template <class T>
Layout<T> place_layout(const LayoutSizes& sizes, char* memory, int64_t* bytes) {
    constexpr int64_t ALIGNMENT = 64;
    int64_t used = (sizeof(LayoutHeader) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    const auto take = [&](auto*& array, int64_t size) {
        using Element = std::remove_pointer_t<std::remove_reference_t<decltype(array)>>;
        array = memory ? reinterpret_cast<Element*>(memory + used) : nullptr;
        used += (size * int64_t(sizeof(Element)) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    };
    Layout<T> layout{};
    layout.segments = sizes.by_pair ? sizes.pairs : sizes.atoms;
    take(layout.pair_ptr, sizes.atoms + 1);
    take(layout.pair_col, sizes.pairs);
    take(layout.pair_mirror, sizes.pairs);
    take(layout.pair_near2, sizes.pairs);
    take(layout.entry_ptr, layout.segments + 1);
    take(layout.shell_end, layout.segments);
    take(layout.d2, sizes.images);
    take(layout.offset, sizes.images);
    take(layout.bin, sizes.images);
    take(layout.member_end, sizes.images);
    take(layout.slot, sizes.images);
    take(layout.shell, sizes.images);
    take(layout.count, sizes.images);
    if (!sizes.merge) take(layout.entry, sizes.images);
    if (bytes) *bytes = used;
    return layout;
}

template <class T>
void build_layout(const Images<T>& images, const Pairs& pairs, double spread, const LayoutHeader& header, char* memory,
                  const Threads& threads) {
    std::memcpy(memory, &header, sizeof header);
    const Layout<T> layout = place_layout<T>(header.sizes, memory);
    const bool by_pair = header.sizes.by_pair;
    const std::vector<int64_t> crystal = crystal_of_atom(images.ptr, images.crystals);
    std::copy(pairs.ptr.begin(), pairs.ptr.end(), layout.pair_ptr);
    std::copy(pairs.col.begin(), pairs.col.end(), layout.pair_col);
    std::copy(pairs.mirror.begin(), pairs.mirror.end(), layout.pair_mirror);
    if (by_pair)
        std::copy(pairs.first.begin(), pairs.first.end(), layout.entry_ptr);
    else
        std::copy(images.row_ptr, images.row_ptr + images.atoms + 1, layout.entry_ptr);
    threads.for_chunks(images.atoms, 4, [&] {
        return [&, builder = Builder<T>(images, pairs, header.window, spread, layout)](int64_t begin,
                                                                                       int64_t end) mutable {
            for (int64_t i = begin; i < end; ++i) {
                check_images(images, pairs, i);
                double cell[9];
                std::copy(images.lattice + 9 * crystal[i], images.lattice + 9 * crystal[i] + 9, cell);
                const int64_t first = pairs.ptr[i], last = pairs.ptr[i + 1];
                if (!by_pair) builder.segment(i, first, last, i, cell);
                for (int64_t pair = first; by_pair && pair < last; ++pair)
                    builder.segment(pair, pair, pair + 1, i, cell);
            }
        };
    });
}

#define INSTANTIATE(T)                                                                         \
    template LayoutHeader layout_header(const Images<T>&, const Window&, bool, bool, int64_t); \
    template Layout<T> place_layout(const LayoutSizes&, char*, int64_t*);                      \
    template void build_layout(const Images<T>&, const Pairs&, double, const LayoutHeader&, char*, const Threads&);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace crystalformer
