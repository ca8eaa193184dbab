// Ends the program, with the place and the call, where CUDA says no.
#pragma once
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#define CK(call)                                                                                   \
  do {                                                                                             \
    if (const cudaError_t code = (call); code != cudaSuccess) {                                    \
      std::fprintf(stderr, "%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(code)); \
      std::exit(1);                                                                                \
    }                                                                                              \
  } while (0)
