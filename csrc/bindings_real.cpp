// The operators of real space: the image list, its layout, and the sums over it.
#include <algorithm>
#include <cstring>

#include "attention.h"
#include "bindings.h"
#include "encoding.h"
#include "images.h"

namespace crystalformer {

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt> cpu_images(const Tensor& positions, const Tensor& lattice,
                                                                   const Tensor& ptr, const Tensor& decay_min,
                                                                   double tol, double logit_range, double beyond,
                                                                   std::optional<double> cutoff, bool every_pair) {
    const Tensor p = positions.contiguous(), l = lattice.contiguous(), a = decay_min.contiguous();
    const ImageRequest request{positions.size(0),
                               ptr.size(0) - 1,
                               pointer<double>(p),
                               pointer<double>(l),
                               pointer<int64_t>(ptr),
                               pointer<double>(a),
                               tol,
                               logit_range,
                               beyond,
                               cutoff,
                               every_pair};
    const Tensor row_ptr = at::empty({positions.size(0) + 1}, ptr.options());
    const Tensor radius = at::empty({ptr.size(0) - 1}, positions.options());
    Tensor col, shift;
    {
        const ReleaseGil release;
        const ImageSearch search(request, torch_threads(), output<int64_t>(row_ptr), output<double>(radius));
        const int64_t images = output<int64_t>(row_ptr)[positions.size(0)];
        col = at::empty({images}, ptr.options().dtype(at::kInt));
        shift = at::empty({images, 3}, ptr.options().dtype(at::kInt));
        search.write(output<int64_t>(row_ptr), output<int32_t>(col), output<int32_t>(shift), torch_threads());
    }
    int64_t pairs = 0;
    for (int64_t c = 0; c < request.crystals; ++c) {
        const int64_t atoms = request.ptr[c + 1] - request.ptr[c];
        pairs += atoms * atoms;
    }
    return {row_ptr, col, shift, radius, pairs};
}

// What rounding loses anyway may be left out even when `tol` asks for nothing to be.
double at_least_rounding(double tol, const Tensor& x) {
    return std::max(tol, x.scalar_type() == at::kFloat ? 0x1p-24 : 0x1p-53);
}

// The radial basis of `num` functions, of which r_max and width are `basis`; none of it when num = 0.
Window window_of(int64_t num, at::ArrayRef<double> basis, double smallest) {
    if (!num) return Window::make(0, 1, 1, smallest);
    TORCH_CHECK(basis.size() == 2, "basis must be r_max and width, not ", basis);
    return Window::make(num, basis[0], basis[1], smallest);
}

Tensor cpu_layout(const Tensor& positions, const Tensor& lattice, const Tensor& ptr, const Tensor& row_ptr,
                  const Tensor& col, const Tensor& shift, int64_t num, at::ArrayRef<double> basis, double tol,
                  bool by_pair, bool merge) {
    const Tensor p = positions.contiguous(), l = lattice.contiguous();
    tol = at_least_rounding(tol, positions);
    const Window window = window_of(num, basis, tol);
    Tensor block;
    AT_DISPATCH_FLOATING_TYPES(positions.scalar_type(), "cpu_layout", [&] {
        const Images<scalar_t> images{positions.size(0),       ptr.size(0) - 1,           col.size(0),
                                      pointer<int64_t>(ptr),   pointer<int64_t>(row_ptr), pointer<int32_t>(col),
                                      pointer<int32_t>(shift), pointer<scalar_t>(p),      pointer<scalar_t>(l)};
        const LayoutSizes sizes = layout_sizes(images, by_pair, merge);
        int64_t bytes;
        place_layout<scalar_t>(sizes, nullptr, &bytes);
        block = at::empty({bytes}, positions.options().dtype(at::kByte));
        // A shell's spread moves b and log p, by 2 a d times it, by less than tol; where an image matters a d² is less
        // than 100 or so. Positions are rounded as much as the least spread anyway.
        const double scale = num ? std::min(1.0, window.spacing * window.width) : 1.0;
        const double spread = std::max(tol * scale / 64, sizeof(scalar_t) == 4 ? 2e-6 : 4e-15);
        const ReleaseGil release;
        build_layout(images, window, spread, sizes, static_cast<char*>(block.data_ptr()), torch_threads());
    });
    return block;
}

template <class T>
Layout<T> layout_of(const Tensor& block) {
    TORCH_CHECK(block.numel(), "the CPU operators need the layout that cpu_layout makes of the image list");
    LayoutSizes sizes;
    char* memory = static_cast<char*>(block.data_ptr());
    std::memcpy(&sizes, memory, sizeof sizes);
    return place_layout<T>(sizes, memory);
}

void check_members(bool geometry, const int64_t* entry) {
    TORCH_CHECK(!geometry || entry, "the gradients of positions and lattice need a layout made with merge=False");
}

// All arguments of the attention operators that the core reads, contiguous and alive.
struct AttentionArguments {
    Tensor q, k, v, decay, edge_weight, positions, lattice;
    const Tensor &ptr, &shift, &layout;
    at::ArrayRef<double> basis;
    double tol;

