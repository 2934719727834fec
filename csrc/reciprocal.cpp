#include "reciprocal.h"

#include <cmath>

#include "crystals.h"
#include "kernels.h"
#include "memory.h"

namespace crystalformer {

namespace {

// Numbers that backward keeps of the pairs of a block of rows.
constexpr int64_t BLOCK_NUMBERS = 1 << 20;

// basis (9), rows are the reciprocal lattice vectors, 2 pi included, of a lattice (9).
template <class T>
void reciprocal_basis(const T* lattice, double* basis) {
    double l[9], volume = 0;
    std::copy(lattice, lattice + 9, l);
    for (int k = 0; k < 3; ++k) {
        const double *a = l + 3 * ((k + 1) % 3), *b = l + 3 * ((k + 2) % 3);
        for (int x = 0; x < 3; ++x) {
            const int y = (x + 1) % 3, z = (x + 2) % 3;
            basis[3 * k + x] = 2 * M_PI * (a[y] * b[z] - a[z] * b[y]);
        }
    }
    for (int x = 0; x < 3; ++x) volume += l[x] * basis[x] / (2 * M_PI);
    for (int m = 0; m < 9; ++m) basis[m] /= volume;
}

// The crystals with all that their rows share, and the memory it lies in.
template <class T>
class Crystals {
  public:
    // `by_vector`: every vector is a shell of its own, which the gradients of the geometry need.
    Crystals(const ReciprocalInputs<T>& in, bool backward, bool by_vector, const Threads& threads)
        : all(size_t(in.crystals)),
          crystal(crystal_of_atom(in.ptr, in.crystals)),
          shell_end_(in.g_ptr[in.crystals]),
          length2_(in.g_ptr[in.crystals]),
          phase_(phases(in)),
          k_(padded_rows(in) * in.heads * in.dim),
          v_(backward ? padded_rows(in) * in.heads * in.value_dim : 0) {
        int64_t phase = 0, rows = 0, largest = 0;
        for (int64_t c = 0; c < in.crystals; ++c) {
            ReciprocalCrystal<T>& x = all[c];
            x.begin = in.ptr[c];
            x.end = in.ptr[c + 1];
            x.row_tiles = row_tiles(in, c);
            x.first_atom = in.first_atom(x.begin);
            x.last_atom = in.first_atom(x.end);
            x.tiles = tiles(in, c);
            x.vectors = in.g_ptr[c + 1] - in.g_ptr[c];
            x.g = in.g + 3 * in.g_ptr[c];
            x.phase = phase_.data() + phase;
            x.k = k_.data() + rows * in.heads * in.dim;
            x.v = backward ? v_.data() + rows * in.heads * in.value_dim : nullptr;
            reciprocal_basis(in.lattice + 9 * c, x.basis);
            find_shells(x, in.g_ptr[c], by_vector);
            phase += 16 * x.tiles * x.vectors;
            rows += 8 * x.row_tiles;
            for (int64_t g = 0; g < 3 * x.vectors; ++g) largest = std::max<int64_t>(largest, std::abs(x.g[g]));
            scratch = std::max(scratch, 2 * x.vectors + 8 * x.shells + 17 * x.columns());
        }
        threads.for_chunks(in.crystals, 1, [&] {
            return [&, power = Buffer<T>(48 * (largest + 1))](int64_t first, int64_t last) mutable {
                for (int64_t c = first; c < last; ++c) kernels<T>().reciprocal_crystal(in, all[c], power.data());
            };
        });
    }

    std::vector<ReciprocalCrystal<T>> all;
    std::vector<int64_t> crystal;
    int64_t scratch = 0;

  private:
    static int64_t row_tiles(const ReciprocalInputs<T>& in, int64_t c) { return (in.ptr[c + 1] - in.ptr[c] + 7) / 8; }
    static int64_t tiles(const ReciprocalInputs<T>& in, int64_t c) {
        return (in.first_atom(in.ptr[c + 1]) - in.first_atom(in.ptr[c]) + 7) / 8;
    }
    static int64_t padded_rows(const ReciprocalInputs<T>& in) {
        int64_t sum = 0;
        for (int64_t c = 0; c < in.crystals; ++c) sum += 8 * row_tiles(in, c);
        return sum;
    }
    static int64_t phases(const ReciprocalInputs<T>& in) {
        int64_t sum = 0;
        for (int64_t c = 0; c < in.crystals; ++c) sum += 16 * tiles(in, c) * (in.g_ptr[c + 1] - in.g_ptr[c]);
        return sum;
    }

