// A bias added to the rows of a matrix. One element a thread: bound by memory.
#include "gpu/common.cuh"

// x, y of `elements`, rows of `width`; bias [width]. y may be x.
extern "C" __global__ void add_bias(const float* x, const float* bias, float* y, unsigned elements, unsigned width) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at < elements) y[at] = x[at] + bias[at % width];
}
