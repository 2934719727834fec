// What the bindings share. They alone know torch: tensors in, raw pointers to the core, tensors out. The schemas, fakes
// and derivatives of the operators are in attention/ops.py.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <Python.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <thread>

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

// Throws what Python's signal handlers raise, KeyboardInterrupt for one. They run when the thread that called an
// operator asks for it, which costs the interpreter's lock: every tenth of a second is enough.
class PythonSignals {
  public:
    void operator()() {
        if (std::this_thread::get_id() != caller_) return;
        const auto now = std::chrono::steady_clock::now();
        if (now - last_ < std::chrono::milliseconds(100)) return;
        last_ = now;
        const pybind11::gil_scoped_acquire lock;
        if (PyErr_CheckSignals()) throw pybind11::error_already_set();
    }

  private:
    std::thread::id caller_ = std::this_thread::get_id();
    std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

inline Threads torch_threads() {
    const int number = at::in_parallel_region() ? 1 : at::get_num_threads();
    const auto run = [number](const std::function<void()>& work) {
        at::parallel_for(0, number, 1, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) work();
        });
    };
    return {number, run, PythonSignals{}};
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

// Numbers that join_words (common/tensor_struct.py) made one tensor of: parts of 32-bit words, each of which begins at
// a multiple of 16 bytes, taken from the first to the last.
class Words {
  public:
    Words(const char* name, const Tensor& packed) : name_(name), at_(pointer<int32_t>(packed)), left_(packed.numel()) {
        TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(at_) % alignof(int64_t) == 0, name, " must be aligned");
    }
    int64_t left() const { return left_; }
    template <class Number>
    const Number* take(int64_t number) {
        const int64_t words = number * int64_t(sizeof(Number) / sizeof(int32_t));
        TORCH_CHECK_VALUE(words <= left_, name_, MADE_FOR, "but it ends");
        const Number* taken = reinterpret_cast<const Number*>(at_);
        const int64_t used = std::min(left_, (words + 3) / 4 * 4);
        at_ += used;
        left_ -= used;
        return taken;
    }
    void check_end() const { TORCH_CHECK_VALUE(!left_, name_, MADE_FOR, "but it has ", left_, " words too many"); }

  private:
    static constexpr const char* MADE_FOR = " must be what packed() makes of a list for this geometry, ";
    const char* name_;
    const int32_t* at_;
    int64_t left_;
};

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
