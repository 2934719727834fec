// The kernels that are compiled once for each instruction set, and the choice among them.
//
// A kernel works on the rows first..last-1 and writes nothing that depends on another row: rows may run in any order
// on any thread and the bits stay the same. In a kernel's arrays the heads come last, in groups of eight: (N,H,D)
// becomes (N,G,D,8), the last group padded.
#pragma once

#include "attention.h"
#include "encoding.h"
#include "reciprocal.h"
#include "weight.h"

namespace crystalformer {

inline int groups_of(int heads) {
    return (heads + 7) / 8;
}

template <class T>
struct AttentionRows {
    static constexpr int TOGETHER = 4;  // rows that a thread takes, and multiplies with the weight, at once
    const AttentionInputs<T>& in;
    AttentionOutputs<T> out = {};                     // forward only
    AttentionOutputs<const T> saved = {}, grad = {};  // backward only: the outputs and their gradients
    AttentionGrads<T> result = {};
    const T *q, *k, *v, *grad_y = nullptr;  // (N,G,D,8) (N,G,D,8) (N,G,Dv,8) (N,G,Dv,8)
    const T* weight;                        // (H,K,tiled Dv) forward, (H,Dv,tiled K) backward
    // Backward goes by blocks of rows, so that what it keeps of their pairs stays small.
    int64_t first_row = 0, last_row = 0, first_pair = 0, block_pairs = 0;
    T *pair_p = nullptr, *pair_ds = nullptr;  // (G,block_pairs,8) sums over the images of a pair
    int64_t* next_pair = nullptr;             // (N) the first pair (i, j) with j not in a block so far
    T *grad_k = nullptr, *grad_v = nullptr;   // (N,G,D,8) (N,G,Dv,8) sums over the blocks so far
    T* reach2 = nullptr;                      // (N,G) squared distance beyond which a row left images out
    const int64_t* crystal = nullptr;         // (N)
    T* pair_force = nullptr;                  // (pairs,3) dloss/dr summed over the images of a pair
    T* row_lattice = nullptr;                 // (N,9) each row's part of the gradient of its lattice
    int64_t scratch;                          // numbers of scratch space a thread needs
};

template <class T>
struct EncodingRows {
    const EncodingInputs<T>& in;
    EncodingOutputs<T> out = {};                     // forward only
    EncodingOutputs<const T> saved = {}, grad = {};  // backward only: the outputs and their gradients
    EncodingGrads<T> result = {};
    const T *weight_by_basis = nullptr, *weight = nullptr;  // (H,K,tiled Dv) forward, (H,Dv,tiled K) backward
    const int64_t* crystal = nullptr;                       // (N)
    T* pair_force = nullptr;                                // (P,3) dloss/dr summed over the images of a pair
    T* row_lattice = nullptr;                               // (N,9) each row's part of the gradient of its lattice
    int64_t scratch;                                        // numbers of scratch space a thread needs
};

// One crystal in reciprocal space. Its atoms, and its rows, come in tiles of eight, the last one padded with zeros.
template <class T>
struct ReciprocalCrystal {
    int64_t begin, end, row_tiles;  // rows
    int64_t first_atom, last_atom, tiles;
    int64_t vectors, shells;       // a shell is vectors of one length
    const int32_t *g, *shell_end;  // (vectors,3) (shells)
    const T* length2;              // (shells)
    double basis[9];               // rows are the reciprocal lattice vectors, 2 pi included
    T* phase;                      // (tiles,vectors,2,8) cos and sin of G·p
    T *k, *v;                      // (row tiles,H,D,8) (row tiles,H,Dv,8)
    int64_t rows() const { return end - begin; }
    int64_t atoms() const { return last_atom - first_atom; }
    int64_t columns() const { return 8 * tiles; }
};

template <class T>
struct ReciprocalRows {
    const ReciprocalInputs<T>& in;
    const ReciprocalCrystal<T>* crystals;
    const int64_t* crystal;               // (N)
    const int64_t* first_pair = nullptr;  // (N), of the sums alone: where a row's pairs begin
    T* y = nullptr;                       // forward only
    const T* grad = nullptr;              // backward only: of y
    ReciprocalGrads<T> result = {};
    // Backward goes by blocks of rows, so that what it keeps of their pairs stays small.
    int64_t first_row = 0, last_row = 0;
    const int64_t* pair = nullptr;            // (N) where in the block a row's pairs begin
    T *pair_p = nullptr, *pair_ds = nullptr;  // at pair[i] H: (H,columns) by row, ds over sqrt(D)
    T* pair_force = nullptr;                  // at 3 pair[i]: (3,columns) dloss/dr
    T* row_lattice = nullptr;                 // (N,9) each row's part of the gradient of the reciprocal basis
    int64_t scratch;                          // numbers of scratch space a thread needs
};

template <class T>
struct Kernels {
    void (*group_heads)(const T* x, int64_t first, int64_t last, int heads, int dim, T* grouped);
    void (*attention_rows)(const AttentionRows<T>&, int64_t first, int64_t last, T* scratch);
    void (*attention_backward_rows)(const AttentionRows<T>&, int64_t first, int64_t last, T* scratch);
    void (*attention_backward_columns)(const AttentionRows<T>&, int64_t first, int64_t last, T* scratch);
    void (*attention_backward_finish)(const AttentionRows<T>&, int64_t first, int64_t last, T* scratch);
    void (*pass_on_nan)(const T* x, const int64_t* ptr, int64_t first, int64_t last, int width, T* y);
    void (*sum_outer_products)(const T* g, const T* c, int64_t atoms, int heads, int values, int num, int64_t first,
                               int64_t last, T* result);
    void (*encoding_rows)(const EncodingRows<T>&, int64_t first, int64_t last, T* scratch);
    void (*encoding_backward_rows)(const EncodingRows<T>&, int64_t first, int64_t last, T* grad_weight, T* scratch);
    void (*reciprocal_crystal)(const ReciprocalInputs<T>&, const ReciprocalCrystal<T>&, T* scratch);
    void (*reciprocal_rows)(const ReciprocalRows<T>&, int64_t first, int64_t last, T* scratch);
    void (*reciprocal_backward_rows)(const ReciprocalRows<T>&, int64_t first, int64_t last, T* scratch);
    void (*reciprocal_backward_columns)(const ReciprocalRows<T>&, int64_t first, int64_t last, T* scratch);
    void (*reciprocal_sum_rows)(const ReciprocalRows<T>&, int64_t first, int64_t last, T* scratch);
    void (*reciprocal_sum_backward_rows)(const ReciprocalRows<T>&, int64_t first, int64_t last, T* scratch);
    void (*reciprocal_sum_backward_columns)(const ReciprocalRows<T>&, int64_t first, int64_t last, T* scratch);
    void (*gather_force_rows)(const Layout<T>&, const T* pair_force, int64_t first, int64_t last, T* positions);
};

// Those for this machine's instruction set.
template <class T>
const Kernels<T>& kernels();

}  // namespace crystalformer
