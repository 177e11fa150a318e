// The plan of the weight gradient, part of ConvPlan.
#pragma once
#include "base/types.h"

namespace fastdl {

// dw of a group is cut into boxes of taps x c_block channels x k_block output channels, and the output pixels into
// `chunks` of whole blocks: `rows` rows (of any image), w_block wide. For each block the pixels of x that its taps meet
// are packed [row][column][lines] and dy [panel][pixel][nr]; tiles sum over the block's pixels, and add to the part's
// sums [panel][tap][line][nr].
//
// Tiles take pixels 32 at a time, so those of a block follow each other without gaps, in a panel of x for each 32
// of (tap along the width, channel), made when it is used, and in panels of dy.
//
// Flat: a block is whole images, or rows of one. dy is turned once, [k][pixel], zero between the rows; x is pairs of
// pixels, [sub-image][pair][channel], padding included, so that a tap is an offset, once more for taps at odd ones.
// Sums lie [32 of k][tap][32 channels][32][32].
struct ConvWgradPlan {
  bool flat;
  i64 y_row, x_floats;  // bytes of a channel of dy, floats of one copy of a sub-image of x: of all blocks alike
  bool fold;            // a line is (tap along the width, channel): few channels; else a channel
  bool shared_rows;     // packed rows serve all taps that meet them; else each tap has its own
  bool shared_cols;     // likewise columns; else a packed column is what one output pixel meets with one tap
  i64 box[3];           // taps of a part
  i64 c_block, k_block, rows, w_block;
  i64 c_parts, k_parts, boxes[3];
  i64 segments, blocks, chunks;
  i64 span, slots, pitch;  // input rows of `rows` output rows, packed rows of a block, floats of a packed column
  i64 cols;                // packed columns of a row
  i64 band_bytes, y_bytes, stage_bytes, sum_bytes;  // a thread
  i64 chunk_bytes;                                  // sums of all chunks, 0 for one: then in sum_bytes
  i64 again_bytes;                                  // a thread: what is computed again

  i64 parts() const { return boxes[0] * boxes[1] * boxes[2] * c_parts * k_parts; }  // of a group
  i64 per_thread_bytes() const { return band_bytes + y_bytes + stage_bytes + sum_bytes + again_bytes; }
};

}  // namespace fastdl
