// accumulate_importance_ on the CPU: Ω += scale·|g|, 12 bytes a float32 parameter.
#include <torch/csrc/stable/library.h>

#include "../formulas.h"
#include "chunks.h"
#include "multiversion.h"
#include "scalars.h"

namespace mas_ext::cpu {
namespace {

template <class T, class A>
MAS_MULTIVERSION void accumulate(A* __restrict__ omega, const T* __restrict__ grads, int64_t size,
                                 A scale) {
  for (int64_t i = 0; i < size; ++i) {
    omega[i] += importance_increment(static_cast<A>(grads[i]), scale);
  }
}

void accumulate_importance_(const TensorList& omega, const TensorList& grads, double scale) {
  constexpr const char* op = "accumulate_importance_";
  check_non_negative(op, "scale", scale);
  FlatList<2> list(op, {{.name = "omega", .tensors = omega, .is_omega = true, .writable = true},
                        {.name = "grads", .tensors = grads}});
  const auto chunks = make_chunks(list);
  for_each_chunk(chunks, list.total(), [&](size_t i) {
    visit_dtype(chunks[i].entry->dtype, [&]<class T>() {
      using A = accumulate_t<T>;
      accumulate(chunks[i].stream<A>(0), chunks[i].stream<const T>(1), chunks[i].size,
                 static_cast<A>(scale));
    });
  });
  list.write_back();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CPU, m) {
  m.impl("accumulate_importance_", TORCH_BOX(&accumulate_importance_));
}

}  // namespace mas_ext::cpu
