// Infinitely connected attention, forward and backward, on raw pointers. Shapes as in attention/reference.py.
#pragma once

#include "layout.h"

namespace crystalformer {

template <class T>
struct AttentionInputs {
    int64_t atoms, crystals;
    int heads, dim, value_dim;
    const T *q, *k, *v, *decay;    // (N,H,D) (N,H,D) (N,H,Dv) (N,H)
    const T* edge_weight;          // (H,Dv,K)
    const T *positions, *lattice;  // (N,3) (C,3,3), read for the gradients of the geometry only
    const int64_t* ptr;            // (C+1)
    const int32_t* shift;          // (M,3)
    double tol;                    // largest fraction of the weight that may be left out
    Layout<T> layout;
    Window window;
};

template <class T>
struct AttentionOutputs {
    T *y, *lse, *c;  // (N,H,Dv) (N,H) (N,H,K); c = sum p b(d) has no gradient, it is there for the backward
};

// Gradients of the inputs; the last two are null if they are not wanted.
template <class T>
struct AttentionGrads {
    T *q, *k, *v, *decay, *edge_weight, *positions, *lattice;
};

template <class T>
void attention(const AttentionInputs<T>& in, const AttentionOutputs<T>& out, const Threads& threads);

template <class T>
void attention_backward(const AttentionOutputs<const T>& grad, const AttentionInputs<T>& in,
                        const AttentionOutputs<const T>& out, const AttentionGrads<T>& result, const Threads& threads);

}  // namespace crystalformer
