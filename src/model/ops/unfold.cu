// The patches of channels-last images under a sliding window, and the way back; unfold.rs has the layout, gpu/unfold.rs calls
// these. One element a thread; neighbours in a warp are neighbouring channels, so that reads and writes are contiguous runs.
#include "gpu/common.cuh"

// x [batch, height, width, channels] -> patches [batch * out_height * out_width, kernel * kernel * channels]; 0 where the window
// leaves the image. `elements` of the patches.
extern "C" __global__ void unfold_forward(const float* x, float* patches, unsigned elements, unsigned height, unsigned width,
                                          unsigned channels, unsigned kernel, unsigned stride, unsigned padding,
                                          unsigned out_height, unsigned out_width) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= elements) return;
  const unsigned channel = at % channels, place = at / channels % (kernel * kernel);
  const unsigned position = at / channels / (kernel * kernel);
  const unsigned image = position / (out_height * out_width);
  // Below 0 these are very large, and so outside too.
  const unsigned row = position / out_width % out_height * stride + place / kernel - padding;
  const unsigned column = position % out_width * stride + place % kernel - padding;
  const bool inside = row < height && column < width;
  patches[at] = inside ? x[((static_cast<size_t>(image) * height + row) * width + column) * channels + channel] : 0.0f;
}

// The gradient of x from that of the patches: each pixel adds up, in the window's order, what it gave to the patches that hold it.
// `elements` of x.
extern "C" __global__ void unfold_backward(const float* grad, float* dx, unsigned elements, unsigned height, unsigned width,
                                           unsigned channels, unsigned kernel, unsigned stride, unsigned padding,
                                           unsigned out_height, unsigned out_width) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= elements) return;
  const unsigned channel = at % channels, column = at / channels % width;
  const unsigned row = at / channels / width % height, image = at / channels / width / height;
  float sum = 0.0f;
  for (unsigned i = 0; i < kernel; i++) {
    // The output's row whose window's row i lies on this one, if there is one.
    const unsigned top = row + padding - i;
    if (row + padding < i || top % stride != 0 || top / stride >= out_height) continue;
    for (unsigned j = 0; j < kernel; j++) {
      const unsigned left = column + padding - j;
      if (column + padding < j || left % stride != 0 || left / stride >= out_width) continue;
      const size_t position = (static_cast<size_t>(image) * out_height + top / stride) * out_width + left / stride;
      sum += grad[((position * kernel + i) * kernel + j) * channels + channel];
    }
  }
  dx[at] = sum;
}
