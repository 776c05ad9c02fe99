// Lists of tensors in one tensor of bytes: the short way from Python to a kernel.
//
// The dispatcher converts a list of tensors four times and allocates for each tensor, which for
// many small tensors costs more than the kernel. mas_ext._C.pack writes instead, for each list, how
// many tensors it has, and after that a PackedTensor for each.
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "arguments.h"

namespace mas_ext {

class PackedLists {
 public:
  explicit PackedLists(const Tensor& bytes) : next_(static_cast<char*>(bytes.data_ptr())) {}

  Operands next() {
    const int64_t length = *reinterpret_cast<const int64_t*>(next_);
    const auto* tensors = reinterpret_cast<const PackedTensor*>(next_ + sizeof(length));
    next_ += sizeof(length) + static_cast<size_t>(length) * sizeof(PackedTensor);
    return Operands(tensors, tensors + length);
  }

 private:
  const char* next_;
};

template <class T>
constexpr bool is_list = std::is_same_v<T, Operands>;

// A function of Operands, for the dispatcher: of lists of tensors.
template <auto Function>
struct FromLists;
template <class Result, class... Args, Result (*Function)(Args...)>
struct FromLists<Function> {
  static Result call(std::conditional_t<is_list<Args>, const TensorList&, Args>... args) {
    return Function(args...);
  }
};

// The same function with its lists packed. `home` is a tensor on their device, which tells the
// dispatcher where to go.
template <auto Function, class Others>
struct FromPacked;
template <class Result, class... Args, Result (*Function)(Args...), class... Others>
struct FromPacked<Function, std::tuple<Others...>> {
  static Result call(const Tensor& lists, const Tensor& home, Others... others) {
    (void)home;
    return call_with(PackedLists(lists), std::tuple<Others...>(others...),
                     std::index_sequence_for<Args...>());
  }

 private:
  static constexpr std::array<bool, sizeof...(Args)> kIsList{is_list<Args>...};

  static constexpr size_t others_before(size_t position) {
    size_t count = 0;
    for (size_t i = 0; i < position; ++i) {
      count += !kIsList[i];
    }
    return count;
  }

  template <size_t Position>
  static decltype(auto) take(PackedLists& lists, std::tuple<Others...>& others) {
    if constexpr (kIsList[Position]) {
      return lists.next();
    } else {
      return std::get<others_before(Position)>(others);
    }
  }

  template <size_t... Positions>
  static Result call_with(PackedLists lists, std::tuple<Others...> others,
                          std::index_sequence<Positions...>) {
    // In braces, since lists are read in their order.
    std::tuple<Args...> args{take<Positions>(lists, others)...};
    return std::apply([](auto&... each) { return Function(static_cast<Args&&>(each)...); }, args);
  }
};

template <class Function>
struct OtherArguments;
template <class Result, class... Args>
struct OtherArguments<Result (*)(Args...)> {
  using type = decltype(std::tuple_cat(
      std::declval<std::conditional_t<is_list<Args>, std::tuple<>, std::tuple<Args>>>()...));
};

// Registers a function of Operands twice: as the operator, and as its overload for packed lists.
template <auto Function>
void implement_with_packed_lists(torch::stable::detail::StableLibrary& library, const char* name) {
  using Others = typename OtherArguments<decltype(Function)>::type;
  library.impl(name, TORCH_BOX((&FromLists<Function>::call)));
  library.impl((std::string(name) + ".packed").c_str(),
               TORCH_BOX((&FromPacked<Function, Others>::call)));
}

}  // namespace mas_ext
