// Attention whose weight decays in reciprocal space, forward and backward, on raw pointers. Shapes as in reference.py.
#pragma once

#include "threads.h"

namespace crystalformer {

template <class T>
struct ReciprocalInputs {
    int64_t rows, crystals;  // a row is an atom, but in a list of orbits
    int heads, dim, value_dim;
    const T *q, *k, *v, *decay;    // (N,H,D) (N,H,D) (N,H,Dv) (N,H)
    const T *positions, *lattice;  // (N,3) (C,3,3)
    const int64_t *ptr, *g_ptr;    // (C+1) (C+1)
    const int32_t* g;              // (M,3) half of the wave vectors, of each crystal by length
    const int64_t* atom_ptr;  // (N+1) the atoms of each orbit, whose first one is the row's; null in lists of atoms
    const double* atoms;      // (P,3) where these are; positions are not read then
    int64_t first_atom(int64_t row) const { return atom_ptr ? atom_ptr[row] : row; }
};

// Gradients of the inputs; the last two are null if they are not wanted.
template <class T>
struct ReciprocalGrads {
    T *q, *k, *v, *decay, *positions, *lattice;
};

// y (N,H,Dv).
template <class T>
void reciprocal(const ReciprocalInputs<T>& in, T* y, const Threads& threads);

template <class T>
void reciprocal_backward(const T* grad, const ReciprocalInputs<T>& in, const ReciprocalGrads<T>& result,
                         const Threads& threads);

// The sums S alone, total (P,H), of decay, positions and lattice; q, k, v are null and have no dimensions.
template <class T>
void reciprocal_sum(const ReciprocalInputs<T>& in, T* total, const Threads& threads);

template <class T>
void reciprocal_sum_backward(const T* grad, const ReciprocalInputs<T>& in, const ReciprocalGrads<T>& result,
                             const Threads& threads);

}  // namespace crystalformer
