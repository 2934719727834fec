// The kernels in the instruction set that every machine has, and the choice of a better one at run time.
#define LEVEL baseline
#include "kernels.inc"

#include <cstdlib>
#include <cstring>

namespace crystalformer {

#ifdef CRYSTALFORMER_LEVELS  // by setup.py, when it compiles the others too
namespace v3 {
const Kernels<float>& kernels(float);
const Kernels<double>& kernels(double);
}  // namespace v3
namespace v4 {
const Kernels<float>& kernels(float);
const Kernels<double>& kernels(double);
}  // namespace v4
#endif

template <class T>
const Kernels<T>& choose() {
#ifdef CRYSTALFORMER_LEVELS
    // CRYSTALFORMER_CPU=baseline or v3 holds back, so that one machine can test all of them.
    const char* wanted = std::getenv("CRYSTALFORMER_CPU");
    const int most = !wanted ? 4 : !std::strcmp(wanted, "baseline") ? 1 : !std::strcmp(wanted, "v3") ? 3 : 4;
    const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_v4 = has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
    if (most >= 4 && has_v4) return v4::kernels(T());
    if (most >= 3 && has_v3) return v3::kernels(T());
#endif
    return baseline::kernels(T());
}

template <class T>
const Kernels<T>& kernels() {
    static const Kernels<T>& chosen = choose<T>();
    return chosen;
}
template const Kernels<float>& kernels();
template const Kernels<double>& kernels();

}  // namespace crystalformer
