# Finds libtorch: the one named by Torch_DIR or CMAKE_PREFIX_PATH, else the one that `python` imports.
find_package(Torch QUIET)
if(NOT Torch_FOUND)
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND "${Python3_EXECUTABLE}" -c "import torch.utils; print(torch.utils.cmake_prefix_path)"
    OUTPUT_VARIABLE torch_prefix OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  list(APPEND CMAKE_PREFIX_PATH "${torch_prefix}")
  find_package(Torch REQUIRED)
endif()
separate_arguments(torch_cxx_flags NATIVE_COMMAND "${TORCH_CXX_FLAGS}")
