# FASTDL_CUDA=AUTO|ON|OFF, as a CMake definition or else as an environment variable. AUTO never fails.
# Sets FASTDL_CUDA_REASON: why the module holds no CUDA kernels, shown by `fastdl info`.
if(NOT DEFINED FASTDL_CUDA)
  set(FASTDL_CUDA AUTO)
  if(NOT "$ENV{FASTDL_CUDA}" STREQUAL "")
    set(FASTDL_CUDA "$ENV{FASTDL_CUDA}")
  endif()
endif()

if(FASTDL_CUDA STREQUAL "AUTO")
  set(FASTDL_CUDA_REASON "this version has no CUDA kernels")
elseif(FASTDL_CUDA STREQUAL "OFF")
  set(FASTDL_CUDA_REASON "switched off when built (FASTDL_CUDA=OFF)")
elseif(FASTDL_CUDA STREQUAL "ON")
  message(FATAL_ERROR "fastdl: FASTDL_CUDA=ON, but this version has no CUDA kernels; use AUTO or OFF.")
else()
  message(FATAL_ERROR "fastdl: FASTDL_CUDA must be AUTO, ON or OFF, got `${FASTDL_CUDA}`.")
endif()
message(STATUS "fastdl: CUDA: ${FASTDL_CUDA_REASON}")
