#include "gemm/cpu/kernel_strip.h"

namespace fastdl::amx {

extern const GemmHelpers helpers_bf16, helpers_f16, helpers_f32_medium, helpers_f32_high, helpers_f32_split;
template <class P, class T, class S>
constexpr GemmHelpers with_strips() {
  GemmHelpers helpers = tile_helpers<T, S>();
  helpers.strip = strip<P, T, S::limited>;
  return helpers;
}
const GemmHelpers helpers_bf16 = with_strips<Products1, bf16, Whole>();
const GemmHelpers helpers_f16 = with_strips<Products4, f16, Parts<2>>();
const GemmHelpers helpers_f32_medium = with_strips<Products1, float, Parts<1>>();
const GemmHelpers helpers_f32_high = with_strips<Products3, float, Parts<2>>();
const GemmHelpers helpers_f32_split = with_strips<Products6, float, Parts<3>>();

void tile_bf16_near(const TileArgs& t) { run_block<Products1, true>(t); }
void tile_f16(const TileArgs& t) { run_block<Products4>(t); }
void tile_high(const TileArgs& t) { run_block<Products3>(t); }
void tile_split(const TileArgs& t) { run_block<Products6>(t); }
void panels_bf16(const TileArgs& t) { run_panels<Products1, true, Stream::a>(t, all_steps<Products1>(t)); }
void panels_f16(const TileArgs& t) { run_panels<Products4, false, Stream::a>(t, all_steps<Products4>(t)); }
void panels_high(const TileArgs& t) { run_panels<Products3, false, Stream::a>(t, all_steps<Products3>(t)); }
void panels_split(const TileArgs& t) { run_panels<Products6, false, Stream::a>(t, all_steps<Products6>(t)); }

}  // namespace fastdl::amx
