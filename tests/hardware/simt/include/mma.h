// nvcuda::wmma on the host: 16 × 16 × 16 multiplications by a warp. How a fragment is spread over
// the lanes is nobody's business but the hardware's: here it is scrambled, otherwise for each role.
#pragma once

#include <cstdint>
#include <source_location>

#include "cuda_runtime.h"

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

constexpr int kSide = 16;

template <class Role, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static_assert(M == kSide && N == kSide && K == kSide, "the only shape that is modelled");
  static constexpr int num_elements = kSide * kSide / simt::kWarpSize;
  T x[num_elements];
};

template <class T, class Layout>
using Left = fragment<matrix_a, kSide, kSide, kSide, T, Layout>;
template <class T, class Layout>
using Right = fragment<matrix_b, kSide, kSide, kSide, T, Layout>;
using Sum = fragment<accumulator, kSide, kSide, kSide, float>;

// An odd factor modulo 256: every place of the matrix comes once.
template <class Role>
constexpr int kScramble = 147;
template <>
inline constexpr int kScramble<matrix_a> = 77;
template <>
inline constexpr int kScramble<matrix_b> = 45;

struct Element {
  int row, column;
};

template <class Role>
constexpr Element element(int lane, int i) {
  const int place = (lane * 8 + i) * kScramble<Role> % (kSide * kSide);
  return {place / kSide, place % kSide};
}

// What the lanes of a warp bring to a collective access or multiplication.
struct Access {
  const void* address;
  unsigned pitch;
  int layout;
};

// Waits for the whole warp, which must mean one matrix in memory. Orders nothing.
SIMT_UNSEEN inline void agree(Access access, unsigned pitch_bytes, const simt::Place& place) {
  if (reinterpret_cast<uintptr_t>(access.address) % 32 != 0 || pitch_bytes % 16 != 0) {
    simt::fail("misaligned %s (%s:%u): address %p must be a multiple of 32, pitch %u of 16 bytes",
               place.operation, place.file, place.line, access.address, pitch_bytes);
  }
  const auto compare = [&](void** all) SIMT_UNSEEN {
    for (int l = 0; l < simt::kWarpSize; ++l) {
      const auto* other = static_cast<const Access*>(all[l]);
      if (other->address != access.address || other->pitch != access.pitch ||
          other->layout != access.layout) {
        simt::fail("lanes disagree on the matrix of %s (%s:%u)", place.operation, place.file,
                   place.line);
      }
    }
  };
  simt::meet_lanes(place, &access, compare);
}

template <class Role, class T, class Layout>
void load_matrix_sync(fragment<Role, kSide, kSide, kSide, T, Layout>& to, const T* from,
                      unsigned pitch, std::source_location line = std::source_location::current()) {
  agree({from, pitch, 0}, pitch * sizeof(T), {"load_matrix_sync", line});
  for (int i = 0; i < to.num_elements; ++i) {
    const auto [row, column] = element<Role>(simt::self.thread % simt::kWarpSize, i);
    constexpr bool rows = std::is_same_v<Layout, row_major>;
    to.x[i] = rows ? from[row * pitch + column] : from[column * pitch + row];
  }
}

inline void store_matrix_sync(float* to, const Sum& from, unsigned pitch, layout_t layout,
                              std::source_location line = std::source_location::current()) {
  agree({to, pitch, layout}, pitch * sizeof(float), {"store_matrix_sync", line});
  for (int i = 0; i < from.num_elements; ++i) {
    const auto [row, column] = element<accumulator>(simt::self.thread % simt::kWarpSize, i);
    to[layout == mem_row_major ? row * pitch + column : column * pitch + row] = from.x[i];
  }
}

template <class Role, class T, class Layout>
void fill_fragment(fragment<Role, kSide, kSide, kSide, T, Layout>& to, T value) {
  for (T& x : to.x) {
    x = value;
  }
}

// to = left · right + plus, in float, position after position. The last lane to come does it all.
template <class T, class LeftLayout, class RightLayout>
SIMT_UNSEEN void mma_sync(Sum& to, const Left<T, LeftLayout>& left,
                          const Right<T, RightLayout>& right, const Sum& plus,
                          std::source_location line = std::source_location::current()) {
  struct Operands {
    Sum* to;
    const Left<T, LeftLayout>* left;
    const Right<T, RightLayout>* right;
    const Sum* plus;
  } operands{&to, &left, &right, &plus};
  simt::meet_lanes({"mma_sync", line}, &operands, [](void** lanes) SIMT_UNSEEN {
    float l[kSide][kSide], r[kSide][kSide], sum[kSide][kSide];
    for (int at = 0; at < kSide * kSide; ++at) {
      const int lane = at / Sum::num_elements, i = at % Sum::num_elements;
      const auto* mine = static_cast<const Operands*>(lanes[lane]);
      const T left_value = mine->left->x[i], right_value = mine->right->x[i];
      const Element a = element<matrix_a>(lane, i), b = element<matrix_b>(lane, i);
      const Element c = element<accumulator>(lane, i);
      l[a.row][a.column] = static_cast<float>(left_value);
      r[b.row][b.column] = static_cast<float>(right_value);
      sum[c.row][c.column] = mine->plus->x[i];
    }
    for (int row = 0; row < kSide; ++row) {
      for (int column = 0; column < kSide; ++column) {
        for (int k = 0; k < kSide; ++k) {
          sum[row][column] += l[row][k] * r[k][column];
        }
      }
    }
    for (int at = 0; at < kSide * kSide; ++at) {
      const int lane = at / Sum::num_elements, i = at % Sum::num_elements;
      const Element c = element<accumulator>(lane, i);
      static_cast<const Operands*>(lanes[lane])->to->x[i] = sum[c.row][c.column];
    }
  });
}

}  // namespace nvcuda::wmma
