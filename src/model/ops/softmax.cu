// Softmax of a matrix's scaled rows; softmax.rs has the formulas and calls these. A warp takes a row.
#include "gpu/common.cuh"

// scores, probabilities [rows, width]: softmax(scale * scores).
extern "C" __global__ void softmax_forward(const float* scores, float* probabilities, unsigned rows, unsigned width, float scale) {
  const unsigned lane = threadIdx.x % WARP_SIZE;
  const unsigned row = blockIdx.x * (blockDim.x / WARP_SIZE) + threadIdx.x / WARP_SIZE;
  if (row >= rows) return;
  scores += static_cast<size_t>(row) * width;
  probabilities += static_cast<size_t>(row) * width;
  float largest = -INFINITY;
  for (unsigned i = lane; i < width; i += WARP_SIZE) largest = fmaxf(largest, scores[i]);
  largest = warp_max(largest);
  float sum = 0.0f;
  for (unsigned i = lane; i < width; i += WARP_SIZE) {
    const float weight = expf(scale * (scores[i] - largest));
    probabilities[i] = weight;
    sum += weight;
  }
  const float share = 1.0f / warp_sum(sum);
  for (unsigned i = lane; i < width; i += WARP_SIZE) probabilities[i] *= share;
}

// dscores = scale * p * (grad - sum(grad * p)).
extern "C" __global__ void softmax_backward(const float* probabilities, const float* grad, float* dscores, unsigned rows,
                                            unsigned width, float scale) {
  const unsigned lane = threadIdx.x % WARP_SIZE;
  const unsigned row = blockIdx.x * (blockDim.x / WARP_SIZE) + threadIdx.x / WARP_SIZE;
  if (row >= rows) return;
  const size_t start = static_cast<size_t>(row) * width;
  float sum = 0.0f;
  for (unsigned i = lane; i < width; i += WARP_SIZE) sum += grad[start + i] * probabilities[start + i];
  const float mean = warp_sum(sum);
  for (unsigned i = lane; i < width; i += WARP_SIZE)
    dscores[start + i] = scale * probabilities[start + i] * (grad[start + i] - mean);
}
