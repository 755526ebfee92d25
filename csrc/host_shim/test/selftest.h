// Launchers of the shim's self-test. Each returns a cudaError_t.
#pragma once

struct CUstream_st;

namespace ff::selftest {

constexpr int kThreads = 128;
constexpr int kTile = 4 * kThreads;  // floats that a block stages at a time

const char* error_text(int code);

// row_sum[r] = sum of row r of x [rows, columns];  total += sum of x
int sum_rows(const float* x, int rows, int columns, float* row_sum, float* total, CUstream_st*);
// y [tiles, kTile] = x with each tile reversed; `blocks` blocks take tiles in turn
int reverse_tiles(const float* x, int tiles, int blocks, float* y, CUstream_st*);
// counts[b] += number of x [n] equal to b, for b < bins; counted in dynamic shared memory
int count(const int* x, int n, int bins, int* counts, CUstream_st*);
// index[r] = first column of the largest value of row r; positive[r] = number of positive values
int argmax_rows(const float* x, int rows, int columns, int* index, int* positive, CUstream_st*);
// y[i] = x[i] + x[neighbour of i in its group of 32, cyclic]
int add_neighbours(const float* x, int n, float* y, CUstream_st*);
// total = sum of x [n]: the block that finishes last adds what all have written to partial [blocks]; *ticket is 0
// before
int sum_last_block(const double* x, int n, int blocks, double* partial, int* ticket, double* total, CUstream_st*);
// *wrong += number of intrinsics that a thread saw give a wrong answer
int intrinsics(int* wrong, CUstream_st*);

}  // namespace ff::selftest