    template <class T>
    AttentionInputs<T> inputs() const {
        const double bound = at_least_rounding(tol, q);
        return {
            .atoms = q.size(0),
            .crystals = ptr.size(0) - 1,
            .heads = int(q.size(1)),
            .dim = int(q.size(2)),
            .value_dim = int(v.size(2)),
            .q = pointer<T>(q),
            .k = pointer<T>(k),
            .v = pointer<T>(v),
            .decay = pointer<T>(decay),
            .edge_weight = pointer<T>(edge_weight),
            .positions = pointer<T>(positions),
            .lattice = pointer<T>(lattice),
            .ptr = pointer<int64_t>(ptr),
            .shift = pointer<int32_t>(shift),
            .tol = bound,
            .layout = layout_of<T>(layout),
            .window = window_of(edge_weight.size(2), basis, bound),
        };
    }
};

std::tuple<Tensor, Tensor, Tensor> cpu_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& decay,
                                                 const Tensor& edge_weight, const Tensor& positions,
                                                 const Tensor& lattice, const Tensor& ptr, const Tensor& row_ptr,
                                                 const Tensor& col, const Tensor& shift, const Tensor& layout,
                                                 at::ArrayRef<double> basis, double tol, bool /*tf32*/) {
    const AttentionArguments x{q.contiguous(),
                               k.contiguous(),
                               v.contiguous(),
                               decay.contiguous(),
                               edge_weight.contiguous(),
                               positions.contiguous(),
                               lattice.contiguous(),
                               ptr,
                               shift,
                               layout,
                               basis,
                               tol};
    const Tensor y = at::empty(v.sizes(), v.options()), lse = at::empty(decay.sizes(), v.options());
    const Tensor c = at::empty({v.size(0), v.size(1), edge_weight.size(2)}, v.options());
    AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "cpu_attention", [&] {
        const AttentionOutputs<scalar_t> out{output<scalar_t>(y), output<scalar_t>(lse), output<scalar_t>(c)};
        const auto inputs = x.inputs<scalar_t>();
        const ReleaseGil release;
        attention(inputs, out, torch_threads());
    });
    return {y, lse, c};
}

using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SevenTensors cpu_attention_backward(const Tensor& grad_y, const Tensor& grad_lse, const Tensor& q, const Tensor& k,
                                    const Tensor& v, const Tensor& decay, const Tensor& edge_weight,
                                    const Tensor& positions, const Tensor& lattice, const Tensor& ptr,
                                    const Tensor& row_ptr, const Tensor& col, const Tensor& shift, const Tensor& layout,
                                    at::ArrayRef<double> basis, double tol, bool /*tf32*/, const Tensor& y,
                                    const Tensor& lse, const Tensor& c, bool geometry) {
    const AttentionArguments x{q.contiguous(),
                               k.contiguous(),
                               v.contiguous(),
                               decay.contiguous(),
                               edge_weight.contiguous(),
                               positions.contiguous(),
                               lattice.contiguous(),
                               ptr,
                               shift,
                               layout,
                               basis,
                               tol};
    const Tensor grads[] = {grad_y.contiguous(), grad_lse.contiguous()};
    const Tensor outputs[] = {y.contiguous(), lse.contiguous(), c.contiguous()};
    const SevenTensors result{like(q),
                              like(k),
                              like(v),
                              like(decay),
                              like(edge_weight),
                              like_if(geometry, positions),
                              like_if(geometry, lattice)};
    AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "cpu_attention_backward", [&] {
        const AttentionOutputs<const scalar_t> grad{pointer<scalar_t>(grads[0]), pointer<scalar_t>(grads[1]), nullptr};
        const AttentionOutputs<const scalar_t> saved{pointer<scalar_t>(outputs[0]), pointer<scalar_t>(outputs[1]),
                                                     pointer<scalar_t>(outputs[2])};
        const AttentionGrads<scalar_t> to{
            output<scalar_t>(std::get<0>(result)),
            output<scalar_t>(std::get<1>(result)),
            output<scalar_t>(std::get<2>(result)),
            output<scalar_t>(std::get<3>(result)),
            output<scalar_t>(std::get<4>(result)),
            geometry ? output<scalar_t>(std::get<5>(result)) : nullptr,
            geometry ? output<scalar_t>(std::get<6>(result)) : nullptr,
        };
        const auto inputs = x.inputs<scalar_t>();
        check_members(geometry, inputs.layout.entry);
        const ReleaseGil release;
        attention_backward(grad, inputs, saved, to, torch_threads());
    });
    return result;
}

