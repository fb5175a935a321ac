// Batch normalisation of a matrix's columns, with ReLU perhaps; batch_norm.rs has the formulas, gpu/batch_norm.rs calls these.
#include "gpu/common.cuh"

// A channel's map x -> (x - mean) * scale * gamma + beta.
struct Channel {
  float mean, scale;
};

__device__ __forceinline__ Channel channel_of(const float* mean, const float* variance, unsigned column, float eps) {
  return {mean[column], rsqrtf(variance[column] + eps)};
}

// partial [parts, width]: sums over parts of the rows of (x - mean)^2. x [rows, width], mean [width].
extern "C" __global__ void batch_norm_squares(const float* x, const float* mean, float* partial, unsigned rows, unsigned width,
                                              unsigned rows_per_part) {
  const ColumnTile tile = column_tile(rows, width, rows_per_part);
  float sum = 0.0f;
  if (tile.column < width) {
    for (unsigned row = tile.first_row; row < tile.end_row; row += TILE_ROWS) {
      const float distance = x[static_cast<size_t>(row) * width + tile.column] - mean[tile.column];
      sum += distance * distance;
    }
  }
  write_part(tile, width, {sum}, partial);
}

// x, y of `elements`, rows of `width`; the others [width]. Results at or below `floor` become it; NaN passes.
extern "C" __global__ void batch_norm_forward(const float* x, const float* mean, const float* variance, const float* gamma,
                                              const float* beta, float* y, unsigned elements, unsigned width, float eps,
                                              float floor) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= elements) return;
  const unsigned column = at % width;
  const Channel channel = channel_of(mean, variance, column, eps);
  const float value = (x[at] - channel.mean) * channel.scale * gamma[column] + beta[column];
  y[at] = value <= floor ? floor : value;
}

// Sums over parts of the rows: partial [parts, 2 * width], of each part the shares of gamma's gradient, then of beta's. No gradient
// comes from where y was cut.
extern "C" __global__ void batch_norm_parameters(const float* x, const float* y, const float* grad, const float* mean,
                                                 const float* variance, float* partial, unsigned rows, unsigned width,
                                                 unsigned rows_per_part, float eps, float floor) {
  const ColumnTile tile = column_tile(rows, width, rows_per_part);
  float dgamma = 0.0f, dbeta = 0.0f;
  if (tile.column < width) {
    const Channel channel = channel_of(mean, variance, tile.column, eps);
    for (unsigned row = tile.first_row; row < tile.end_row; row += TILE_ROWS) {
      const size_t at = static_cast<size_t>(row) * width + tile.column;
      const float g = y[at] <= floor ? 0.0f : grad[at];
      dgamma += g * ((x[at] - channel.mean) * channel.scale);
      dbeta += g;
    }
  }
  write_part(tile, width, {dgamma, dbeta}, partial);
}

// dx = scale * gamma * (g - share * dbeta - n * share * dgamma), n being normalised x; `share` is 1 / rows where the moments are
// the batch's, 0 where they are constants. parameters [2, width]: the sums over all rows, of gamma, then of beta.
extern "C" __global__ void batch_norm_backward(const float* x, const float* y, const float* grad, const float* mean,
                                               const float* variance, const float* gamma, const float* parameters, float* dx,
                                               unsigned elements, unsigned width, float eps, float floor, float share) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= elements) return;
  const unsigned column = at % width;
  const Channel channel = channel_of(mean, variance, column, eps);
  const float g = y[at] <= floor ? 0.0f : grad[at];
  const float n = (x[at] - channel.mean) * channel.scale;
  const float dgamma = parameters[column], dbeta = parameters[width + column];
  dx[at] = channel.scale * gamma[column] * (g - share * dbeta - n * (share * dgamma));
}
