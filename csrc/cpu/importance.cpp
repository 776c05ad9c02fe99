// accumulate_importance_ on the CPU: Ω += scale·|g| or scale·g², 12 bytes per float32 parameter.
#include "../formulas.h"
#include "chunks.h"
#include "kernels.h"
#include "multiversion.h"

namespace mas_ext::cpu {
namespace {

template <class Magnitude, class T, class A>
MAS_MULTIVERSION void add_magnitudes(A* __restrict__ omega, const T* __restrict__ grads,
                                     int64_t size, A scale) {
  for (int64_t i = 0; i < size; ++i) {
    omega[i] += importance_increment<Magnitude>(static_cast<A>(grads[i]), scale);
  }
}

struct Kernels : CpuKernels {
  template <class Magnitude>
  static void accumulate(Magnitude, const Call&, const FlatList<2>& list, double scale) {
    const auto chunks = make_chunks(list);
    for_each_chunk(chunks, list.total(), [&](size_t i) {
      visit_dtype(chunks[i].entry->dtype, [&]<class T>() {
        using A = accumulate_t<T>;
        add_magnitudes<Magnitude>(chunks[i].stream<A>(0), chunks[i].stream<const T>(1),
                                  chunks[i].size, static_cast<A>(scale));
      });
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CPU, m) {
  implement_with_packed_lists<&accumulate_importance_<Kernels>>(m, "accumulate_importance_");
}

}  // namespace mas_ext::cpu
