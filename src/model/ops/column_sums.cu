// Sums over a matrix's columns, as gradients of biases are; gpu/column_sums.rs calls it twice: over parts of the rows, then over
// the parts.
#include "gpu/common.cuh"

// x [rows, width] -> sums [parts, width], times `factor`.
extern "C" __global__ void column_sums(const float* x, float* sums, unsigned rows, unsigned width, unsigned rows_per_part,
                                       float factor) {
  const ColumnTile tile = column_tile(rows, width, rows_per_part);
  float sum = 0.0f;
  if (tile.column < width)
    for (unsigned row = tile.first_row; row < tile.end_row; row += TILE_ROWS)
      sum += x[static_cast<size_t>(row) * width + tile.column];
  write_part(tile, width, {sum * factor}, sums);
}
