"""Bugs that somebody could write into the kernels: what mutate.py plants, one at a time.

THE place to add one: a name, a file under csrc/, text that occurs there once, what takes its place,
and the run (of test_simt.py) that should notice.
"""

from __future__ import annotations

from tests.hardware.simt.mutant import Run, planted_in

TABLES = Run("tables")
VAST = Run("vast", "address")
IMPORTANCE = Run("multi_tensor", only="Importance")
ADD = Run("multi_tensor", only="AddGradient")
PROXIMAL = Run("multi_tensor", only="Proximal")
CODES = Run("compressed", only="AddGradient")
CODES_PENALTY = Run("compressed", only="Penalty")
SGD = Run("steps", only="Step<Sgd, false>")
MOMENTUM = Run("steps", only="Step<Momentum, false>")
ADAM = Run("steps", only="Step<Adam, false>")
PROXIMAL_ADAM = Run("steps", only="Step<Adam, true>")
LIST_RACES = Run("multi_tensor", "thread", "Penalty")
SUM_RACES = Run("tables", "thread")
MATMUL = Run("abs_matmul", only="float")
TENSOR_CORES = Run("abs_matmul", only="BFloat16")
MATMUL_RACES = Run("abs_matmul", "thread", "float")
FRAGMENT_RACES = Run("abs_matmul", "thread", "BFloat16")


