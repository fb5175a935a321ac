// What our kernels share. They compile with nvcc for a GPU and, for tests, with any C++ compiler (emulation.h).
//
// Rule: no atomic additions of floating-point numbers. Every sum is taken in an order that shapes alone decide, so that a job
// killed on a GPU and resumed on its like ends with the same bytes.
#pragma once

#ifndef __CUDACC__
#include "emulation.h"
#endif

constexpr unsigned WARP_SIZE = 32;

// The sum over a warp's threads, in each of them.
__device__ __forceinline__ float warp_sum(float value) {
  for (int distance = WARP_SIZE / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// The largest over a warp's threads, in each of them.
__device__ __forceinline__ float warp_max(float value) {
  for (int distance = WARP_SIZE / 2; distance > 0; distance /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// The sum over a block of at most 1024 threads, in each of them. Every thread of the block must call it.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float warps[WARP_SIZE];
  const unsigned lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
  value = warp_sum(value);
  if (lane == 0) warps[warp] = value;
  __syncthreads();
  value = warp_sum(lane < blockDim.x / WARP_SIZE ? warps[lane] : 0.0f);
  // Before `warps` is written again.
  __syncthreads();
  return value;
}

// Sums over a matrix's columns: a block of 256 threads stands as 8 rows of 32 columns, walks down one part of the rows, and
// adds up its 8 rows at the end.
constexpr unsigned TILE_COLUMNS = WARP_SIZE, TILE_ROWS = 8;

struct ColumnTile {
  // This thread's column, the rows [first_row, end_row) in steps of TILE_ROWS that it adds up, and the part they belong to.
  unsigned column, first_row, end_row, part;
};

// The grid is (tiles of columns) x (parts of rows), tiles fastest.
__device__ __forceinline__ ColumnTile column_tile(unsigned rows, unsigned width, unsigned rows_per_part) {
  const unsigned tiles = (width + TILE_COLUMNS - 1) / TILE_COLUMNS;
  const unsigned part = blockIdx.x / tiles;
  const unsigned end = (part + 1) * rows_per_part;
  return {blockIdx.x % tiles * TILE_COLUMNS + threadIdx.x % TILE_COLUMNS,
          part * rows_per_part + threadIdx.x / TILE_COLUMNS, end < rows ? end : rows, part};
}

// The sum over a tile's rows, in the threads of its first row. Every thread of the block must call it.
__device__ __forceinline__ float sum_over_tile_rows(float value) {
  __shared__ float sums[TILE_ROWS][TILE_COLUMNS];
  const unsigned row = threadIdx.x / TILE_COLUMNS, column = threadIdx.x % TILE_COLUMNS;
  sums[row][column] = value;
  __syncthreads();
  float total = 0.0f;
  if (row == 0)
    for (unsigned i = 0; i < TILE_ROWS; i++) total += sums[i][column];
  // Before `sums` is written again.
  __syncthreads();
  return total;
}

// Adds up this block's share of COUNT sums for each column and writes them into sums [parts, COUNT, width]. Every thread of the
// block must call it, with what it has added up itself.
template <unsigned COUNT>
__device__ __forceinline__ void write_part(const ColumnTile& tile, unsigned width, const float (&shares)[COUNT], float* sums) {
  for (unsigned i = 0; i < COUNT; i++) {
    const float sum = sum_over_tile_rows(shares[i]);
    if (threadIdx.x < TILE_COLUMNS && tile.column < width)
      sums[(static_cast<size_t>(tile.part) * COUNT + i) * width + tile.column] = sum;
  }
}
