// What the bindings share. They alone know torch: tensors in, raw pointers to the core, tensors out. The schemas, fakes
// and derivatives of the operators are in crystalformer/ops.py.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <Python.h>
#include <torch/library.h>

#include <functional>

#include "threads.h"

namespace crystalformer {

using at::Tensor;

// Lets other Python threads run; PyTorch calls some operators with the interpreter locked.
class ReleaseGil {
  public:
    ReleaseGil() : state_(PyGILState_Check() ? PyEval_SaveThread() : nullptr) {}
    ~ReleaseGil() {
        if (state_) PyEval_RestoreThread(state_);
    }
    ReleaseGil(const ReleaseGil&) = delete;
    ReleaseGil& operator=(const ReleaseGil&) = delete;

  private:
    PyThreadState* state_;
};

inline Threads torch_threads() {
    const int number = at::in_parallel_region() ? 1 : at::get_num_threads();
    return {number, [number](const std::function<void()>& work) {
                at::parallel_for(0, number, 1, [&](int64_t first, int64_t last) {
                    for (int64_t i = first; i < last; ++i) work();
                });
            }};
}

// A contiguous tensor of dtype T; kept alive by the caller.
template <class T>
const T* pointer(const Tensor& x) {
    TORCH_CHECK(x.is_contiguous() && x.device().is_cpu(), "crystalformer::cpu needs contiguous CPU tensors");
    return x.const_data_ptr<T>();
}

// The core trusts its sizes, and an operator can be called with anything.
inline void check_shape(const char* name, const Tensor& x, at::IntArrayRef shape) {
    TORCH_CHECK_VALUE(x.sizes() == shape, name, " must have shape ", shape, ", not ", x.sizes());
}

// The number of segments of offsets (S+1).
inline int64_t segments(const char* name, const Tensor& offsets) {
    TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.numel(), name, " must have one dimension and an entry, not shape ",
                      offsets.sizes());
    return offsets.numel() - 1;
}

// What a fresh tensor of an operator's result, or of a private layout, points to.
template <class T>
T* output(const Tensor& x) {
    return x.mutable_data_ptr<T>();
}

inline Tensor like(const Tensor& x) {
    return at::empty(x.sizes(), x.options());
}
inline Tensor like_if(bool wanted, const Tensor& x) {
    return wanted ? like(x) : at::empty({0}, x.options());
}

}  // namespace crystalformer
