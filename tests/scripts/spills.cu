// Needs more registers than its launch bounds leave: what the compiler says of a spill (.ci/cuda).
__global__ void __launch_bounds__(1024, 2) spills(const float* a, float* o, int n) {
  float r[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) r[i] = a[threadIdx.x + i * n];
#pragma unroll 1
  for (int j = 0; j < n; ++j) {
#pragma unroll
    for (int i = 0; i < 64; ++i) r[i] = r[i] * r[(i + 7) % 64] + a[j];
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) o[threadIdx.x + i * n] = r[i];
}
