# nixl_kernels(TARGET): the settings every .cu library of the project needs.
#   No fused multiply-add and no fast-math, so that results agree with the CPU path to the bit; the CUDA runtime is linked
#   statically and opens the driver itself at the first call, so that the library loads on machines without one.
function(nixl_kernels TARGET)
  target_compile_options(${TARGET} PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:--fmad=false;-lineinfo;--expt-relaxed-constexpr;-Xcompiler=-Wall,-Wextra,-ffp-contract=off;-diag-suppress=20012>")
  set_target_properties(${TARGET} PROPERTIES CUDA_RUNTIME_LIBRARY Static)
endfunction()
