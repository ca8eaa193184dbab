// Descriptor lists as bytes; layout in docs/wire.md.
#pragma once
#include <nixl/descs.h>

#include <string>
#include <string_view>

#include "base/result.h"

namespace nixl::core {

std::string encode_descs(const Descs& descs, std::uint8_t list_class);
// kMismatch with the reason for anything that is not whole and of this version.
Result<Descs> decode_descs(std::string_view bytes, std::uint8_t& list_class);

}  // namespace nixl::core
