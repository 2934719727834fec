// What the bindings share. They alone know torch: tensors in, raw pointers to the core, tensors out. Of torch they use
// the stable C interface alone, so that one library serves every torch from TORCH_TARGET_VERSION on. The schemas, fakes
// and derivatives of the operators are in attention/ops.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"
#include "python.h"
#include "threads.h"

namespace crystalformer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
template <class Number>
using List = torch::headeronly::HeaderOnlyArrayRef<Number>;
using Shape = List<int64_t>;

template <class Number>
std::ostream& operator<<(std::ostream& out, List<Number> numbers) {
    out << "[";
    for (size_t i = 0; i < numbers.size(); ++i) out << (i ? ", " : "") << numbers[i];
    return out << "]";
}

template <class... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

// Python's ValueError.
#define CHECK_VALUE(condition, ...) \
    if (!(condition)) throw std::invalid_argument(text(__VA_ARGS__))

inline Threads torch_threads() {
    const int number = int(torch::stable::get_num_threads());
    const auto run = [number](const std::function<void()>& work) {
        torch::stable::parallel_for(0, number, 1, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) work();
        });
    };
    return {number, run, PythonSignals{}};
}

// A tensor that is contiguous: itself or, if it is not, a copy. torch::stable::contiguous alone goes through the
// dispatcher for every tensor.
struct Contiguous : Tensor {
    Contiguous(const Tensor& x) : Tensor(x.is_contiguous() ? x : torch::stable::contiguous(x)) {}
};

// A contiguous tensor of dtype T; kept alive by the caller.
template <class T>
const T* pointer(const Tensor& x) {
    constexpr ScalarType wanted = torch::headeronly::CppTypeToScalarType<T>::value;
    if (!x.is_contiguous() || !x.is_cpu()) throw std::runtime_error("crystalformer::cpu needs contiguous CPU tensors");
    if (x.scalar_type() != wanted)
        throw std::runtime_error(text("expected scalar type ", wanted, " but found ", x.scalar_type()));
    return static_cast<const T*>(x.const_data_ptr());
}

// Calls run.operator()<T>() for the dtype of x.
template <class Run>
void for_dtype(const char* name, const Tensor& x, const Run& run) {
    const ScalarType type = x.scalar_type();
    CHECK_VALUE(type == ScalarType::Float || type == ScalarType::Double, name, " must be Float or Double, not ", type);
    return type == ScalarType::Float ? run.template operator()<float>() : run.template operator()<double>();
}

// The core trusts its sizes, and an operator can be called with anything.
inline void check_shape(const char* name, const Tensor& x, Shape shape) {
    CHECK_VALUE(x.sizes() == shape, name, " must have shape ", shape, ", not ", x.sizes());
}

// The number of segments of offsets (S+1).
inline int64_t segments(const char* name, const Tensor& offsets) {
    CHECK_VALUE(offsets.dim() == 1 && offsets.numel(), name, " must have one dimension and an entry, not shape ",
                offsets.sizes());
    return offsets.numel() - 1;
}

// Numbers that join_words (common/tensor_struct.py) made one tensor of: parts of 32-bit words, each of which begins at
// a multiple of 16 bytes, taken from the first to the last.
class Words {
  public:
    Words(const char* name, const Tensor& packed) : name_(name), at_(pointer<int32_t>(packed)), left_(packed.numel()) {
        CHECK_VALUE(reinterpret_cast<uintptr_t>(at_) % alignof(int64_t) == 0, name, " must be aligned");
    }
    int64_t left() const { return left_; }
    template <class Number>
    const Number* take(int64_t number) {
        const int64_t words = number * int64_t(sizeof(Number) / sizeof(int32_t));
        CHECK_VALUE(words <= left_, name_, MADE_FOR, "but it ends");
        const Number* taken = reinterpret_cast<const Number*>(at_);
        const int64_t used = std::min(left_, (words + 3) / 4 * 4);
        at_ += used;
        left_ -= used;
        return taken;
    }
    void check_end() const { CHECK_VALUE(!left_, name_, MADE_FOR, "but it has ", left_, " words too many"); }

  private:
    static constexpr const char* MADE_FOR = " must be what packed() makes of a list for this geometry, ";
    const char* name_;
    const int32_t* at_;
    int64_t left_;
};

// A fresh tensor on the CPU, of a dtype of aoti_torch_dtype_...
inline Tensor empty(Shape shape, int32_t dtype) {
    CHECK_VALUE(std::none_of(shape.begin(), shape.end(), [](int64_t n) { return n < 0; }),
                "the sizes of a result must be at least 0, not ", shape);
    std::vector<int64_t> strides(shape.size(), 1);
    for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
    AtenTensorHandle made;
    if (aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), dtype,
                                 aoti_torch_device_type_cpu(), 0, &made))
        throw NoMemory(text("a tensor of shape ", shape));
    return Tensor(made);
}
inline Tensor empty(Shape shape, const Tensor& like) {
    int32_t dtype;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    return empty(shape, dtype);
}
inline Tensor like(const Tensor& x) {
    return empty(x.sizes(), x);
}
inline Tensor like_if(bool wanted, const Tensor& x) {
    return wanted ? like(x) : empty({0}, x);
}

// What a fresh tensor of an operator's result points to: no other tensor can share its memory.
template <class T>
T* output(const Tensor& x) {
    return const_cast<T*>(pointer<T>(x));
}

}  // namespace crystalformer
