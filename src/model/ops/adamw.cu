// AdamW and sums of squares over many tensors at once; adamw.rs has the formulas, gpu/adamw.rs calls these. A network has a
// hundred small tensors: one kernel each would take longer to start than to run.
#include "gpu/common.cuh"

// Of one tensor; more cost small tensors a block that is mostly idle. ELEMENTS_PER_BLOCK in gpu/adamw.rs.
constexpr unsigned ELEMENTS_PER_BLOCK = 4096;

// A tensor as the kernels find it in a table: its blocks are [first_block, the next row's first_block).
struct Squared {
  const float* values;
  size_t elements, first_block;
};

struct Moved {
  float* parameter;
  const float* gradient;
  float *first, *second;
  size_t elements, first_block;
  // What the parameter is multiplied by, for its decay; then nothing, so that rows are whole words.
  float keep, nothing;
};

// The row whose blocks hold this one: the last with first_block <= blockIdx.x.
template <class Row>
__device__ __forceinline__ const Row& row_of_block(const Row* rows, unsigned count) {
  unsigned low = 0, high = count;
  while (high - low > 1) {
    const unsigned middle = (low + high) / 2;
    if (rows[middle].first_block <= blockIdx.x)
      low = middle;
    else
      high = middle;
  }
  return rows[low];
}

// partial [blocks]: the sum of each block's squares.
extern "C" __global__ void squares_of_blocks(const Squared* rows, unsigned count, float* partial) {
  const Squared& row = row_of_block(rows, count);
  const size_t start = (blockIdx.x - row.first_block) * ELEMENTS_PER_BLOCK;
  float sum = 0.0f;
  for (unsigned i = threadIdx.x; i < ELEMENTS_PER_BLOCK; i += blockDim.x)
    if (start + i < row.elements) sum += row.values[start + i] * row.values[start + i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// sums [count]: a block adds up one tensor's shares of partial [blocks].
extern "C" __global__ void squares_of_tensors(const Squared* rows, unsigned count, const float* partial, unsigned blocks, float* sums) {
  const size_t end = blockIdx.x + 1 < count ? rows[blockIdx.x + 1].first_block : blocks;
  float sum = 0.0f;
  for (size_t i = rows[blockIdx.x].first_block + threadIdx.x; i < end; i += blockDim.x) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

extern "C" __global__ void adamw(const Moved* rows, unsigned count, float scale, float beta1, float beta2, float rate,
                                 float root_correction, float epsilon) {
  const Moved& row = row_of_block(rows, count);
  const size_t start = (blockIdx.x - row.first_block) * ELEMENTS_PER_BLOCK;
  for (unsigned i = threadIdx.x; i < ELEMENTS_PER_BLOCK; i += blockDim.x) {
    const size_t at = start + i;
    if (at >= row.elements) return;
    const float g = row.gradient[at] * scale;
    const float m = beta1 * row.first[at] + (1.0f - beta1) * g;
    const float v = beta2 * row.second[at] + (1.0f - beta2) * (g * g);
    row.first[at] = m;
    row.second[at] = v;
    row.parameter[at] = row.keep * row.parameter[at] - rate * m / (sqrtf(v) / root_correction + epsilon);
  }
}
