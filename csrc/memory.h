// Aligned scratch memory, not initialised: tests set CRYSTALFORMER_POISON, and then it starts as NaN, or -1.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace crystalformer {

template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t size) : data_(static_cast<T*>(::operator new(size_t(size) * sizeof(T), ALIGNMENT))) {
        static const bool poison = std::getenv("CRYSTALFORMER_POISON");
        if (poison) std::memset(data(), -1, size_t(size) * sizeof(T));
    }
    T* data() { return data_.get(); }
    const T* data() const { return data_.get(); }

  private:
    static constexpr std::align_val_t ALIGNMENT{64};
    struct Free {
        void operator()(T* p) const { ::operator delete(p, ALIGNMENT); }
    };
    std::unique_ptr<T, Free> data_;
};

}  // namespace crystalformer