template <class T>
EncodingInputs<T> encoding_inputs(const Tensor& decay, const Tensor& edge_weight, const Tensor& positions,
                                  const Tensor& lattice, const Tensor& ptr, const Tensor& shift, const Tensor& layout,
                                  at::ArrayRef<double> basis, double tol) {
    const double bound = at_least_rounding(tol, decay);
    return {
        .atoms = decay.size(0),
        .crystals = ptr.size(0) - 1,
        .heads = int(decay.size(1)),
        .value_dim = int(edge_weight.size(1)),
        .decay = pointer<T>(decay),
        .edge_weight = pointer<T>(edge_weight),
        .positions = pointer<T>(positions),
        .lattice = pointer<T>(lattice),
        .ptr = pointer<int64_t>(ptr),
        .shift = pointer<int32_t>(shift),
        .tol = bound,
        .layout = layout_of<T>(layout),
        .window = window_of(edge_weight.size(2), basis, bound),
    };
}

std::tuple<Tensor, Tensor> cpu_encoding(const Tensor& decay, const Tensor& edge_weight, const Tensor& positions,
                                        const Tensor& lattice, const Tensor& ptr, const Tensor& row_ptr,
                                        const Tensor& col, const Tensor& shift, const Tensor& layout, int64_t num_pairs,
                                        at::ArrayRef<double> basis, double tol, bool /*tf32*/) {
    const Tensor a = decay.contiguous(), w = edge_weight.contiguous();
    const Tensor p = positions.contiguous(), l = lattice.contiguous();
    const Tensor alpha = at::empty({num_pairs, decay.size(1)}, decay.options());
    const Tensor beta = at::empty({num_pairs, decay.size(1), edge_weight.size(1)}, decay.options());
    AT_DISPATCH_FLOATING_TYPES(decay.scalar_type(), "cpu_encoding", [&] {
        const auto in = encoding_inputs<scalar_t>(a, w, p, l, ptr, shift, layout, basis, tol);
        const EncodingOutputs<scalar_t> out{output<scalar_t>(alpha), output<scalar_t>(beta)};
        const ReleaseGil release;
        encoding(in, out, torch_threads());
    });
    return {alpha, beta};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cpu_encoding_backward(
    const Tensor& grad_alpha, const Tensor& grad_beta, const Tensor& decay, const Tensor& edge_weight,
    const Tensor& positions, const Tensor& lattice, const Tensor& ptr, const Tensor& row_ptr, const Tensor& col,
    const Tensor& shift, const Tensor& layout, int64_t num_pairs, at::ArrayRef<double> basis, double tol, bool /*tf32*/,
    const Tensor& alpha, const Tensor& beta, bool geometry) {
    const Tensor a = decay.contiguous(), w = edge_weight.contiguous();
    const Tensor p = positions.contiguous(), l = lattice.contiguous();
    const Tensor tensors[] = {grad_alpha.contiguous(), grad_beta.contiguous(), alpha.contiguous(), beta.contiguous()};
    const auto result = std::make_tuple(like(a), like(w), like_if(geometry, p), like_if(geometry, l));
    AT_DISPATCH_FLOATING_TYPES(decay.scalar_type(), "cpu_encoding_backward", [&] {
        const auto in = encoding_inputs<scalar_t>(a, w, p, l, ptr, shift, layout, basis, tol);
        check_members(geometry, in.layout.entry);
        const EncodingOutputs<const scalar_t> grad{pointer<scalar_t>(tensors[0]), pointer<scalar_t>(tensors[1])};
        const EncodingOutputs<const scalar_t> out{pointer<scalar_t>(tensors[2]), pointer<scalar_t>(tensors[3])};
        const EncodingGrads<scalar_t> to{
            output<scalar_t>(std::get<0>(result)),
            output<scalar_t>(std::get<1>(result)),
            geometry ? output<scalar_t>(std::get<2>(result)) : nullptr,
            geometry ? output<scalar_t>(std::get<3>(result)) : nullptr,
        };
        const ReleaseGil release;
        encoding_backward(grad, in, out, to, torch_threads());
    });
    return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(crystalformer, CPU, m) {
    m.impl("cpu_images", &cpu_images);
    m.impl("cpu_layout", &cpu_layout);
    m.impl("cpu_attention", &cpu_attention);
    m.impl("cpu_attention_backward", &cpu_attention_backward);
    m.impl("cpu_encoding", &cpu_encoding);
    m.impl("cpu_encoding_backward", &cpu_encoding_backward);
}

}  // namespace crystalformer
