// The operators of real space: the layout of an image list, and the sums over it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention.h"
#include "bindings.h"
#include "encoding.h"
#include "list_check.h"
#include "memory.h"
#include "settings.h"

namespace crystalformer {

namespace {

// What rounding loses anyway may be left out even when `tol` asks for nothing to be.
double at_least_rounding(double tol, const Tensor& x) {
    return std::max(tol, x.scalar_type() == ScalarType::Float ? 0x1p-24 : 0x1p-53);
}

// The radial basis of `num` functions, of which `smallest` is the smallest value that counts.
Window window_of(int64_t num, const Settings& settings, double smallest) {
    return num ? Window::make(num, settings.r_max, settings.width, smallest) : Window::make(0, 1, 1, smallest);
}

// The image list as ImageList.packed makes one tensor of it, and the geometry.
template <class T>
Images<T> images_of(const Tensor& positions, const Tensor& lattice, const Tensor& packed, const Settings& settings) {
    CHECK_VALUE(positions.dim() == 2 && lattice.dim() == 3,
                "positions must have two and lattice three dimensions, not shapes ", positions.sizes(), ", ",
                lattice.sizes());
    const int64_t atoms = positions.size(0), crystals = lattice.size(0);
    check_shape("positions", positions, {atoms, 3});
    check_shape("lattice", lattice, {crystals, 3, 3});
    Words words("images", packed);
    const int64_t *ptr = words.take<int64_t>(crystals + 1), *row_ptr = words.take<int64_t>(atoms + 1);
    const int64_t images = words.left() / 4;
    Images<T> list{
        atoms, crystals, images, ptr, row_ptr, nullptr, nullptr, nullptr, pointer<T>(positions), pointer<T>(lattice)};
    if (settings.of_orbits) {
        list.orbits = words.take<OrbitEntry>(images);
    } else {
        list.col = words.take<int32_t>(images);
        list.shift = words.take<int32_t>(3 * images);
    }
    words.check_end();
    return list;
}

Tensor cpu_layout(const Tensor& positions, const Tensor& lattice, const Tensor& packed, int64_t num,
                  List<double> numbers, bool by_pair, bool merge) {
    const Contiguous p = positions, l = lattice;
    const Settings settings = Settings::read(numbers);
    const double tol = at_least_rounding(settings.tol, positions);
    const Window window = window_of(num, settings, tol);
    Tensor block;
    for_dtype("positions", positions, [&]<class scalar_t>() {
        const auto images = images_of<scalar_t>(p, l, packed, settings);
        const Pairs pairs = find_pairs(images, by_pair);
        const LayoutHeader header = layout_header(images, window, by_pair, merge, pairs.number());
        int64_t bytes;
        place_layout<scalar_t>(header.sizes, nullptr, &bytes);
        block = empty({bytes}, aoti_torch_dtype_uint8());
        // A shell's spread moves b, and log p by 2 a d times it, by less than tol as long as a d times the scale is
        // less than 32. Positions are rounded as much as the least spread anyway.
        const double scale = num ? std::min(1.0, window.spacing * window.width) : 1.0;
        const double spread = std::max(tol * scale / 64, sizeof(scalar_t) == 4 ? 2e-6 : 4e-15);
        const ReleaseGil release;
        build_layout(images, pairs, spread, header, static_cast<char*>(block.mutable_data_ptr()), torch_threads());
    });
    return block;
}

// A layout, if it was made for these images and this window. merge: whether a merged one will do, because the gradients
// of positions and lattice are not wanted.
template <class T>
Layout<T> layout_of(const Tensor& block, const Images<T>& images, const Window& window, bool by_pair, bool merge) {
    LayoutHeader found{};
    CHECK_VALUE(merge || !images.orbits,
                "images must be of all atoms, not of orbits, for the gradients of positions and lattice");
    CHECK_VALUE(block.scalar_type() == ScalarType::Byte && block.dim() == 1 && block.is_contiguous() &&
                    block.numel() >= int64_t(sizeof found),
                "layout must be what cpu_layout makes of the image list, not ", block.numel(), " elements of ",
                block.scalar_type());
    char* memory = static_cast<char*>(block.mutable_data_ptr());
    std::memcpy(&found, memory, sizeof found);
    check_header(layout_header(images, window, by_pair, merge, found.sizes.pairs), found);
    int64_t bytes;
    const Layout<T> layout = place_layout<T>(found.sizes, memory, &bytes);
    CHECK_VALUE(block.numel() == bytes, "layout must have ", bytes, " bytes, not ", block.numel());
    return layout;
}

// All arguments of the attention operators that the core reads, contiguous and alive.
struct AttentionArguments {
    Contiguous q, k, v, decay, edge_weight, positions, lattice;
    const Tensor &packed, &layout;
    Settings settings;

