# FASTDL_CUDA=AUTO|ON|OFF, as a CMake definition or else as an environment variable. AUTO never fails.
# Sets FASTDL_HAVE_CUDA and FASTDL_CUDA_REASON: why the package holds no CUDA kernels, shown by `fastdl info`.
if(NOT DEFINED FASTDL_CUDA)
  set(FASTDL_CUDA AUTO)
  if(NOT "$ENV{FASTDL_CUDA}" STREQUAL "")
    set(FASTDL_CUDA "$ENV{FASTDL_CUDA}")
  endif()
endif()
if(NOT FASTDL_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "fastdl: FASTDL_CUDA must be AUTO, ON or OFF, got `${FASTDL_CUDA}`.")
endif()

set(FASTDL_CUDA_CODE
    80
    CACHE STRING "GPUs for which there is machine code beside PTX, by compute capability: 80, or 80;90")
foreach(sm IN LISTS FASTDL_CUDA_CODE)
  if(NOT sm MATCHES "^[0-9]+$" OR sm LESS 80)
    message(FATAL_ERROR "fastdl: FASTDL_CUDA_CODE must list compute capabilities from 80 on, as `80;90`, got `${FASTDL_CUDA_CODE}`.")
  endif()
endforeach()

set(FASTDL_HAVE_CUDA FALSE)
set(FASTDL_CUDA_REASON "")
if(FASTDL_CUDA STREQUAL "OFF")
  set(FASTDL_CUDA_REASON "switched off when built (FASTDL_CUDA=OFF)")
else()
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(FASTDL_CUDA_REASON "no nvcc was found when it was built")
  else()
    set(CMAKE_CUDA_ARCHITECTURES OFF)  # given below, file by file
    enable_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER_ID STREQUAL "NVIDIA" OR CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
      set(FASTDL_CUDA_REASON
          "needs nvcc 12.8 or newer, got ${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}")
    else()
      set(FASTDL_HAVE_CUDA TRUE)
    endif()
  endif()
  if(FASTDL_CUDA STREQUAL "ON" AND NOT FASTDL_HAVE_CUDA)
    message(FATAL_ERROR "fastdl: FASTDL_CUDA=ON: ${FASTDL_CUDA_REASON}.")
  endif()
endif()
message(STATUS "fastdl: CUDA: ${FASTDL_HAVE_CUDA} ${FASTDL_CUDA_REASON}")

# The module of the CUDA kernels. target: _cuda, or _twin, which is made of the same files as plain C++.
function(fastdl_add_cuda_module target twin)
  list(TRANSFORM FASTDL_CUDA_SOURCES PREPEND "${PROJECT_SOURCE_DIR}/")
  pybind11_add_module(${target} MODULE NO_EXTRAS ${FASTDL_CUDA_SOURCES})
  target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
  target_compile_definitions(${target} PRIVATE FASTDL_VERSION="${FASTDL_VERSION}" FASTDL_CUDA_MODULE=${target}
                                               FASTDL_TWIN=${twin})
  target_compile_options(
    ${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wno-unknown-pragmas;-ffp-contract=off;$<$<BOOL:${FASTDL_WERROR}>:-Werror>>)
  set_target_properties(${target} PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  install(TARGETS ${target} DESTINATION fastdl)
endfunction()

# The kernels as a GPU runs them: code for the GPUs of FASTDL_CUDA_CODE, which others of the same major version and a
# higher minor one run too, and PTX, which the driver compiles when they start on any newer one.
# ptxas warns of register spills; with FASTDL_WERROR they fail the build (another nvcc may spill where ours does not, and
# that must not keep a user from installing). The runtime is linked in; nothing links libcuda, so the module loads without a GPU.
function(fastdl_add_cuda)
  fastdl_add_cuda_module(_cuda 0)
  list(TRANSFORM FASTDL_CUDA_CODE PREPEND sm_ OUTPUT_VARIABLE code)
  list(JOIN code ", " code_names)
  list(JOIN code "," code)
  set_source_files_properties(
    "${PROJECT_SOURCE_DIR}/csrc/bind/cuda_module.cc"
    PROPERTIES COMPILE_DEFINITIONS "FASTDL_NVCC=\"${CMAKE_CUDA_COMPILER_VERSION}\";FASTDL_CUDA_CODE=\"${code_names}\"")
  set_target_properties(_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static
                                         CUDA_VISIBILITY_PRESET hidden)
  target_compile_options(
    _cuda
    PRIVATE
      $<$<COMPILE_LANGUAGE:CUDA>:-gencode=arch=compute_80,code=[${code},compute_80]
      --expt-relaxed-constexpr
      -Xcompiler=-Wall,-Wextra
      -Xptxas=-warn-spills,-warn-lmem-usage
      $<$<BOOL:${FASTDL_WERROR}>:-Werror=all-warnings>>)
endfunction()
