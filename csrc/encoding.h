// The periodic encodings of every pair of atoms, forward and backward, on raw pointers. Shapes as in reference.py.
#pragma once

#include "layout.h"

namespace crystalformer {

template <class T>
struct EncodingInputs {
    int64_t atoms, crystals;
    int heads, value_dim;
    const T *decay, *edge_weight;  // (N,H) (H,Dv,K)
    const T *positions, *lattice;  // (N,3) (C,3,3), read for the gradients of the geometry only
    const int64_t* ptr;            // (C+1)
    const int32_t* shift;          // (M,3)
    double tol;                    // largest fraction of the weight that may be left out
    Layout<T> layout;              // by pair
    Window window;
};

template <class T>
struct EncodingOutputs {
    T *alpha, *beta;  // (P,H) (P,H,Dv)
};

// Gradients of the inputs; the last two are null if they are not wanted.
template <class T>
struct EncodingGrads {
    T *decay, *edge_weight, *positions, *lattice;
};

template <class T>
void encoding(const EncodingInputs<T>& in, const EncodingOutputs<T>& out, const Threads& threads);

template <class T>
void encoding_backward(const EncodingOutputs<const T>& grad, const EncodingInputs<T>& in,
                       const EncodingOutputs<const T>& out, const EncodingGrads<T>& result, const Threads& threads);

}  // namespace crystalformer
