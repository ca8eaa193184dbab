// Times of steps replayed from CUDA graphs.
#pragma once
#include "gpu_ranks.h"

namespace gpu_test {

constexpr int kWarmUps = 4, kReplays = 15;
inline std::string replay_method(int chain) {
  return "graphs of " + std::to_string(chain) + " steps, replayed " + std::to_string(kReplays) + " times after " +
         std::to_string(kWarmUps) +
         " warm-ups, ranks released together before each replay; CUDA events; a rank's figure is its median, shown is "
         "the worst rank";
}

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Microseconds of a step in a graph of `chain` steps, this rank's median.
inline double time_chain(Mesh& mesh, cudaStream_t stream, int chain, const std::function<void()>& step) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < chain; ++i) step();
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  CUDA_OK(cudaEventCreate(&begin));
  CUDA_OK(cudaEventCreate(&end));
  std::vector<double> us;
  for (int i = 0; i < kWarmUps + kReplays; ++i) {
    mesh.barrier();
    CUDA_OK(cudaEventRecord(begin, stream));
    CUDA_OK(cudaGraphLaunch(exec, stream));
    CUDA_OK(cudaEventRecord(end, stream));
    CUDA_OK(cudaStreamSynchronize(stream));
    float ms = 0;
    CUDA_OK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= kWarmUps) us.push_back(ms * 1000 / chain);
  }
  CUDA_OK(cudaGraphExecDestroy(exec));
  CUDA_OK(cudaGraphDestroy(graph));
  CUDA_OK(cudaEventDestroy(begin));
  CUDA_OK(cudaEventDestroy(end));
  return median(us);
}

}  // namespace gpu_test
