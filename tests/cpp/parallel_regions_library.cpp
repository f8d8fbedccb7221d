// A library as a compiler of native code makes it: OpenMP regions behind plain functions.
#include <omp.h>

#include <cstdint>

extern "C" {

/// The threads of a region's team, the level it is at, and the sum of 0 .. count-1 as its threads
/// share the loop.
void __attribute__((visibility("default"))) region(int64_t count, int64_t* threads, int64_t* level,
                                                   int64_t* sum) {
  int64_t total = 0;
  int64_t visits = 0;
#pragma omp parallel
  {
    int64_t mine = 0;
#pragma omp for
    for (int64_t i = 0; i < count; ++i) mine += i;
#pragma omp single
    {
      *threads = omp_get_num_threads();
      *level = omp_get_level();
      ++visits;
    }
#pragma omp atomic
    total += mine;
  }
  *sum = visits == 1 ? total : -1;
}
}
