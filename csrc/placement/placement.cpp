#include "placement/placement.h"

#include <stdexcept>

#include "common/message.h"

namespace neuron {

std::string to_string(const Placement& placement) {
  return message("start_nc=", placement.start_nc, ", nc_count=", placement.nc_count);
}

Placement make_placement(int64_t start, int64_t count, int32_t visible) {
  const std::string seen =
      message("this process sees ", visible,
              visible == 1 ? " core (0)" : message(" cores (0-", visible - 1, ")"));
  if (count == 0 || count < -1) {
    throw std::invalid_argument(message("nc_count=", count, " is not a number of cores: ", seen,
                                        "; use 1 to ", visible, ", or -1 for one core"));
  }
  if (count > visible) {
    throw std::invalid_argument(message("nc_count=", count, " is more than there are: ", seen,
                                        "; use at most ", visible,
                                        ", or make more visible (NEURON_RT_NUM_CORES, "
                                        "NEURON_RT_VISIBLE_CORES, NEURON_EXT_HOST_CORES)"));
  }
  if (start < -1 || start >= visible) {
    throw std::invalid_argument(message("start_nc=", start, " is not a visible core: ", seen,
                                        "; use 0 to ", visible - 1,
                                        ", or -1 for the least used core"));
  }
  const int64_t cores = count == -1 ? 1 : count;
  if (start != -1 && start + cores > visible) {
    throw std::invalid_argument(
        message("start_nc=", start, " with nc_count=", count, " runs past the last core: ", seen,
                "; use start_nc <= ", visible - cores, " or a smaller nc_count"));
  }
  return {static_cast<int32_t>(start), static_cast<int32_t>(count)};
}

int32_t least_used_window(std::span<const int64_t> loads, int32_t count) {
  int64_t sum = 0;
  for (int32_t i = 0; i < count; ++i) sum += loads[i];
  int64_t best_sum = sum;
  int32_t best = 0;
  for (int32_t start = 1; start + count <= static_cast<int32_t>(loads.size()); ++start) {
    sum += loads[start + count - 1] - loads[start - 1];
    if (sum < best_sum) {
      best_sum = sum;
      best = start;
    }
  }
  return best;
}

}  // namespace neuron
