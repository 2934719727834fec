// The operators of reciprocal space: the sums over wave vectors.
#include "bindings.h"
#include "list_check.h"
#include "reciprocal.h"

namespace crystalformer {

namespace {

constexpr int64_t LARGEST = 1 << 24;

// The total of the sums alone, or its gradient, (P,H).
template <class T>
void check_total(const char* name, const Tensor& total, const ReciprocalInputs<T>& in) {
    int64_t pairs = 0;
    for (int64_t c = 0; c < in.crystals; ++c) pairs += (in.ptr[c + 1] - in.ptr[c]) * (in.ptr[c + 1] - in.ptr[c]);
    check_shape(name, total, {pairs, in.heads});
}

// WaveVectors.largest has more numbers of a list of orbits.
bool of_orbits(Shape largest) {
    return largest.size() > 2;
}

void check_of_atoms(Shape largest) {
    CHECK_VALUE(!of_orbits(largest), "wave_vectors must be of all atoms, not of orbits, for the sums of pairs");
}

// What the sums S read, of wave vectors as WaveVectors.packed makes one tensor of them; q, k and v are null.
template <class T>
ReciprocalInputs<T> sum_inputs(const Tensor& decay, const Tensor& positions, const Tensor& lattice, const Tensor& waves,
                               bool of_orbits) {
    CHECK_VALUE(decay.dim() == 2 && lattice.dim() == 3, "decay must have two and lattice three dimensions, not shapes ",
                decay.sizes(), ", ", lattice.sizes());
    const int64_t rows = decay.size(0), crystals = lattice.size(0);
    check_shape("positions", positions, {rows, 3});
    check_shape("lattice", lattice, {crystals, 3, 3});
    Words words("waves", waves);
    const int64_t *first = words.take<int64_t>(crystals + 1), *first_vector = words.take<int64_t>(crystals + 1);
    const int64_t* atom_ptr = nullptr;
    const double* atoms = nullptr;
    if (of_orbits) {
        atom_ptr = words.take<int64_t>(rows + 1);
        const int64_t* end = atom_ptr + rows + 1;
        CHECK_VALUE(!atom_ptr[0] && std::adjacent_find(atom_ptr, end, std::greater_equal<>()) == end &&
                        atom_ptr[rows] <= words.left(),
                    "atom_ptr must run from 0 to the number of atoms and rise by at least one a row");
        atoms = words.take<double>(3 * atom_ptr[rows]);
    }
    const int64_t vectors = words.left() / 3;
    const int32_t* n = words.take<int32_t>(3 * vectors);
    words.check_end();
    check_offsets("ptr", first, crystals, rows);
    check_offsets("g_ptr", first_vector, crystals, vectors);
    for (int64_t m = 0; m < 3 * vectors; ++m)  // memory is taken for powers up to these
        CHECK_VALUE(std::abs(int64_t(n[m])) <= LARGEST, "g must hold integers within ", LARGEST, ", not ", n[m]);
    return {
        .rows = rows,
        .crystals = crystals,
        .heads = int(decay.size(1)),
        .decay = pointer<T>(decay),
        .positions = pointer<T>(positions),
        .lattice = pointer<T>(lattice),
        .ptr = first,
        .g_ptr = first_vector,
        .g = n,
        .atom_ptr = atom_ptr,
        .atoms = atoms,
    };
}

// All arguments of the reciprocal operators, contiguous and alive.
struct ReciprocalArguments {
    Contiguous q, k, v, decay, positions, lattice;
    const Tensor& waves;
    bool of_orbits;

