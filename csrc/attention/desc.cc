#include "attention/attention.h"
#include "base/check.h"

namespace fastdl {

std::string describe(const AttentionDesc& d) {
  constexpr const char* kMasks[] = {"none", "bool", "f32", "same"};
  return concat(dtype_name(d.dtype, d.precision), " B=", d.B, " H=", d.H, "/", d.Hkv, " Lq=", d.Lq, " Lk=", d.Lk,
                " D=", d.D, "/", d.Dv, d.sequences ? concat(" sequences=", d.sequences) : std::string(),
                d.lo == INT64_MIN && d.hi == INT64_MAX ? "" : " window", " mask=", kMasks[static_cast<int>(d.mask)]);
}

}  // namespace fastdl
