// Where tensors lie in memory, and which of them overlap.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"

namespace mas_ext {

// The dimensions of more than one element as (stride, size), by ascending stride.
inline std::vector<std::pair<int64_t, int64_t>> sorted_dims(const Operand& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.sizes[d] != 1) {
      dims.emplace_back(tensor.strides[d], tensor.sizes[d]);
    }
  }
  std::sort(dims.begin(), dims.end());
  return dims;
}

// Dense: its elements fill one range of memory, each address once, in any order.
inline bool is_dense(const Operand& tensor) {
  if (tensor.contiguous) {
    return true;
  }
  int64_t expected = 1;
  for (const auto& [stride, size] : sorted_dims(tensor)) {
    if (stride != expected) {
      return false;
    }
    expected *= size;
  }
  return true;
}

// Every stride exceeds what smaller strides reach, as in any slice of a dense tensor, so no address
// comes twice. The converse need not hold.
inline bool is_nested(const Operand& tensor) {
  if (tensor.contiguous) {
    return true;
  }
  int64_t reach = 0;
  for (const auto& [stride, size] : sorted_dims(tensor)) {
    if (stride <= reach) {
      return false;
    }
    reach += (size - 1) * stride;
  }
  return true;
}

// The memory a tensor touches: [begin, end) in bytes.
struct Span {
  uintptr_t begin, end;
  const Argument* argument;
  size_t index;

  const Operand& tensor() const { return argument->tensors[index]; }
  bool is_written() const { return argument->writable; }
  std::string name() const { return at(*argument, index); }
};

inline Span span_of(const Argument& argument, size_t i) {
  const Operand& tensor = argument.tensors[i];
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data);
  int64_t elements = tensor.numel;
  if (!tensor.contiguous) {
    elements = 1;
    for (size_t d = 0; d < tensor.dim(); ++d) {
      elements += (tensor.sizes[d] - 1) * tensor.strides[d];
    }
  }
  return {begin, begin + static_cast<uintptr_t>(elements) * tensor.element_size(), &argument, i};
}

// The address of every element, sorted. Only for the rare tensor that is not dense.
inline std::vector<uintptr_t> addresses(const Operand& tensor) {
  std::vector<uintptr_t> result{reinterpret_cast<uintptr_t>(tensor.data)};
  for (size_t d = 0; d < tensor.dim(); ++d) {
    const size_t count = result.size();
    const auto step = static_cast<uintptr_t>(tensor.strides[d]) * tensor.element_size();
    for (int64_t k = 1; k < tensor.sizes[d]; ++k) {
      for (size_t j = 0; j < count; ++j) {
        result.push_back(result[j] + static_cast<uintptr_t>(k) * step);
      }
    }
  }
  std::sort(result.begin(), result.end());
  return result;
}

// Whether tensors whose spans overlap really share memory (two column slices do not).
inline bool share_memory(const Span& a, const Span& b) {
  const Operand &first = a.tensor(), &second = b.tensor();
  if (is_dense(first) && is_dense(second)) {
    return true;
  }
  const auto left = addresses(first), right = addresses(second);
  const auto left_size = first.element_size(), right_size = second.element_size();
  for (size_t i = 0, j = 0; i < left.size() && j < right.size();) {
    if (left[i] + left_size <= right[j]) {
      ++i;
    } else if (right[j] + right_size <= left[i]) {
      ++j;
    } else {
      return true;
    }
  }
  return false;
}

inline void check_no_self_overlap(const char* op, const Span& span) {
  if (is_nested(span.tensor())) {
    return;
  }
  const auto places = addresses(span.tensor());
  if (std::adjacent_find(places.begin(), places.end()) != places.end()) {
    fail(op, span.name(),
         " is written but overlaps itself in memory (an expanded tensor?); pass a clone()");
  }
}

inline void check_apart(const char* op, const Span& a, const Span& b) {
  if ((a.is_written() || b.is_written()) && share_memory(a, b)) {
    const Span &written = a.is_written() ? a : b, &aliased = a.is_written() ? b : a;
    fail(op, written.name(), " is written but shares memory with ", aliased.name(),
         "; pass a clone() of one of them");
  }
}

inline void add_spans(const char* op, const Argument& argument, std::vector<Span>& spans) {
  for (size_t i = 0; i < argument.tensors.size(); ++i) {
    if (argument.tensors[i].numel > 0) {
      spans.push_back(span_of(argument, i));
      if (argument.writable) {
        check_no_self_overlap(op, spans.back());
      }
    }
  }
}

// Nothing that is written may share memory with anything else: two threads would race for it.
// (`extra` is read, too.)
inline void check_no_overlap(const char* op, std::initializer_list<Argument> arguments,
                             const Argument& extra) {
  if (std::none_of(arguments.begin(), arguments.end(),
                   [](const Argument& argument) { return argument.writable; })) {
    return;
  }
  std::vector<Span> spans;
  spans.reserve(arguments.size() * arguments.begin()->tensors.size() + extra.tensors.size());
  for (const Argument& argument : arguments) {
    add_spans(op, argument, spans);
  }
  add_spans(op, extra, spans);
  std::sort(spans.begin(), spans.end(),
            [](const Span& a, const Span& b) { return a.begin < b.begin; });
  std::vector<const Span*> open;  // spans that reach beyond the current one's beginning
  for (const Span& span : spans) {
    std::erase_if(open, [&](const Span* other) { return other->end <= span.begin; });
    for (const Span* other : open) {
      check_apart(op, span, *other);
    }
    open.push_back(&span);
  }
}

}  // namespace mas_ext