    // geometry: whether its gradients are wanted.
    template <class T>
    AttentionInputs<T> inputs(bool geometry) const {
        CHECK_VALUE(q.dim() == 3 && v.dim() == 3 && edge_weight.dim() == 3,
                    "q, v and edge_weight must have three dimensions, not shapes ", q.sizes(), ", ", v.sizes(), ", ",
                    edge_weight.sizes());
        const auto images = images_of<T>(positions, lattice, packed, settings);
        const int64_t atoms = images.atoms, heads = q.size(1), dim = q.size(2), value_dim = v.size(2);
        check_shape("q", q, {atoms, heads, dim});
        check_shape("k", k, {atoms, heads, dim});
        check_shape("v", v, {atoms, heads, value_dim});
        check_shape("decay", decay, {atoms, heads});
        check_shape("edge_weight", edge_weight, {heads, value_dim, edge_weight.size(2)});
        const double bound = at_least_rounding(settings.tol, q);
        const Window window = window_of(edge_weight.size(2), settings, bound);
        return {
            .atoms = atoms,
            .crystals = images.crystals,
            .heads = int(heads),
            .dim = int(dim),
            .value_dim = int(value_dim),
            .q = pointer<T>(q),
            .k = pointer<T>(k),
            .v = pointer<T>(v),
            .decay = pointer<T>(decay),
            .edge_weight = pointer<T>(edge_weight),
            .positions = images.positions,
            .lattice = images.lattice,
            .ptr = images.ptr,
            .shift = images.shift,
            .tol = bound,
            .layout = layout_of(layout, images, window, false, !geometry),
            .window = window,
        };
    }
};

std::tuple<Tensor, Tensor, Tensor> cpu_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& decay,
                                                 const Tensor& edge_weight, const Tensor& positions,
                                                 const Tensor& lattice, const Tensor& images, const Tensor& layout,
                                                 List<double> settings) {
    const AttentionArguments x{q,         k,       v,      decay,  edge_weight,
                               positions, lattice, images, layout, Settings::read(settings)};
    const Tensor y = empty(v.sizes(), v), lse = empty(decay.sizes(), v);
    const Tensor c = empty({v.size(0), v.size(1), edge_weight.size(2)}, v);
    for_dtype("q", q, [&]<class scalar_t>() {
        const AttentionOutputs<scalar_t> out{output<scalar_t>(y), output<scalar_t>(lse), output<scalar_t>(c)};
        const auto inputs = x.inputs<scalar_t>(false);
        const ReleaseGil release;
        attention(inputs, out, torch_threads());
    });
    return {y, lse, c};
}

using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SevenTensors cpu_attention_backward(const Tensor& grad_y, const Tensor& grad_lse, const Tensor& q, const Tensor& k,
                                    const Tensor& v, const Tensor& decay, const Tensor& edge_weight,
                                    const Tensor& positions, const Tensor& lattice, const Tensor& images,
                                    const Tensor& layout, List<double> settings, const Tensor& y, const Tensor& lse,
                                    const Tensor& c, bool geometry) {
    const AttentionArguments x{q,         k,       v,      decay,  edge_weight,
                               positions, lattice, images, layout, Settings::read(settings)};
    const Contiguous grads[] = {grad_y, grad_lse};
    const Contiguous outputs[] = {y, lse, c};
    const SevenTensors result{like(q),
                              like(k),
                              like(v),
                              like(decay),
                              like(edge_weight),
                              like_if(geometry, positions),
                              like_if(geometry, lattice)};
    check_shape("grad_y", grads[0], v.sizes());
    check_shape("grad_lse", grads[1], decay.sizes());
    check_shape("y", outputs[0], v.sizes());
    check_shape("lse", outputs[1], decay.sizes());
    check_shape("c", outputs[2], {q.size(0), q.size(1), edge_weight.size(2)});
    for_dtype("q", q, [&]<class scalar_t>() {
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
        const auto inputs = x.inputs<scalar_t>(geometry);
        const ReleaseGil release;
        attention_backward(grad, inputs, saved, to, torch_threads());
    });
    return result;
}

template <class T>
EncodingInputs<T> encoding_inputs(const Tensor& decay, const Tensor& edge_weight, const Images<T>& images,
                                  const Tensor& layout, int64_t num_pairs, const Settings& settings, bool geometry) {
    CHECK_VALUE(decay.dim() == 2 && edge_weight.dim() == 3,
                "decay must have two and edge_weight three dimensions, not shapes ", decay.sizes(), ", ",
                edge_weight.sizes());
    const int64_t heads = decay.size(1), value_dim = edge_weight.size(1);
    check_shape("decay", decay, {images.atoms, heads});
    check_shape("edge_weight", edge_weight, {heads, value_dim, edge_weight.size(2)});
    const double bound = at_least_rounding(settings.tol, decay);
    const Window window = window_of(edge_weight.size(2), settings, bound);
    const Layout<T> found = layout_of(layout, images, window, true, !geometry);
    CHECK_VALUE(num_pairs == found.segments, "num_pairs must be ", found.segments, ", not ", num_pairs);
    return {
        .atoms = images.atoms,
        .crystals = images.crystals,
        .heads = int(heads),
        .value_dim = int(value_dim),
        .decay = pointer<T>(decay),
        .edge_weight = pointer<T>(edge_weight),
        .positions = images.positions,
        .lattice = images.lattice,
        .ptr = images.ptr,
        .shift = images.shift,
        .tol = bound,
        .layout = found,
        .window = window,
    };
}

std::tuple<Tensor, Tensor> cpu_encoding(const Tensor& decay, const Tensor& edge_weight, const Tensor& positions,
                                        const Tensor& lattice, const Tensor& images, const Tensor& layout,
                                        int64_t num_pairs, List<double> settings) {
    const Contiguous a = decay, w = edge_weight;
    const Contiguous p = positions, l = lattice;
    const Tensor alpha = empty({num_pairs, decay.size(1)}, decay);
    const Tensor beta = empty({num_pairs, decay.size(1), edge_weight.size(1)}, decay);
    for_dtype("decay", decay, [&]<class scalar_t>() {
        const Settings told = Settings::read(settings);
        const auto list = images_of<scalar_t>(p, l, images, told);
        const auto in = encoding_inputs(a, w, list, layout, num_pairs, told, false);
        const EncodingOutputs<scalar_t> out{output<scalar_t>(alpha), output<scalar_t>(beta)};
        const ReleaseGil release;
        encoding(in, out, torch_threads());
    });
    return {alpha, beta};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cpu_encoding_backward(
    const Tensor& grad_alpha, const Tensor& grad_beta, const Tensor& decay, const Tensor& edge_weight,
    const Tensor& positions, const Tensor& lattice, const Tensor& images, const Tensor& layout, int64_t num_pairs,
    List<double> settings, const Tensor& alpha, const Tensor& beta, bool geometry) {
    const Contiguous a = decay, w = edge_weight;
    const Contiguous p = positions, l = lattice;
    const Contiguous tensors[] = {grad_alpha, grad_beta, alpha, beta};
    const auto result = std::make_tuple(like(a), like(w), like_if(geometry, p), like_if(geometry, l));
    for_dtype("decay", decay, [&]<class scalar_t>() {
        const Settings told = Settings::read(settings);
        const auto list = images_of<scalar_t>(p, l, images, told);
        const auto in = encoding_inputs(a, w, list, layout, num_pairs, told, geometry);
        const int64_t heads = in.heads, values = in.value_dim;
        check_shape("grad_alpha", tensors[0], {num_pairs, heads});
        check_shape("grad_beta", tensors[1], {num_pairs, heads, values});
        check_shape("alpha", tensors[2], {num_pairs, heads});
        check_shape("beta", tensors[3], {num_pairs, heads, values});
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

STABLE_TORCH_LIBRARY_IMPL(crystalformer, CPU, m) {
    m.impl("cpu_layout", TORCH_BOX(&cpu_layout));
    m.impl("cpu_attention", TORCH_BOX(&cpu_attention));
    m.impl("cpu_attention_backward", TORCH_BOX(&cpu_attention_backward));
    m.impl("cpu_encoding", TORCH_BOX(&cpu_encoding));
    m.impl("cpu_encoding_backward", TORCH_BOX(&cpu_encoding_backward));
}

}  // namespace crystalformer
