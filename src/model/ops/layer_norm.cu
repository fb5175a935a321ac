// Layer normalisation of the rows of a matrix; layer_norm.rs has the formulas and calls these.
//
// A warp takes a row: it reads it three times, of which two come from the first-level cache (a block's eight rows are 24 KiB at
// 768 columns). Moments by two passes, so that a large mean costs no digits.
#include "gpu/common.cuh"

struct RowMoments {
  float mean, scale;
};

// Mean and reciprocal standard deviation of one row, in every thread of the warp.
__device__ __forceinline__ RowMoments row_moments(const float* x, unsigned width, float eps, unsigned lane) {
  float sum = 0.0f;
  for (unsigned i = lane; i < width; i += WARP_SIZE) sum += x[i];
  const float mean = warp_sum(sum) / width;
  float squares = 0.0f;
  for (unsigned i = lane; i < width; i += WARP_SIZE) squares += (x[i] - mean) * (x[i] - mean);
  return {mean, rsqrtf(warp_sum(squares) / width + eps)};
}

// x, y [rows, width]; gamma, beta [width].
extern "C" __global__ void layer_norm_forward(const float* x, const float* gamma, const float* beta, float* y, unsigned rows,
                                              unsigned width, float eps) {
  const unsigned lane = threadIdx.x % WARP_SIZE;
  const unsigned row = blockIdx.x * (blockDim.x / WARP_SIZE) + threadIdx.x / WARP_SIZE;
  if (row >= rows) return;
  x += static_cast<size_t>(row) * width;
  y += static_cast<size_t>(row) * width;
  const RowMoments moments = row_moments(x, width, eps, lane);
  for (unsigned i = lane; i < width; i += WARP_SIZE) y[i] = (x[i] - moments.mean) * moments.scale * gamma[i] + beta[i];
}

// x, grad, dx [rows, width]; gamma [width]; moments [rows, 2]: mean and scale of each row, for layer_norm_parameters.
extern "C" __global__ void layer_norm_backward(const float* x, const float* gamma, const float* grad, float* dx, float* moments,
                                               unsigned rows, unsigned width, float eps) {
  const unsigned lane = threadIdx.x % WARP_SIZE;
  const unsigned row = blockIdx.x * (blockDim.x / WARP_SIZE) + threadIdx.x / WARP_SIZE;
  if (row >= rows) return;
  x += static_cast<size_t>(row) * width;
  grad += static_cast<size_t>(row) * width;
  dx += static_cast<size_t>(row) * width;
  const auto [mean, scale] = row_moments(x, width, eps, lane);
  float sum_h = 0.0f, sum_hn = 0.0f;
  for (unsigned i = lane; i < width; i += WARP_SIZE) {
    const float h = grad[i] * gamma[i];
    sum_h += h;
    sum_hn += h * ((x[i] - mean) * scale);
  }
  const float mean_h = warp_sum(sum_h) / width, mean_hn = warp_sum(sum_hn) / width;
  for (unsigned i = lane; i < width; i += WARP_SIZE) {
    const float n = (x[i] - mean) * scale;
    dx[i] = scale * (grad[i] * gamma[i] - mean_h - n * mean_hn);
  }
  if (lane == 0) {
    moments[2 * static_cast<size_t>(row)] = mean;
    moments[2 * static_cast<size_t>(row) + 1] = scale;
  }
}

// Sums over parts of the rows: partial [parts, 2 * width], of each part the shares of gamma's gradient, then of beta's.
// x, grad [rows, width]; moments [rows, 2]. A block takes a tile of columns (column_tile) of one part.
extern "C" __global__ void layer_norm_parameters(const float* x, const float* grad, const float* moments, float* partial,
                                                 unsigned rows, unsigned width, unsigned rows_per_part) {
  const ColumnTile tile = column_tile(rows, width, rows_per_part);
  float dgamma = 0.0f, dbeta = 0.0f;
  if (tile.column < width) {
    for (unsigned row = tile.first_row; row < tile.end_row; row += TILE_ROWS) {
      const size_t at = static_cast<size_t>(row) * width + tile.column;
      const float mean = moments[2 * static_cast<size_t>(row)], scale = moments[2 * static_cast<size_t>(row) + 1];
      dgamma += grad[at] * ((x[at] - mean) * scale);
      dbeta += grad[at];
    }
  }
  write_part(tile, width, {dgamma, dbeta}, partial);
}