    template <class T>
    ReciprocalInputs<T> inputs() const {
        ReciprocalInputs<T> in = sum_inputs<T>(decay, positions, lattice, waves, of_orbits);
        CHECK_VALUE(q.dim() == 3 && v.dim() == 3, "q and v must have three dimensions, not shapes ", q.sizes(), ", ",
                    v.sizes());
        check_shape("q", q, {in.rows, in.heads, q.size(2)});
        check_shape("k", k, q.sizes());
        check_shape("v", v, {in.rows, in.heads, v.size(2)});
        in.dim = int(q.size(2));
        in.value_dim = int(v.size(2));
        in.q = pointer<T>(q);
        in.k = pointer<T>(k);
        in.v = pointer<T>(v);
        return in;
    }
};

Tensor cpu_reciprocal(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& decay, const Tensor& positions,
                      const Tensor& lattice, const Tensor& waves, Shape largest) {
    const ReciprocalArguments x{q, k, v, decay, positions, lattice, waves, of_orbits(largest)};
    const Tensor y = empty(v.sizes(), v);
    for_dtype("q", q, [&]<class scalar_t>() {
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
                                   const Tensor& waves, Shape largest, const Tensor&, bool geometry) {
    const ReciprocalArguments x{q, k, v, decay, positions, lattice, waves, of_orbits(largest)};
    CHECK_VALUE(!geometry || !x.of_orbits,
                "wave_vectors must be of all atoms, not of orbits, for the gradients of positions and lattice");
    const Contiguous grad = grad_y;
    check_shape("grad_y", grad, v.sizes());
    const SixTensors result{
        like(x.q), like(x.k), like(x.v), like(x.decay), like_if(geometry, x.positions), like_if(geometry, x.lattice)};
    for_dtype("q", q, [&]<class scalar_t>() {
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

Tensor cpu_reciprocal_sum(const Tensor& decay, const Tensor& positions, const Tensor& lattice, const Tensor& waves,
                          Shape largest, int64_t num_pairs) {
    check_of_atoms(largest);
    const Contiguous c = decay, p = positions, l = lattice;
    const Tensor total = empty({num_pairs, decay.size(1)}, decay);
    for_dtype("decay", decay, [&]<class scalar_t>() {
        const auto inputs = sum_inputs<scalar_t>(c, p, l, waves, false);
        check_total("total", total, inputs);
        scalar_t* to = output<scalar_t>(total);
        const ReleaseGil release;
        reciprocal_sum(inputs, to, torch_threads());
    });
    return total;
}

std::tuple<Tensor, Tensor, Tensor> cpu_reciprocal_sum_backward(const Tensor& grad_total, const Tensor& decay,
                                                               const Tensor& positions, const Tensor& lattice,
                                                               const Tensor& waves, Shape largest, int64_t,
                                                               const Tensor&, bool geometry) {
    check_of_atoms(largest);
    const Contiguous c = decay, p = positions, l = lattice;
    const Contiguous grad = grad_total;
    const auto result = std::make_tuple(like(c), like_if(geometry, p), like_if(geometry, l));
    for_dtype("decay", decay, [&]<class scalar_t>() {
        const auto inputs = sum_inputs<scalar_t>(c, p, l, waves, false);
        const ReciprocalGrads<scalar_t> to{
            .decay = output<scalar_t>(std::get<0>(result)),
            .positions = geometry ? output<scalar_t>(std::get<1>(result)) : nullptr,
            .lattice = geometry ? output<scalar_t>(std::get<2>(result)) : nullptr,
        };
        check_total("grad_total", grad, inputs);
        const scalar_t* from = pointer<scalar_t>(grad);
        const ReleaseGil release;
        reciprocal_sum_backward(from, inputs, to, torch_threads());
    });
    return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(crystalformer, CPU, m) {
    m.impl("cpu_reciprocal", TORCH_BOX(&cpu_reciprocal));
    m.impl("cpu_reciprocal_backward", TORCH_BOX(&cpu_reciprocal_backward));
    m.impl("cpu_reciprocal_sum", TORCH_BOX(&cpu_reciprocal_sum));
    m.impl("cpu_reciprocal_sum_backward", TORCH_BOX(&cpu_reciprocal_sum_backward));
}

}  // namespace crystalformer