MUTANTS = [
    *planted_in(
        "cuda/table.cuh",
        ("chunks rounded down", "(numel + kChunk - 1) / kChunk", "numel / kChunk", TABLES),
        (
            "first chunk off by one",
            "table.first_chunk[table.tensors++] = static_cast<int>(chunks);",
            "table.first_chunk[table.tensors++] = static_cast<int>(chunks) + 1;",
            TABLES,
        ),
        (
            "numel of the tensor before",
            "table.numel[table.tensors] = entry.numel;",
            "table.numel[table.tensors] = entries[next > 0 ? next - 1 : 0].numel;",
            TABLES,
        ),
        ("one pointer for all streams", "= entry.data[s];", "= entry.data[0];", TABLES),
        ("dtypes mixed", "entry.dtype != kind.dtype || ", "", TABLES),
        (
            "omegas of other dtypes among them",
            " || entry.omega_dtype != kind.omega_dtype",
            "",
            TABLES,
        ),
        (
            "scales of the tensor before",
            "table.scales[table.tensors] = entry.omega_scales;",
            "table.scales[table.tensors] = entries[next > 0 ? next - 1 : 0].omega_scales;",
            TABLES,
        ),
        ("a block more than a grid has", "> INT_MAX) {", "> INT_MAX + int64_t{1}) {", TABLES),
        (
            "a tensor more than a table holds",
            "table.tensors < table.kCapacity",
            "table.tensors <= table.kCapacity",
            TABLES.sanitized(),
        ),
        (
            "a place of its own, not in the lists",
            "static_cast<int>(entry.index);",
            "table.tensors;",
            TABLES,
        ),
        (
            "the tensor before the chunk's",
            "table.first_chunk[middle] <= chunk",
            "table.first_chunk[middle] < chunk",
            TABLES,
        ),
    ),
    *planted_in(
        "cuda/multi_tensor.cuh",
        (
            "32-bit offset, in elements",
            "static_cast<int64_t>(chunk - table.first_chunk[tensor]) * kChunk",
            "static_cast<int>((chunk - table.first_chunk[tensor]) * unsigned{kChunk})",
            VAST,
        ),
        ("32-bit offset, in bytes", "begin * width(s)", "static_cast<int>(begin * width(s))", VAST),
        (
            "chunk counted from the table's first tensor",
            "static_cast<int64_t>(chunk - table.first_chunk[tensor])",
            "static_cast<int64_t>(chunk)",
            ADD.sanitized(),
        ),
        (
            "every chunk is whole",
            "static_cast<int>(left < kChunk ? left : kChunk)",
            "static_cast<int>(left < 0 ? left : kChunk)",
            ADD.sanitized(),
        ),
        (
            "omega as wide as values",
            "static_cast<int>(stream == Op::kOmega ? sizeof(Kept) : sizeof(T))",
            "static_cast<int>(stream == Op::kOmega ? sizeof(T) : sizeof(T))",
            ADD.sanitized(),
        ),
        (
            "omega as wide as it is computed",
            "static_cast<int>(stream == Op::kOmega ? sizeof(Kept) : sizeof(T))",
            "static_cast<int>(stream == Op::kOmega ? sizeof(A) : sizeof(T))",
            CODES.sanitized(),
        ),
        (
            "codes at any alignment",
            "stream == Op::kOmega ? alignof(Pack<Kept, kVector>) : kVectorBytes",
            "stream == Op::kOmega ? 1 : kVectorBytes",
            CODES.sanitized(),
        ),
        (
            "scales of the tensor's first blocks",
            "table.scales[tensor] + begin / kScaleBlock",
            "table.scales[tensor]",
            CODES.sanitized(),
        ),
        (
            "scales of another chunk",
            "begin / kScaleBlock",
            "begin / (2 * kScaleBlock)",
            CODES.sanitized(),
        ),
        (
            "32-bit offset of scales",
            "+ begin / kScaleBlock",
            "+ static_cast<int>(begin) / kScaleBlock",
            VAST,
        ),
        (
            "head counted twice",
            "walk<kVector>(op, head, tail)",
            "walk<kVector>(op, 0, tail)",
            ADD.sanitized(),
        ),
        ("head dropped", "return walk<1>(op, 0, head) + ", "return ", ADD),
        ("tail dropped", " + walk<1>(op, tail, size_);", ";", ADD),
        (
            "alignment of the first stream alone",
            "aligned &= (reinterpret_cast",
            "aligned &= s > 0 || (reinterpret_cast",
            ADD.sanitized(),
        ),
        (
            "head longer than the chunk",
            "bool aligned = head <= size_;",
            "bool aligned = true;",
            ADD.sanitized(),
        ),
        (
            "second load without a bound",
            "if (first + u * kStride < end) {\n          elements[u].load",
            "{\n          elements[u].load",
            ADD.sanitized(),
        ),
        (
            "second load's bound one too far",
            "if (first + u * kStride < end) {\n          elements[u].load",
            "if (first + u * kStride <= end) {\n          elements[u].load",
            ADD.sanitized(),
        ),
        (
            "second store without a bound",
            "if (first + u * kStride < end) {\n          sum += elements[u].compute(op);\n",
            "{\n          sum += elements[u].compute(op);\n",
            ADD.sanitized(),
        ),
        (
            "rounds overlap",
            "first += kUnroll * kStride) {",
            "first += kStride) {",
            ADD,
        ),
        (
            "threads overlap",
            "constexpr int kStride = kThreads * N;",
            "constexpr int kStride = kThreads / 2 * N;",
            ADD,
        ),
        (
            "stored before computed",
            "sum += elements[u].compute(op);\n"
            "          elements[u].store(streams_, first + u * kStride);",
            "elements[u].store(streams_, first + u * kStride);\n"
            "          sum += elements[u].compute(op);",
            ADD,
        ),
        (
            "a place in the table, not in the lists",
            "op.begin_tensor(table.place[tensor]);",
            "op.begin_tensor(tensor);",
            ADAM,
        ),
        ("no begin_tensor", "op.begin_tensor(table.place[tensor]);", "", ADAM),
        ("a skipped call is not", "if (op.skipped) {", "if (false) {", MOMENTUM),
        (
            "all blocks in one partial sum",
            "partial_sums[blockIdx.x] = total;",
            "partial_sums[0] = total;",
            ADD.sanitized(),
        ),
        (
            "every thread writes the sum",
            "if (threadIdx.x == 0) {\n      partial_sums",
            "{\n      partial_sums",
            LIST_RACES,
        ),
    ),
    *planted_in(
        "cuda/pack.cuh",
        ("first of a pair clears the second", "(word & 0xffff0000u) | bits", "bits", ADD),
        ("pairs swapped", ">> (16 * (i % 2))", ">> (16 - 16 * (i % 2))", ADD),
        ("codes of a word turned round", ">> (8 * (i % 4))", ">> (24 - 8 * (i % 4))", CODES),
        ("the first word's codes twice", "words_[i / 4]", "words_[0]", CODES),
    ),
    *planted_in(
        "cuda/omega.cuh",
        (
            "scale of the block before",
            "scales[first / kBlock]",
            "scales[(first > kBlock ? first - kBlock : first) / kBlock]",
            CODES,
        ),
        ("blocks twice as long", "kBlock = kScaleBlock;", "kBlock = 2 * kScaleBlock;", CODES),
        ("one scale a vector", "(first + N - 1) / kBlock", "first / kBlock", CODES),
        (
            "scale behind the vector",
            "(first + N - 1) / kBlock",
            "(first + N) / kBlock",
            CODES.sanitized(),
        ),
        ("an element more of the block", "i < left_", "i <= left_", CODES),
        ("an element less of the block", "i < left_", "i + 1 < left_", CODES),
        ("scales swapped", "? of_first_ : of_last_", "? of_last_ : of_first_", CODES),
        (
            "as if vectors began with blocks",
            "kBlock - first % kBlock",
            "kBlock - first / N * N % kBlock",
            CODES,
        ),
        (
            "codes of the chunk's beginning",
            "static_cast<const uint8_t*>(codes) + first)",
            "static_cast<const uint8_t*>(codes) + first % kBlock)",
            CODES_PENALTY,
        ),
    ),
    *planted_in(
        "formulas.h",
        ("no magnitude", "return scale * magnitude(grad);", "return scale * grad;", IMPORTANCE),
        (
            "scale applied twice",
            "return scale * magnitude(grad);",
            "return scale * scale * magnitude(grad);",
            IMPORTANCE,
        ),
        ("sign", "param - delta * (c", "param + delta * (c", PROXIMAL),
        ("not a square", "return omega * delta * delta;", "return omega * delta;", ADD),
        ("codes not companded", "root * root * (", "255 * root * (", CODES),
        ("codes up to 256", "65025.0f", "65536.0f", CODES),
        (
            "infinite strength",
            "scalar > static_cast<double>(largest) ? largest : static_cast<A>(scalar)",
            "scalar < 0 ? largest : static_cast<A>(scalar)",
            ADD,
        ),
        (
            "infinity over infinity",
            "product > largest ? largest : product",
            "product < 0 ? largest : product",
            PROXIMAL,
        ),
        (
            "pulled from where the step began",
            "proximal_point(moved, moved - anchor,",
            "proximal_point(moved, param - anchor,",
            PROXIMAL_ADAM,
        ),
        ("no importance, no bits kept", "omega == A(0) ? param : moved", "moved", PROXIMAL),
    ),
    *planted_in(
        "cuda/operations.cuh",
        (
            "strength squared",
            "lambda.load() * lr.load()",
            "lambda.load() * lr.load() * lambda.load()",
            PROXIMAL,
        ),
        ("no gradient scale", "lambda.load() * grad_scale.load()", "lambda.load()", ADD),
        ("replaces where it should add", "Add ? element[0] + gradient : gradient", "gradient", ADD),
        ("adds to what is not read", "Add ? 0b1111 : 0b1110", "Add ? 0b1110 : 0b1110", ADD),
        (
            "energy of the old parameter",
            "penalty_energy(element[0] - anchor, omega)",
            "penalty_energy(param - anchor, omega)",
            PROXIMAL,
        ),
        (
            "energy before rounding",
            "const T moved = static_cast<T>(",
            "const A moved = static_cast<A>(",
            PROXIMAL,
        ),
    ),
    *planted_in(
        "cuda/steps.cuh",
        ("found_inf ignored", "read.found_inf != 0.0", "false", ADAM),
        ("the gradient for the anchor in a skipped step", "kOmega - 1;", "kOmega - 2;", ADAM),
        (
            "second moment not written",
            "(1u << (kMoments + 1)) - 1",
            "(1u << (kMoments > 1 ? kMoments : kMoments + 1)) - 1",
            ADAM,
        ),
        (
            "the gradient for the anchor",
            "element[kMoments + 2]",
            "element[kMoments + 1]",
            SGD,
        ),
        (
            "energy before a proximal step",
            "(Proximal ? element[0] : param) - anchor",
            "param - anchor",
            PROXIMAL_ADAM,
        ),
        (
            "energy after a gradient step",
            "(Proximal ? element[0] : param) - anchor",
            "element[0] - anchor",
            MOMENTUM,
        ),
        ("a correction too many", "if (i < count) {", "if (i <= count) {", ADAM.sanitized()),
    ),
    *planted_in(
        "steps.h",
        ("corrections swapped", "lr * correction.first", "lr * correction.second_root", ADAM),
        (
            "the step before's correction",
            "pow(options.beta1, steps + 1.0)",
            "pow(options.beta1, steps)",
            ADAM,
        ),
        ("descends where it should ascend", "maximize ? -factor : factor", "factor", SGD),
        (
            "no rate in a proximal strength",
            "proximal ? s.lambda * s.lr : s.lambda",
            "s.lambda",
            PROXIMAL_ADAM,
        ),
        ("no dampening", "1.0 - options.dampening", "1.0", MOMENTUM),
        (
            "decay in the gradient as well",
            "options.decoupled ? 0.0 : options.weight_decay",
            "options.weight_decay",
            ADAM,
        ),
    ),
    *planted_in(
        "cuda/scalar.cuh",
        ("strength of another width", "return is_double ? *", "return !is_double ? *", TABLES),
    ),
    *planted_in(
        "cuda/reduce.cuh",
        ("no barrier before the warps' sums", "  __syncthreads();\n", "", SUM_RACES),
        ("half of a warp", "offset = kWarp / 2;", "offset = kWarp / 4;", TABLES),
        ("mask of half a warp", "0xffffffffu", "0xffffu", TABLES),
        ("last warp forgotten", "w < kWarps;", "w < kWarps - 1;", TABLES),
        (
            "warps' sums in float",
            "__shared__ double warp_sums",
            "__shared__ float warp_sums",
            TABLES,
        ),
        (
            "barrier for one warp",
            "  __syncthreads();\n",
            "  if (warp == 0) __syncthreads();\n",
            TABLES,
        ),
        ("without the half", "0.5 * lambda.load()", "lambda.load()", TABLES),
        ("first sum forgotten", "int64_t i = threadIdx.x;", "int64_t i = threadIdx.x + 1;", TABLES),
        (
            "a sum too many",
            "i < count; i += kThreads",
            "i <= count; i += kThreads",
            TABLES.sanitized(),
        ),
    ),
    *planted_in(
        "abs_matmul.h",
        (
            "samples summed with their sign",
            "call.absolute = true;",
            "call.absolute = false;",
            MATMUL,
        ),
        (
            "turned, but for the factors",
            "std::swap(call.left, call.right);",
            "",
            MATMUL.sanitized(),
        ),
    ),
    *planted_in(
        "cuda/stage.cuh",
        ("right where left is", "offset(call.right);", "offset(call.left);", MATMUL),
        (
            "32-bit offset of a sample",
            "sample * factor.sample_stride + position",
            "static_cast<int>(sample * factor.sample_stride) + position",
            VAST,
        ),
        (
            "32-bit offset of a row",
            "offsets[slot] + (first_row + row) * factor.row_stride",
            "offsets[slot] + static_cast<int>((first_row + row) * factor.row_stride)",
            VAST,
        ),
        (
            "row stride left out",
            "(first_row + row) * factor.row_stride]",
            "first_row + row]",
            MATMUL,
        ),
        (
            "positions of the next sample",
            "sample < call.samples && position < call.positions",
            "sample < call.samples",
            TENSOR_CORES.sanitized(),
        ),
        (
            "slots beyond a sample stay as they were",
            "tile[slot][row] = absolute ? magnitude(value) : value;",
            "if (offsets[slot] != kNone) tile[slot][row] = absolute ? magnitude(value) : value;",
            TENSOR_CORES,
        ),
        (
            "vectors of unaligned memory",
            "reinterpret_cast<uintptr_t>(factor.data) % kVectorBytes == 0 &&",
            "",
            MATMUL.sanitized(),
        ),
        (
            "vectors of unaligned positions",
            "(factor.sample_stride | factor.position_stride | rows)",
            "(factor.sample_stride | rows)",
            MATMUL.sanitized(),
        ),
        (
            "vectors of unaligned samples",
            "(factor.sample_stride | factor.position_stride | rows)",
            "(factor.position_stride | rows)",
            MATMUL.sanitized(),
        ),
        (
            "vectors across the last row",
            "(factor.sample_stride | factor.position_stride | rows)",
            "(factor.sample_stride | factor.position_stride)",
            MATMUL.sanitized(),
        ),
        (
            "magnitude of every second value",
            "for (int v = 0; v < kVector; ++v) {",
            "for (int v = 0; v < kVector; v += 2) {",
            MATMUL,
        ),
    ),
    *planted_in(
        "cuda/abs_matmul.cuh",
        (
            "no barrier after staging, of fragments",
            "    __syncthreads();\n#pragma unroll 1",
            "#pragma unroll 1",
            FRAGMENT_RACES,
        ),
        (
            "no barrier before staging",
            "__syncthreads();  // also: every thread is done with the slots before",
            "",
            MATMUL_RACES,
        ),
        (
            "no barrier after staging",
            "    __syncthreads();\n#pragma unroll 1",
            "#pragma unroll 1",
            MATMUL_RACES,
        ),
        (
            "no barrier before the sums",
            "__syncthreads();  // the sums take the stage's place",
            "",
            MATMUL_RACES,
        ),
        (
            "no barrier after the sums",
            "tile.store(shared.sums);\n  __syncthreads();",
            "tile.store(shared.sums);",
            MATMUL_RACES,
        ),
        (
            "samples share a multiplication",
            "(call.positions + kStep - 1) / kStep * kStep",
            "call.positions",
            TENSOR_CORES,
        ),
        ("a sample never ends twice", "        multiplied = 0;\n", "", MATMUL),
        (
            "the rest of a part is lost",
            "if (multiplied > 0) {",
            "if (false) {",
            MATMUL,
        ),
        (
            "parts cut within a sample",
            "call.absolute ? step : per_sample;",
            "true ? step : per_sample;",
            MATMUL,
        ),
        ("parts rounded down", "(all / unit + parts - 1) / parts", "(all / unit) / parts", MATMUL),
        ("slots of the next part", "first + slot < slots.last;", "true;", MATMUL),
        (
            "all parts in one place",
            "(part * call.rows + row)",
            "(0 * call.rows + row)",
            MATMUL.sanitized(),
        ),
        (
            "every part adds to omega",
            "if (parts.count == 1) {",
            "if (parts.count >= 1) {",
            MATMUL.sanitized(),
        ),
        ("a part too few", "part < parts.count; ++part", "part < parts.count - 1; ++part", MATMUL),
        ("an element too many", "if (i < size) {", "if (i <= size) {", MATMUL.sanitized()),
        ("row guard one too far", "row < call.rows &&", "row <= call.rows &&", MATMUL.sanitized()),
        (
            "column guard one too far",
            "column < call.columns)",
            "column <= call.columns)",
            MATMUL.sanitized(),
        ),
        (
            "columns of another tile",
            "at / tiles_of(call.columns) * kTile",
            "at / tiles_of(call.rows) * kTile",
            MATMUL,
        ),
    ),
    *planted_in(
        "cuda/fma_tile.cuh",
        ("product not reset", "product_[r][c] = A(0);", "", MATMUL),
        ("sum of products with their sign", "+= magnitude(product_", "+= (product_", MATMUL),
    ),
    *planted_in(
        "cuda/tensor_core_tile.cuh",
        (
            "fragment not reset",
            "        }\n        wmma::fill_fragment(product_[r][c], 0.0f);",
            "        }",
            TENSOR_CORES,
        ),
        ("fragment with its sign", "+= magnitude(product_", "+= (product_", TENSOR_CORES),
        (
            "left not transposed",
            "Element, wmma::col_major>",
            "Element, wmma::row_major>",
            TENSOR_CORES,
        ),
        (
            "two warps, one quarter",
            "/ 32 / kAcross * kWarpTile",
            "/ 32 % kAcross * kWarpTile",
            TENSOR_CORES,
        ),
    ),
]
