// Reciprocal attention of some rows. Lanes are atoms j, eight at a time: S_ij = sum_G w_i(G) cos(G·r_ij), and the
// cosine of a pair is two products, cos G·p_i cos G·p_j + sin G·p_i sin G·p_j, which all heads share. The atoms of an
// orbit have one key and one value, so what goes with these is by row: spread to its atoms, or summed over them.
#pragma once

#include "heads.h"
#include "kernels.h"
#include "simd.h"

namespace crystalformer::LEVEL {

constexpr double RECIPROCAL_CLAMP = 1e-6;  // the paper's

template <class T>
using Atoms = Pack<T, 8>;

// Multiples m x of an angle: cos and sin of each, eight atoms a row, (most+1,2,8).
template <class T>
INLINE void multiples(const double* cosine, const double* sine, int most, T* result) {
    double c[8], s[8];
    for (int a = 0; a < 8; ++a) c[a] = 1 + 0 * cosine[a], s[a] = 0;  // NaN shows in G = 0, too
    for (int m = 0; m <= most; ++m) {
        for (int a = 0; a < 8; ++a) {
            result[16 * m + a] = T(c[a]);
            result[16 * m + 8 + a] = T(s[a]);
            const double next = c[a] * cosine[a] - s[a] * sine[a];
            s[a] = c[a] * sine[a] + s[a] * cosine[a];
            c[a] = next;
        }
    }
}

// Phases, keys and values of one crystal. exp(i G·p) is the product of powers of exp(i b_k·p), one for each axis: three
// sines and cosines an atom, in fp64.
template <class T>
void reciprocal_crystal(const ReciprocalInputs<T>& in, const ReciprocalCrystal<T>& x, T* scratch) {
    int most[3] = {};
    for (int64_t g = 0; g < 3 * x.vectors; ++g)
        most[g % 3] = x.g[g] < 0 ? (-x.g[g] > most[g % 3] ? -x.g[g] : most[g % 3])
                                 : (x.g[g] > most[g % 3] ? x.g[g] : most[g % 3]);
    T* power[3] = {scratch, scratch + 16 * (most[0] + 1), scratch + 16 * (most[0] + most[1] + 2)};
    for (int64_t tile = 0; tile < x.tiles; ++tile) {
        const int64_t first = x.first_atom + 8 * tile;
        const int real = x.last_atom - first < 8 ? int(x.last_atom - first) : 8;
        double where[8][3];
        for (int a = 0; a < 8; ++a)
            for (int k = 0; k < 3; ++k) {
                const int64_t place = 3 * (first + (a < real ? a : 0)) + k;
                where[a][k] = in.atoms ? in.atoms[place] : double(in.positions[place]);
            }
        for (int axis = 0; axis < 3; ++axis) {
            double cosine[8], sine[8];
            for (int a = 0; a < 8; ++a) {
                const double* b = x.basis + 3 * axis;
                const double angle = b[0] * where[a][0] + b[1] * where[a][1] + b[2] * where[a][2];
                cosine[a] = __builtin_cos(angle);
                sine[a] = __builtin_sin(angle);
            }
            multiples(cosine, sine, most[axis], power[axis]);
        }
        T* to = x.phase + 16 * tile * x.vectors;
        for (int64_t g = 0; g < x.vectors; ++g, to += 16) {
            const int32_t* n = x.g + 3 * g;
            Atoms<T> c = Atoms<T>::all(1), s = Atoms<T>::all(0);
            for (int axis = 0; axis < 3; ++axis) {
                const T* from = power[axis] + 16 * (n[axis] < 0 ? -n[axis] : n[axis]);
                const Atoms<T> cos = Atoms<T>::load(from), sin = Atoms<T>::load(from + 8) * T(n[axis] < 0 ? -1 : 1);
                const Atoms<T> next = c * cos - s * sin;
                s = c * sin + s * cos;
                c = next;
            }
            c.store(to);
            s.store(to + 8);
        }
    }
    for (int64_t tile = 0; tile < x.row_tiles; ++tile) {
        const int64_t first = x.begin + 8 * tile;
        const int real = x.end - first < 8 ? int(x.end - first) : 8;
        const auto transposed = [&](const T* rows, int dim, T* result) {
            const int64_t width = int64_t(in.heads) * dim;
            for (int64_t d = 0; d < width; ++d)
                for (int a = 0; a < 8; ++a)
                    result[8 * (tile * width + d) + a] = a < real ? rows[(first + a) * width + d] : T(0);
        };
        transposed(in.k, in.dim, x.k);
        if (x.v) transposed(in.v, in.value_dim, x.v);
    }
}

// weight (shells,8 heads) of one row and group of heads: exp(-c |G|²), twice that for G and -G.
template <class T>
INLINE void reciprocal_weights(const ReciprocalCrystal<T>& x, Heads<T> decay, T* weight) {
    for (int64_t s = 0; s < x.shells; ++s) {
        const Heads<T> w = exp2_above(decay * T(-LOG2_E) * x.length2[s], LOWEST<T>);
        (s ? w + w : w).store(weight + HEADS * s);
    }
}

// The row's own phases, (vectors,2).
template <class T>
INLINE void own_phases(const ReciprocalInputs<T>& in, const ReciprocalCrystal<T>& x, int64_t i, T* own) {
    const int64_t place = in.first_atom(i) - x.first_atom;
    const T* from = x.phase + 16 * (place / 8) * x.vectors + place % 8;
    for (int64_t g = 0; g < x.vectors; ++g) {
        own[2 * g] = from[16 * g];
        own[2 * g + 1] = from[16 * g + 8];
    }
}

// S of `number` heads from `head` on with all atoms, (8,columns); with `slope` also -dS/dc = sum_G w |G|² cos(G·r).
template <int number, bool derivative, class T>
INLINE void sum_vectors(const ReciprocalCrystal<T>& x, const T* own, const T* weight, int head, T* sums, T* slope) {
    constexpr int64_t TOGETHER = 64;  // shells: a sum over many is one of shorter sums, less rounding
    for (int64_t m = head * x.columns(); m < (head + number) * x.columns(); ++m) {
        sums[m] = 0;
        if constexpr (derivative) slope[m] = 0;
    }
    for (int64_t tile = 0; tile < x.tiles; ++tile) {
        const T* phase = x.phase + 16 * tile * x.vectors;
        Atoms<T> sum[number], along[derivative ? number : 1];
        for (int64_t s = 0, g = 0; s < x.shells;) {
            for (int h = 0; h < number; ++h) sum[h] = Atoms<T>::all(0);
            if constexpr (derivative)
                for (int h = 0; h < number; ++h) along[h] = Atoms<T>::all(0);
            for (const int64_t end = s + TOGETHER < x.shells ? s + TOGETHER : x.shells; s < end; ++s) {
                Atoms<T> cosine = Atoms<T>::all(0);
                for (; g < x.shell_end[s]; ++g) {
                    cosine += Atoms<T>::load(phase + 16 * g) * own[2 * g];
                    cosine += Atoms<T>::load(phase + 16 * g + 8) * own[2 * g + 1];
                }
                const T* w = weight + HEADS * s + head;
                for (int h = 0; h < number; ++h) sum[h] += cosine * w[h];
                if constexpr (derivative) {
                    cosine *= x.length2[s];
                    for (int h = 0; h < number; ++h) along[h] += cosine * w[h];
                }
            }
            for (int h = 0; h < number; ++h) {
                const int64_t place = (head + h) * x.columns() + 8 * tile;
                (Atoms<T>::load(sums + place) + sum[h]).store(sums + place);
                if constexpr (derivative) (Atoms<T>::load(slope + place) + along[h]).store(slope + place);
            }
        }
    }
}

// x, a number for each row, becomes (columns), its row's for each atom, in place, and zero in the padding.
template <class T>
INLINE void spread_rows(const ReciprocalInputs<T>& in, const ReciprocalCrystal<T>& crystal, T* x) {
    if (!in.atom_ptr) return;
    int64_t j = crystal.columns();
    while (j > crystal.atoms()) x[--j] = 0;
    for (int64_t row = crystal.rows(); row-- > 0;)  // from the last one: an atom never stands before its row
        for (const T value = x[row]; crystal.first_atom + j > in.atom_ptr[crystal.begin + row];) x[--j] = value;
}

// x (columns) becomes a number for each row, the sum over its atoms, in place.
template <class T>
INLINE void sum_rows(const ReciprocalInputs<T>& in, const ReciprocalCrystal<T>& crystal, T* x) {
    if (!in.atom_ptr) return;
    for (int64_t row = 0, j = 0; row < crystal.rows(); ++row) {
        T sum = 0;
        while (crystal.first_atom + j < in.atom_ptr[crystal.begin + row + 1]) sum += x[j++];
        x[row] = sum;
    }
}

// result (columns) = sum_d row_d x_d, of x (row tiles,H,dim,8).
template <class T>
INLINE void dot_columns(const ReciprocalInputs<T>& in, const ReciprocalCrystal<T>& crystal, const T* row,
                        const T* grouped, int head, int dim, T* result) {
    for (int64_t tile = 0; tile < crystal.row_tiles; ++tile) {
        const T* from = grouped + 8 * (tile * in.heads + head) * dim;
        Atoms<T> even = Atoms<T>::all(0), odd = even;
        int d = 0;
        for (; d + 1 < dim; d += 2) {
            even += Atoms<T>::load(from + 8 * d) * row[d];
            odd += Atoms<T>::load(from + 8 * d + 8) * row[d + 1];
        }
        if (d < dim) even += Atoms<T>::load(from + 8 * d) * row[d];
        (even + odd).store(result + 8 * tile);
    }
    spread_rows(in, crystal, result);
}

// p (columns) = softmax( q·k/sqrt(D) + log max(S, clamp) ), zero in the padding, without the logarithm.
template <class T>
INLINE void softmax_columns(const ReciprocalInputs<T>& in, const ReciprocalCrystal<T>& x, int64_t i, int head,
                            const T* sums, T* p) {
    const T scale = T(LOG2_E / __builtin_sqrt(double(in.dim)));
    dot_columns(in, x, in.q + (i * in.heads + head) * in.dim, x.k, head, in.dim, p);
    T largest = p[0];
    for (int64_t j = 1; j < x.atoms(); ++j) largest = p[j] > largest ? p[j] : largest;
    for (int64_t j = x.atoms(); j < x.columns(); ++j) p[j] = -__builtin_huge_val();
    Atoms<T> whole = Atoms<T>::all(0);
    for (int64_t j = 0; j < x.columns(); j += 8) {
        const Atoms<T> s = max(Atoms<T>::load(sums + j), Atoms<T>::all(T(RECIPROCAL_CLAMP)));
        const Atoms<T> weight = exp2_above((Atoms<T>::load(p + j) - largest) * scale, 2 * LOWEST<T>) * s;
        weight.store(p + j);
        whole += weight;
    }
    const T total = whole.sum();  // divided by, so that one atom alone has exactly all of it
    for (int64_t j = 0; j < x.columns(); j += 8) (Atoms<T>::load(p + j) / total).store(p + j);
}

// Equation (13).
template <class T>
void reciprocal_rows(const ReciprocalRows<T>& x, int64_t first, int64_t last, T* scratch) {
    const ReciprocalInputs<T>& in = x.in;
    for (int64_t i = first; i < last; ++i) {
        const ReciprocalCrystal<T>& crystal = x.crystals[x.crystal[i]];
        T* own = scratch;
        T* weight = own + 2 * crystal.vectors;
        T* sums = weight + HEADS * crystal.shells;
        T* p = sums + HEADS * crystal.columns();
        own_phases(in, crystal, i, own);
        for (int first_head = 0; first_head < in.heads; first_head += HEADS) {
            const int real = in.heads - first_head < HEADS ? in.heads - first_head : HEADS;
            reciprocal_weights(crystal, load_heads(in.decay + i * in.heads, in.heads, first_head / HEADS, T(1)),
                               weight);
            if (real > 4)
                sum_vectors<8, false>(crystal, own, weight, 0, sums, sums);
            else
                sum_vectors<4, false>(crystal, own, weight, 0, sums, sums);
            for (int h = 0; h < real; ++h) {
                const int64_t head = first_head + h;
                softmax_columns(in, crystal, i, int(head), sums + h * crystal.columns(), p);
                sum_rows(in, crystal, p);
                T* y = x.y + (i * in.heads + head) * in.value_dim;
                for (int d = 0; d < in.value_dim; ++d) y[d] = 0;
                for (int64_t j = 0; j < crystal.rows(); ++j) {
                    const T* v = in.v + ((crystal.begin + j) * in.heads + head) * in.value_dim;
                    for (int d = 0; d < in.value_dim; ++d) y[d] += p[j] * v[d];
                }
            }
        }
    }
}

// What a row's scores give the geometry. With M = sum_h w dS, the gradient of r_ij is -sum_G M sin(G·r) G, so it takes
// only sum_G M sin(G·r) g, (3,columns); and that of |G|² is -sum_hj c w dS cos(G·r), kept as sum_G (that) g gᵀ, (6).
template <class T>
INLINE void sum_geometry(const ReciprocalCrystal<T>& x, const T* own, const T* weight, const T* d_sum, const T* c_d_sum,
                         T* force, Atoms<T>* stress) {
    for (int64_t tile = 0; tile < x.tiles; ++tile) {
        const T* phase = x.phase + 16 * tile * x.vectors;
        Atoms<T> d[HEADS], cd[HEADS], along[3];
        for (int h = 0; h < HEADS; ++h) {
            d[h] = Atoms<T>::load(d_sum + h * x.columns() + 8 * tile);
            cd[h] = Atoms<T>::load(c_d_sum + h * x.columns() + 8 * tile);
        }
        for (int k = 0; k < 3; ++k) along[k] = Atoms<T>::load(force + k * x.columns() + 8 * tile);
        for (int64_t g = 0; g < x.vectors; ++g) {
            const T* w = weight + HEADS * g;
            const Atoms<T> cos = Atoms<T>::load(phase + 16 * g), sin = Atoms<T>::load(phase + 16 * g + 8);
            Atoms<T> m = d[0] * w[0], cm = cd[0] * w[0];
            for (int h = 1; h < HEADS; ++h) {
                m += d[h] * w[h];
                cm += cd[h] * w[h];
            }
            m *= sin * own[2 * g] - cos * own[2 * g + 1];
            cm *= cos * own[2 * g] + sin * own[2 * g + 1];
            const T n[3] = {T(x.g[3 * g]), T(x.g[3 * g + 1]), T(x.g[3 * g + 2])};
            int place = 0;
            for (int k = 0; k < 3; ++k) {
                along[k] += m * n[k];
                for (int l = k; l < 3; ++l) stress[place++] += cm * (n[k] * n[l]);
            }
        }
        for (int k = 0; k < 3; ++k) along[k].store(force + k * x.columns() + 8 * tile);
    }
}

// From what sum_geometry left in the row's force to dloss/dr of each pair, (3,columns), and the gradient of the
// reciprocal basis B, through G = g B, of r with M sin, and of |G|².
template <class T>
INLINE void finish_geometry(const ReciprocalRows<T>& x, const ReciprocalCrystal<T>& crystal, int64_t i,
                            const Atoms<T>* stress) {
    const ReciprocalInputs<T>& in = x.in;
    const int64_t columns = crystal.columns();
    T* force = x.pair_force + 3 * x.pair[i];
    const double* b = crystal.basis;
    double d_basis[9] = {};
    for (int64_t j = 0; j < crystal.atoms(); ++j) {
        const T* p = in.positions + 3 * (crystal.begin + j);
        T n[3], r[3];
        for (int a = 0; a < 3; ++a) {
            n[a] = force[a * columns + j];
            r[a] = p[a] - in.positions[3 * i + a];
        }
        for (int a = 0; a < 3; ++a) {
            force[a * columns + j] = T(-(n[0] * b[a] + n[1] * b[3 + a] + n[2] * b[6 + a]));
            for (int k = 0; k < 3; ++k) d_basis[3 * k + a] -= double(n[k]) * r[a];
        }
    }
    constexpr int at[3][3] = {{0, 1, 2}, {1, 3, 4}, {2, 4, 5}};
    for (int k = 0; k < 3; ++k)
        for (int l = 0; l < 3; ++l) {
            const double twice = 2 * double(stress[at[k][l]].sum());
            for (int a = 0; a < 3; ++a) d_basis[3 * k + a] -= twice * b[3 * l + a];
        }
    for (int m = 0; m < 9; ++m) x.row_lattice[9 * i + m] = T(d_basis[m]);
}

// Equation (B12), what belongs to the rows: the gradient of decay, and what that of the geometry needs. For each head,
// `gradient(crystal, i, head, sums, gamma)` makes dS (columns), zero in the padding, of S; gamma (columns) is scratch.
template <class T, class Gradient>
INLINE void backward_rows(const ReciprocalRows<T>& x, int64_t first, int64_t last, T* scratch, Gradient gradient) {
    const ReciprocalInputs<T>& in = x.in;
    for (int64_t i = first; i < last; ++i) {
        const ReciprocalCrystal<T>& crystal = x.crystals[x.crystal[i]];
        const int64_t columns = crystal.columns(), atoms = crystal.atoms();
        T* own = scratch;
        T* weight = own + 2 * crystal.vectors;
        T* sums = weight + HEADS * crystal.shells;
        T* slope = sums + HEADS * columns;
        T* gamma = slope + HEADS * columns;
        T* force = x.pair_force ? x.pair_force + 3 * x.pair[i] : nullptr;
        Atoms<T> stress[6];
        for (int m = 0; m < 6; ++m) stress[m] = Atoms<T>::all(0);
        for (int64_t m = 0; force && m < 3 * columns; ++m) force[m] = 0;
        own_phases(in, crystal, i, own);
        for (int first_head = 0; first_head < in.heads; first_head += HEADS) {
            const int real = in.heads - first_head < HEADS ? in.heads - first_head : HEADS;
            reciprocal_weights(crystal, load_heads(in.decay + i * in.heads, in.heads, first_head / HEADS, T(1)),
                               weight);
            for (int h = 0; h < real; h += 4) sum_vectors<4, true>(crystal, own, weight, h, sums, slope);
            for (int64_t m = real * columns; m < HEADS * columns; ++m) sums[m] = slope[m] = 0;
            for (int h = 0; h < real; ++h) {
                const int64_t head = i * in.heads + first_head + h;
                T *sum = sums + h * columns, *along = slope + h * columns, d_decay = 0;
                gradient(crystal, i, first_head + h, sum, gamma);
                for (int64_t j = 0; j < atoms; ++j) d_decay -= sum[j] * along[j];
                x.result.decay[head] = d_decay;
                if (force)
                    for (int64_t j = 0; j < columns; ++j) along[j] = in.decay[head] * sum[j];  // from here on c dS
            }
            if (force) sum_geometry(crystal, own, weight, sums, slope, force, stress);
        }
        if (force) finish_geometry(x, crystal, i, stress);
    }
}

// Also the gradient of q, and the pairs' weights and gradients of scores.
template <class T>
void reciprocal_backward_rows(const ReciprocalRows<T>& x, int64_t first, int64_t last, T* scratch) {
    const ReciprocalInputs<T>& in = x.in;
    const T scale = T(1 / __builtin_sqrt(double(in.dim)));
    backward_rows(x, first, last, scratch,
                  [&](const ReciprocalCrystal<T>& crystal, int64_t i, int h, T* sum, T* gamma) {
                      const int64_t head = i * in.heads + h, columns = crystal.columns();
                      T* p = x.pair_p + x.pair[i] * in.heads + h * columns;
                      T* ds = x.pair_ds + x.pair[i] * in.heads + h * columns;
                      const T* grad = x.grad + head * in.value_dim;
                      softmax_columns(in, crystal, i, h, sum, p);
                      dot_columns(in, crystal, grad, crystal.v, h, in.value_dim, gamma);
                      const T delta = dot_flat(p, gamma, columns);  // grad·y, so that gamma - delta cancels exactly
                      for (int64_t j = 0; j < columns; ++j) {
                          const T d = p[j] * (gamma[j] - delta);
                          ds[j] = d * scale;
                          sum[j] = sum[j] > T(RECIPROCAL_CLAMP) ? d / sum[j] : T(0);
                      }
                      sum_rows(in, crystal, p);
                      sum_rows(in, crystal, ds);
                      T* to = x.result.q + head * in.dim;
                      for (int d = 0; d < in.dim; ++d) to[d] = 0;
                      for (int64_t j = 0; j < crystal.rows(); ++j) {
                          const T* k = in.k + ((crystal.begin + j) * in.heads + h) * in.dim;
                          for (int d = 0; d < in.dim; ++d) to[d] += ds[j] * k[d];
                      }
                  });
}

// A crystal's rows in the block.
template <class T>
INLINE int64_t block_begin(const ReciprocalRows<T>& x, const ReciprocalCrystal<T>& crystal) {
    return crystal.begin > x.first_row ? crystal.begin : x.first_row;
}
template <class T>
INLINE int64_t block_end(const ReciprocalRows<T>& x, const ReciprocalCrystal<T>& crystal) {
    return crystal.end < x.last_row ? crystal.end : x.last_row;
}

// The gradient of an atom's position: pulled as j by the rows of the block, and as i by its own.
template <class T>
INLINE void add_column_force(const ReciprocalRows<T>& x, const ReciprocalCrystal<T>& crystal, int64_t j, int64_t begin,
                             int64_t end) {
    const int64_t columns = crystal.columns(), place = j - crystal.begin;
    for (int a = 0; a < 3; ++a) {
        T sum = 0;
        for (int64_t i = begin; i < end; ++i) sum += x.pair_force[3 * x.pair[i] + a * columns + place];
        if (j >= begin && j < end)
            for (int64_t n = 0; n < crystal.atoms(); ++n) sum -= x.pair_force[3 * x.pair[j] + a * columns + n];
        x.result.positions[3 * j + a] += sum;
    }
}

// What belongs to the columns, of the rows of the block: gradients of k, v and positions, added to.
template <class T>
void reciprocal_backward_columns(const ReciprocalRows<T>& x, int64_t first, int64_t last, T*) {
    const ReciprocalInputs<T>& in = x.in;
    for (int64_t j = first; j < last; ++j) {
        const ReciprocalCrystal<T>& crystal = x.crystals[x.crystal[j]];
        const int64_t columns = crystal.columns(), place = j - crystal.begin;
        const int64_t begin = block_begin(x, crystal), end = block_end(x, crystal);
        for (int64_t i = begin; i < end; ++i)
            for (int head = 0; head < in.heads; ++head) {
                const int64_t at = x.pair[i] * in.heads + head * columns + place;
                const int64_t row = i * in.heads + head, column = j * in.heads + head;
                const T p = x.pair_p[at], ds = x.pair_ds[at];
                for (int d = 0; d < in.dim; ++d) x.result.k[column * in.dim + d] += ds * in.q[row * in.dim + d];
                for (int d = 0; d < in.value_dim; ++d)
                    x.result.v[column * in.value_dim + d] += p * x.grad[row * in.value_dim + d];
            }
        if (x.pair_force) add_column_force(x, crystal, j, begin, end);
    }
}

}  // namespace crystalformer::LEVEL
