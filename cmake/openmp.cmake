# A process must hold one OpenMP runtime, and torch, imported first, brings it: libgomp.so.1 on Linux. So the module
# names that library by its SONAME and bundles nothing; a compiler bound to another runtime builds a serial module.
# Sets FASTDL_OPENMP, and FASTDL_OPENMP_REASON where it is OFF.
find_package(OpenMP COMPONENTS CXX)

set(FASTDL_OPENMP OFF)
set(FASTDL_OPENMP_REASON "")
if(NOT OpenMP_CXX_FOUND)
  set(FASTDL_OPENMP_REASON "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} has no OpenMP")
elseif(NOT OpenMP_CXX_LIB_NAMES MATCHES "gomp")
  set(FASTDL_OPENMP_REASON "the compiler's OpenMP runtime (${OpenMP_CXX_LIB_NAMES}) is not torch's: build with GCC")
  string(REPLACE ";" " " FASTDL_OPENMP_REASON "${FASTDL_OPENMP_REASON}")
else()
  set(FASTDL_OPENMP ON)
endif()
if(NOT FASTDL_OPENMP)
  message(WARNING "fastdl: building without threads: ${FASTDL_OPENMP_REASON}")
endif()
