// The operators that build image lists: of all atoms, and of orbits of equivalent atoms.
#include <algorithm>
#include <cmath>

#include "bindings.h"
#include "images.h"
#include "list_check.h"
#include "memory.h"
#include "orbit_images.h"

namespace crystalformer {

namespace {

// For a search that would never end; compiled code has no other check.
void check_finite(const char* name, const Tensor& x) {
    const double* values = pointer<double>(x);
    CHECK_VALUE(std::all_of(values, values + x.numel(), [](double v) { return std::isfinite(v); }), name,
                " must be finite");
}

// What an operator is asked for, checked; the tensors are contiguous and outlive it.
ImageRequest request_of(const Tensor& positions, const Tensor& lattice, const Tensor& ptr, const Tensor& decay_min,
                        double tol, double logit_range, double beyond, std::optional<double> cutoff, bool every_pair,
                        int64_t max_images) {
    CHECK_VALUE(positions.dim() == 2, "positions must have two dimensions, not shape ", positions.sizes());
    const int64_t atoms = positions.size(0), crystals = segments("ptr", ptr);
    check_shape("positions", positions, {atoms, 3});
    check_shape("lattice", lattice, {crystals, 3, 3});
    check_shape("decay_min", decay_min, {crystals});
    check_offsets("ptr", pointer<int64_t>(ptr), crystals, atoms);
    check_finite("positions", positions);
    check_finite("lattice", lattice);
    CHECK_VALUE(tol > 0 && tol <= 1, "tol must be larger than 0 and at most 1, not ", tol);
    return {atoms,
            crystals,
            pointer<double>(positions),
            pointer<double>(lattice),
            pointer<int64_t>(ptr),
            pointer<double>(decay_min),
            tol,
            logit_range,
            beyond,
            cutoff,
            every_pair,
            max_images};
}

NoMemory no_memory() {
    return NoMemory("the images: a smaller max_images refuses them before they are looked for");
}

int64_t sum_of_squares(const int64_t* ptr, int64_t segments) {
    int64_t sum = 0;
    for (int64_t s = 0; s < segments; ++s) sum += (ptr[s + 1] - ptr[s]) * (ptr[s + 1] - ptr[s]);
    return sum;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t> cpu_images(const Tensor& positions, const Tensor& lattice,
                                                               const Tensor& ptr, const Tensor& decay_min, double tol,
                                                               double logit_range, double beyond,
                                                               std::optional<double> cutoff, bool every_pair,
                                                               int64_t max_images) {
    const Contiguous p = positions, l = lattice, a = decay_min;
    const ImageRequest request = request_of(p, l, ptr, a, tol, logit_range, beyond, cutoff, every_pair, max_images);
    const Tensor row_ptr = empty({request.atoms + 1}, ptr);
    const Tensor radius = empty({request.crystals}, positions);
    Tensor col, shift;
    try {
        const ReleaseGil release;
        const ImageSearch search(request, torch_threads(), output<int64_t>(row_ptr), output<double>(radius));
        const int64_t images = output<int64_t>(row_ptr)[request.atoms];
        col = empty({images}, aoti_torch_dtype_int32());
        shift = empty({images, 3}, aoti_torch_dtype_int32());
        search.write(output<int64_t>(row_ptr), output<int32_t>(col), output<int32_t>(shift), torch_threads());
    } catch (const std::bad_alloc&) {
        throw no_memory();
    }
    return {row_ptr, col, shift, radius, sum_of_squares(request.ptr, request.crystals)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpu_orbit_images(const Tensor& positions, const Tensor& lattice,
                                                                    const Tensor& ptr, const Tensor& orbit,
                                                                    const Tensor& orbit_ptr, const Tensor& decay_min,
                                                                    double tol, double logit_range, double beyond,
                                                                    std::optional<double> cutoff, bool every_pair,
                                                                    int64_t max_images, double spread) {
    const Contiguous p = positions, l = lattice, a = decay_min;
    ImageRequest request = request_of(p, l, ptr, a, tol, logit_range, beyond, cutoff, every_pair, max_images);
    check_shape("orbit", orbit, {request.atoms});
    CHECK_VALUE(spread >= 0, "spread must be at least 0, not ", spread);
    check_shape("orbit_ptr", orbit_ptr, {request.crystals + 1});
    request.orbits = Orbits{pointer<int64_t>(orbit), pointer<int64_t>(orbit_ptr), spread};
    const int64_t orbits = request.orbits->ptr[request.crystals];
    CHECK_VALUE(orbits <= request.atoms, "orbit_ptr must be of at most ", request.atoms, " orbits, as there are ",
                "atoms, not of ", orbits);
    check_offsets("orbit_ptr", request.orbits->ptr, request.crystals, orbits);
    check_orbits(request);
    const Tensor row_ptr = empty({orbits + 1}, ptr);
    const Tensor radius = empty({request.crystals}, positions);
    Tensor col, distance, count;
    try {
        const ReleaseGil release;
        const OrbitSearch search(request, torch_threads(), output<int64_t>(row_ptr), output<double>(radius));
        const int64_t entries = output<int64_t>(row_ptr)[orbits];
        col = empty({entries}, aoti_torch_dtype_int32());
        distance = empty({entries}, positions);
        count = empty({entries}, aoti_torch_dtype_float32());
        search.write(output<int32_t>(col), output<double>(distance), output<float>(count));
    } catch (const std::bad_alloc&) {
        throw no_memory();
    }
    return {row_ptr, col, distance, count, radius};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(crystalformer, CPU, m) {
    m.impl("cpu_images", TORCH_BOX(&cpu_images));
    m.impl("cpu_orbit_images", TORCH_BOX(&cpu_orbit_images));
}

}  // namespace crystalformer
