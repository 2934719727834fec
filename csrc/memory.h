// Aligned scratch memory, not initialised: tests set CRYSTALFORMER_POISON, and then it starts as NaN, or -1.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>

namespace crystalformer {

// In Python it is a MemoryError.
class NoMemory : public std::bad_alloc {
  public:
    explicit NoMemory(const std::string& what) : what_("the CPU kernels have not enough memory for " + what) {}
    const char* what() const noexcept override { return what_.c_str(); }

  private:
    std::string what_;
};

template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t size) try : data_(static_cast<T*>(::operator new(size_t(size) * sizeof(T), ALIGNMENT))) {
        static const bool poison = std::getenv("CRYSTALFORMER_POISON");
        if (poison) std::memset(data(), -1, size_t(size) * sizeof(T));
    } catch (const std::bad_alloc&) {
        throw NoMemory(std::to_string(size_t(size) * sizeof(T)) + " bytes");
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
