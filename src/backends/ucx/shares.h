// One plan as several of about the same number of bytes, to be run side by side.
#pragma once
#include <vector>

#include "contract/plan.h"

namespace nixl::core::ucx {

// At most `parts` plans (> 0) that together are `plan`; none is empty. Runs are cut between blocks, and blocks where a share
// ends well inside of one.
std::vector<Plan> share_out(Plan plan, std::size_t parts);

}  // namespace nixl::core::ucx