    // Vectors come by length: those of one length, up to what rounding of the lattice leaves, share an exponential.
    void find_shells(ReciprocalCrystal<T>& x, int64_t first, bool by_vector) {
        constexpr double SAME = sizeof(T) == 4 ? 5e-7 : 2e-14;
        int32_t* end = shell_end_.data() + first;
        T* length2 = length2_.data() + first;
        x.shell_end = end;
        x.length2 = length2;
        x.shells = 0;
        double begun = -1;
        for (int64_t m = 0; m < x.vectors; ++m) {
            double sum = 0;
            for (int a = 0; a < 3; ++a) {
                double along = 0;
                for (int k = 0; k < 3; ++k) along += x.g[3 * m + k] * x.basis[3 * k + a];
                sum += along * along;
            }
            if (by_vector || !(std::abs(sum - begun) <= SAME * sum)) {
                begun = sum;
                length2[x.shells++] = T(sum);
            }
            end[x.shells - 1] = int32_t(m + 1);
        }
    }

    Buffer<int32_t> shell_end_;
    Buffer<T> length2_, phase_, k_, v_;
};

template <class T, class Kernel>
void for_rows(const ReciprocalRows<T>& rows, int64_t begin, int64_t end, Kernel kernel, const Threads& threads) {
    threads.for_chunks(end - begin, 4, [&] {
        return [&, scratch = Buffer<T>(rows.scratch)](int64_t first, int64_t last) mutable {
            kernel(rows, begin + first, begin + last, scratch.data());
        };
    });
}

// (N) the first pair of each row, of pairs crystal by crystal, row-major.
template <class T>
std::vector<int64_t> first_pairs(const ReciprocalInputs<T>& in, const std::vector<int64_t>& crystal) {
    std::vector<int64_t> first(size_t(in.rows));
    for (int64_t i = 1; i < in.rows; ++i) first[i] = first[i - 1] + in.ptr[crystal[i - 1] + 1] - in.ptr[crystal[i - 1]];
    return first;
}

// Runs the kernels of the rows and of the columns over one block of rows after another; `weights`: they keep p and ds.
template <class T, class Kernel>
void backward_in_blocks(ReciprocalRows<T>& rows, bool weights, Kernel rows_kernel, Kernel columns_kernel,
                        const Threads& threads) {
    const ReciprocalInputs<T>& in = rows.in;
    const bool geometry = rows.result.positions;
    const int64_t heads = weights ? in.heads : 0;
    std::vector<int64_t> blocks = {0}, pair(size_t(in.rows));
    int64_t pairs = 0, most_pairs = 0;
    for (int64_t i = 0; i < in.rows; ++i) {
        if (pairs * (2 * heads + 3 * geometry) >= BLOCK_NUMBERS) {
            blocks.push_back(i);
            pairs = 0;
        }
        pair[i] = pairs;
        pairs += rows.crystals[rows.crystal[i]].columns();
        most_pairs = std::max(most_pairs, pairs);
    }
    if (in.rows) blocks.push_back(in.rows);
    Buffer<T> pair_p(most_pairs * heads), pair_ds(most_pairs * heads), pair_force(geometry ? 3 * most_pairs : 0);
    Buffer<T> row_lattice(geometry ? 9 * in.rows : 0);
    rows.pair = pair.data();
    rows.pair_p = pair_p.data();
    rows.pair_ds = pair_ds.data();
    rows.pair_force = geometry ? pair_force.data() : nullptr;
    rows.row_lattice = row_lattice.data();
    if (geometry) std::fill(rows.result.positions, rows.result.positions + 3 * in.rows, T(0));
    for (size_t b = 0; b + 1 < blocks.size(); ++b) {
        rows.first_row = blocks[b];
        rows.last_row = blocks[b + 1];
        for_rows(rows, rows.first_row, rows.last_row, rows_kernel, threads);
        if (!weights && !geometry) continue;
        const int64_t begin = rows.crystals[rows.crystal[rows.first_row]].begin;
        const int64_t end = rows.crystals[rows.crystal[rows.last_row - 1]].end;
        for_rows(rows, begin, end, columns_kernel, threads);
    }
    if (!geometry) return;
    // B = 2 pi L^-T, so dL = -B dB^T B / (2 pi).
    sum_by_crystal(row_lattice.data(), in.ptr, in.crystals, rows.result.lattice);
    for (int64_t c = 0; c < in.crystals; ++c) {
        const double* b = rows.crystals[c].basis;
        T* to = rows.result.lattice + 9 * c;
        double d_basis[9];
        std::copy(to, to + 9, d_basis);
        for (int k = 0; k < 3; ++k)
            for (int a = 0; a < 3; ++a) {
                double sum = 0;
                for (int l = 0; l < 3; ++l)
                    for (int z = 0; z < 3; ++z) sum += b[3 * k + z] * d_basis[3 * l + z] * b[3 * l + a];
                to[3 * k + a] = T(-sum / (2 * M_PI));
            }
    }
}

}  // namespace

template <class T>
void reciprocal(const ReciprocalInputs<T>& in, T* y, const Threads& threads) {
    const Crystals<T> crystals(in, false, false, threads);
    const ReciprocalRows<T> rows{.in = in,
                                 .crystals = crystals.all.data(),
                                 .crystal = crystals.crystal.data(),
                                 .y = y,
                                 .scratch = crystals.scratch};
    for_rows(rows, 0, in.rows, kernels<T>().reciprocal_rows, threads);
}

template <class T>
void reciprocal_backward(const T* grad, const ReciprocalInputs<T>& in, const ReciprocalGrads<T>& result,
                         const Threads& threads) {
    const Crystals<T> crystals(in, true, result.positions, threads);
    std::fill(result.k, result.k + in.rows * in.heads * in.dim, T(0));
    std::fill(result.v, result.v + in.rows * in.heads * in.value_dim, T(0));
    ReciprocalRows<T> rows{
        .in = in,
        .crystals = crystals.all.data(),
        .crystal = crystals.crystal.data(),
        .grad = grad,
        .result = result,
        .scratch = crystals.scratch,
    };
    backward_in_blocks(rows, true, kernels<T>().reciprocal_backward_rows, kernels<T>().reciprocal_backward_columns,
                       threads);
}

template <class T>
void reciprocal_sum(const ReciprocalInputs<T>& in, T* total, const Threads& threads) {
    const Crystals<T> crystals(in, false, false, threads);
    const std::vector<int64_t> first_pair = first_pairs(in, crystals.crystal);
    const ReciprocalRows<T> rows{.in = in,
                                 .crystals = crystals.all.data(),
                                 .crystal = crystals.crystal.data(),
                                 .first_pair = first_pair.data(),
                                 .y = total,
                                 .scratch = crystals.scratch};
    for_rows(rows, 0, in.rows, kernels<T>().reciprocal_sum_rows, threads);
}

template <class T>
void reciprocal_sum_backward(const T* grad, const ReciprocalInputs<T>& in, const ReciprocalGrads<T>& result,
                             const Threads& threads) {
    const Crystals<T> crystals(in, false, result.positions, threads);
    const std::vector<int64_t> first_pair = first_pairs(in, crystals.crystal);
    ReciprocalRows<T> rows{
        .in = in,
        .crystals = crystals.all.data(),
        .crystal = crystals.crystal.data(),
        .first_pair = first_pair.data(),
        .grad = grad,
        .result = result,
        .scratch = crystals.scratch,
    };
    backward_in_blocks(rows, false, kernels<T>().reciprocal_sum_backward_rows,
                       kernels<T>().reciprocal_sum_backward_columns, threads);
}

#define INSTANTIATE(T)                                                                                     \
    template void reciprocal(const ReciprocalInputs<T>&, T*, const Threads&);                              \
    template void reciprocal_backward(const T*, const ReciprocalInputs<T>&, const ReciprocalGrads<T>&,     \
                                      const Threads&);                                                     \
    template void reciprocal_sum(const ReciprocalInputs<T>&, T*, const Threads&);                          \
    template void reciprocal_sum_backward(const T*, const ReciprocalInputs<T>&, const ReciprocalGrads<T>&, \
                                          const Threads&);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace crystalformer
