// GELU of a biased matrix, `gelu(x + bias)`; gelu.rs has the formulas and calls these. One element a thread: bound by memory.
#include "gpu/common.cuh"

// Phi(x): the standard normal distribution's cumulative probability.
__device__ __forceinline__ float normal_cumulative(float x) { return 0.5f * (1.0f + erff(x * 0.70710678118654752f)); }

// x, y of `elements`, rows of `width`; bias [width].
extern "C" __global__ void bias_gelu_forward(const float* x, const float* bias, float* y, unsigned elements, unsigned width) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= elements) return;
  const float value = x[at] + bias[at % width];
  y[at] = value * normal_cumulative(value);
}

// dx = grad * (Phi(v) + v * phi(v)) at v = x + bias, with phi the density.
extern "C" __global__ void bias_gelu_backward(const float* x, const float* bias, const float* grad, float* dx, unsigned elements,
                                              unsigned width) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= elements) return;
  const float value = x[at] + bias[at % width];
  const float density = expf(-0.5f * value * value) * 0.39894228040143268f;
  dx[at] = grad[at] * (normal_cumulative(value) + value * density);
}
