// How W lies in memory when it is packed for the recurrent kernels: in the order in which the lanes of a warp hold the
// fragments of mma.m16n8k16, so that each lane takes 16 bytes at once wherever W is. Plain arithmetic: kernels, plans
// and tests call it.
//
// A group is all gates of a few hidden units: slots of 8 rows (slot = unit / 8 * gates + gate), two slots a tile of 16
// rows. So one lane's sums hold all gates of its units. K is cut into blocks of 32, and within a block it is permuted:
// the lanes of a row of fragments take 8 neighbours each, since h is read from memory as it lies, 16 bytes a lane.
//   packed[group][block of K][part][tile][step of 16][lane][4 registers][2 elements]
// For FMA it lies as floats, K not permuted; the 8 rows that a warp reads at once are 128 bytes side by side:
//   packed[group][block of K][step of 4][row][4 elements]
#pragma once
#include "rnn/kernel_cell.h"

namespace fastdl {

constexpr int kRnnBlockK = 32;      // elements along K that a lane takes at once, times 4
constexpr int kRnnColumnTiles = 4;  // of 8 sequences: a block of threads works on 32 at most
constexpr int kRnnRows = 8 * kRnnColumnTiles;
constexpr int kRnnWarps = 8;  // of a block; each takes a part of K
constexpr int kRnnThreads = 32 * kRnnWarps;

// An even number of slots: lstm i f g o of 8 units; gru r z n of 16; plain and what is not a cell, 16 rows.
constexpr int rnn_slots(int gates) { return gates % 2 ? 2 * gates : gates; }
constexpr int rnn_units(int gates) { return gates % 2 ? 16 : 8; }
constexpr int rnn_gates(int slots) { return slots == 4 ? 4 : slots / 2; }
// Floats between the columns of sums in shared memory: lanes of a warp that write fragments hit all banks.
constexpr int rnn_sum_row(int slots) { return 8 * slots + 4; }

// Of the sums of all warps in shared memory; columns: a multiple of 8.
constexpr int rnn_sum_floats(int columns, int slots) { return kRnnWarps * columns * rnn_sum_row(slots); }

// Row of the tile and element of the K block that half `e` of register r of a lane holds, in step `j` of 16.
constexpr int rnn_fragment_row(int lane, int r) { return lane / 4 + r % 2 * 8; }
constexpr int rnn_fragment_k(int lane, int j, int r, int e) { return lane % 4 * 8 + j * 4 + r / 2 * 2 + e; }

// 32-bit words of a group in a block of K; parts 0: floats.
constexpr int rnn_block_words(int slots, int parts) { return (parts ? parts : 2) * slots * 128; }
constexpr int rnn_fma_word(int slots, int row, int k) { return (k / 4 * slots * 8 + row) * 4 + k % 4; }
// Unit of the group and gate of a row of it.
constexpr int rnn_row_unit(int row, int gates) { return row / 8 / gates * 8 + row % 8; }
constexpr int rnn_row_gate(int row, int gates) { return row / 8 % gates; }

}  // namespace fastdl
