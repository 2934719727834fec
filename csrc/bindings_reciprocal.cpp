// The operators of reciprocal space: the sums over wave vectors.
#include "bindings.h"
#include "reciprocal.h"

namespace crystalformer {

namespace {

void check_wave_vectors(const Tensor& ptr, const Tensor& g_ptr) {
    TORCH_CHECK(ptr.sizes() == g_ptr.sizes(), "ptr and g_ptr must be of the same crystals");
}

// What the sums S read; q, k and v are null.
template <class T>
ReciprocalInputs<T> sum_inputs(const Tensor& decay, const Tensor& positions, const Tensor& lattice, const Tensor& ptr,
                               const Tensor& g_ptr, const Tensor& g) {
    check_wave_vectors(ptr, g_ptr);
    return {
        .atoms = decay.size(0),
        .crystals = ptr.size(0) - 1,
        .heads = int(decay.size(1)),
        .decay = pointer<T>(decay),
        .positions = pointer<T>(positions),
        .lattice = pointer<T>(lattice),
        .ptr = pointer<int64_t>(ptr),
        .g_ptr = pointer<int64_t>(g_ptr),
        .g = pointer<int32_t>(g),
    };
}

// All arguments of the reciprocal operators, contiguous and alive.
struct ReciprocalArguments {
    Tensor q, k, v, decay, positions, lattice;
    const Tensor &ptr, &g_ptr, &g;

    template <class T>
    ReciprocalInputs<T> inputs() const {
        ReciprocalInputs<T> in = sum_inputs<T>(decay, positions, lattice, ptr, g_ptr, g);
        in.dim = int(q.size(2));
        in.value_dim = int(v.size(2));
        in.q = pointer<T>(q);
        in.k = pointer<T>(k);
        in.v = pointer<T>(v);
        return in;
    }
};

Tensor cpu_reciprocal(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& decay, const Tensor& positions,
                      const Tensor& lattice, const Tensor& ptr, const Tensor& g_ptr, const Tensor& g, int64_t,
                      int64_t) {
    const ReciprocalArguments x{q.contiguous(),
                                k.contiguous(),
                                v.contiguous(),
                                decay.contiguous(),
                                positions.contiguous(),
                                lattice.contiguous(),
                                ptr,
                                g_ptr,
                                g};
    const Tensor y = at::empty(v.sizes(), v.options());
    AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "cpu_reciprocal", [&] {
        const auto inputs = x.inputs<scalar_t>();
        scalar_t* to = output<scalar_t>(y);
        const ReleaseGil release;
        reciprocal(inputs, to, torch_threads());
    });
    return y;
}

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SixTensors cpu_reciprocal_backward(const Tensor& grad_y, const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& decay, const Tensor& positions, const Tensor& lattice,
                                   const Tensor& ptr, const Tensor& g_ptr, const Tensor& g, int64_t, int64_t,
                                   const Tensor&, bool geometry) {
    const ReciprocalArguments x{q.contiguous(),
                                k.contiguous(),
                                v.contiguous(),
                                decay.contiguous(),
                                positions.contiguous(),
                                lattice.contiguous(),
                                ptr,
                                g_ptr,
                                g};
    const Tensor grad = grad_y.contiguous();
    const SixTensors result{
        like(x.q), like(x.k), like(x.v), like(x.decay), like_if(geometry, x.positions), like_if(geometry, x.lattice)};
    AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "cpu_reciprocal_backward", [&] {
        const ReciprocalGrads<scalar_t> to{
            output<scalar_t>(std::get<0>(result)),
            output<scalar_t>(std::get<1>(result)),
            output<scalar_t>(std::get<2>(result)),
            output<scalar_t>(std::get<3>(result)),
            geometry ? output<scalar_t>(std::get<4>(result)) : nullptr,
            geometry ? output<scalar_t>(std::get<5>(result)) : nullptr,
        };
        const auto inputs = x.inputs<scalar_t>();
        const scalar_t* from = pointer<scalar_t>(grad);
        const ReleaseGil release;
        reciprocal_backward(from, inputs, to, torch_threads());
    });
    return result;
}

Tensor cpu_reciprocal_sum(const Tensor& decay, const Tensor& positions, const Tensor& lattice, const Tensor& ptr,
                          const Tensor& g_ptr, const Tensor& g, int64_t, int64_t, int64_t num_pairs) {
    const Tensor c = decay.contiguous(), p = positions.contiguous(), l = lattice.contiguous();
    const Tensor total = at::empty({num_pairs, decay.size(1)}, decay.options());
    AT_DISPATCH_FLOATING_TYPES(decay.scalar_type(), "cpu_reciprocal_sum", [&] {
        const auto inputs = sum_inputs<scalar_t>(c, p, l, ptr, g_ptr, g);
        scalar_t* to = output<scalar_t>(total);
        const ReleaseGil release;
        reciprocal_sum(inputs, to, torch_threads());
    });
    return total;
}

std::tuple<Tensor, Tensor, Tensor> cpu_reciprocal_sum_backward(const Tensor& grad_total, const Tensor& decay,
                                                               const Tensor& positions, const Tensor& lattice,
                                                               const Tensor& ptr, const Tensor& g_ptr, const Tensor& g,
                                                               int64_t, int64_t, int64_t, const Tensor&,
                                                               bool geometry) {
    const Tensor c = decay.contiguous(), p = positions.contiguous(), l = lattice.contiguous();
    const Tensor grad = grad_total.contiguous();
    const auto result = std::make_tuple(like(c), like_if(geometry, p), like_if(geometry, l));
    AT_DISPATCH_FLOATING_TYPES(decay.scalar_type(), "cpu_reciprocal_sum_backward", [&] {
        const auto inputs = sum_inputs<scalar_t>(c, p, l, ptr, g_ptr, g);
        const ReciprocalGrads<scalar_t> to{
            .decay = output<scalar_t>(std::get<0>(result)),
            .positions = geometry ? output<scalar_t>(std::get<1>(result)) : nullptr,
            .lattice = geometry ? output<scalar_t>(std::get<2>(result)) : nullptr,
        };
        const scalar_t* from = pointer<scalar_t>(grad);
        const ReleaseGil release;
        reciprocal_sum_backward(from, inputs, to, torch_threads());
    });
    return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(crystalformer, CPU, m) {
    m.impl("cpu_reciprocal", &cpu_reciprocal);
    m.impl("cpu_reciprocal_backward", &cpu_reciprocal_backward);
    m.impl("cpu_reciprocal_sum", &cpu_reciprocal_sum);
    m.impl("cpu_reciprocal_sum_backward", &cpu_reciprocal_sum_backward);
}

}  // namespace crystalformer
