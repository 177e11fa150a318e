# Instruction set levels above scalar. One row a level: its flags, and a few lines that use what its kernels use.
# A compiler that cannot build the lines leaves the level out; `fastdl info` names it with the reason.
include(CheckCXXCompilerFlag)
include(CheckCXXSourceCompiles)

set(FASTDL_ISA_LEVELS avx2 avx512 avx512bf16 amx)

set(FASTDL_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(FASTDL_PROBE_avx2 "
  __m256 f(__m256 a, __m256 b) { return _mm256_fmadd_ps(a, b, _mm256_cvtph_ps(_mm_setzero_si128())); }")

set(FASTDL_FLAGS_avx512 ${FASTDL_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
set(FASTDL_PROBE_avx512 "
  __m512 f(__m512 a, __m512 b) { return _mm512_mask_fmadd_ps(a, 1, b, _mm512_broadcast_f32x8(_mm256_setzero_ps())); }
  __m256i g(__m256i a) { return _mm256_mask_add_epi8(a, 1, a, a); }")

set(FASTDL_FLAGS_avx512bf16 ${FASTDL_FLAGS_avx512} -mavx512bf16)
set(FASTDL_PROBE_avx512bf16 "
  __m512 f(__m512 a, __m512bh b) { return _mm512_dpbf16_ps(a, b, b); }")

set(FASTDL_FLAGS_amx ${FASTDL_FLAGS_avx512bf16} -mamx-tile -mamx-bf16)
set(FASTDL_PROBE_amx "
  void f(const void* config) { _tile_loadconfig(config); _tile_zero(0); _tile_dpbf16ps(0, 1, 2); _tile_release(); }")

# Sets FASTDL_HAVE_<LEVEL>, FASTDL_ISA_DEFINITIONS and FASTDL_ISA_MISSING ("amx=why;avx512=why").
function(fastdl_probe_isa_levels)
  check_cxx_source_compiles("
    #ifndef __x86_64__
    #error
    #endif
    int main() {}" FASTDL_TARGET_IS_X86_64)

  set(definitions)
  set(missing)
  foreach(level IN LISTS FASTDL_ISA_LEVELS)
    string(TOUPPER ${level} upper)
    list(JOIN FASTDL_FLAGS_${level} " " flags)
    set(have 0)
    if(FASTDL_TARGET_IS_X86_64)
      set(CMAKE_REQUIRED_FLAGS "${flags}")
      check_cxx_source_compiles("#include <immintrin.h>\n${FASTDL_PROBE_${level}}\nint main() {}" FASTDL_BUILDS_${upper})
      if(missing)  # a level implies those below it
        list(APPEND missing "${level}=needs the levels below it")
      elseif(FASTDL_BUILDS_${upper})
        set(have 1)
      else()
        list(APPEND missing "${level}=${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} cannot build it")
      endif()
    else()
      list(APPEND missing "${level}=not an x86-64 build")
    endif()
    list(APPEND definitions FASTDL_HAVE_${upper}=${have})
    set(FASTDL_HAVE_${upper} ${have} PARENT_SCOPE)
  endforeach()

  list(JOIN missing "\\073" missing)  # a semicolon as a C escape: CMake would split the definition at a plain one
  set(FASTDL_ISA_DEFINITIONS ${definitions} PARENT_SCOPE)
  set(FASTDL_ISA_MISSING "${missing}" PARENT_SCOPE)
endfunction()

# Gives each file of the list its level's flags; drops those whose level is missing.
function(fastdl_apply_isa_levels sources_variable)
  # Kernels are vectorised by hand. What GCC 12 would add reads past the end of arrays (vector loads with a gap).
  set(by_hand -fno-tree-vectorize)
  # GCC for x86: scalars that it moves through vectors wait for all stores before them, those of tiles, too.
  check_cxx_compiler_flag(-mno-stv FASTDL_HAS_NO_STV)
  set(scalars $<$<BOOL:${FASTDL_HAS_NO_STV}>:-mno-stv>)
  # GCC's own intrinsics start from `__m512 y = y` and then warn of it wherever they are inlined.
  set(quiet $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized> $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
  set(kept)
  foreach(source IN LISTS ${sources_variable})
    set(wanted ON)
    if(source MATCHES "[/_]scalar\\.cc$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${by_hand}")
    endif()
    foreach(level IN LISTS FASTDL_ISA_LEVELS)
      if(source MATCHES "[/_]${level}\\.cc$")
        string(TOUPPER ${level} upper)
        set(wanted ${FASTDL_HAVE_${upper}})
        set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${FASTDL_FLAGS_${level}};${by_hand};${scalars};${quiet}")
      endif()
    endforeach()
    if(wanted)
      list(APPEND kept ${source})
    endif()
  endforeach()
  set(${sources_variable} ${kept} PARENT_SCOPE)
endfunction()

fastdl_probe_isa_levels()
