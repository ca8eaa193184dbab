#include "backends/mooncake/parts.h"

#include <algorithm>

#include "backends/mooncake/engine.h"
#include "base/bytes.h"

namespace nixl::core::mooncake {

std::uint64_t Cuts::within(std::uint64_t address, std::uint64_t length) const noexcept {
  if (starts_.size() <= 1) return length;
  const auto next = std::upper_bound(starts_.begin(), starts_.end(), address);
  return next == starts_.end() ? length : std::min(length, *next - address);
}

std::string Cuts::encode() const {
  ByteWriter out;
  out.put(static_cast<std::uint32_t>(starts_.size()));
  for (const std::uint64_t start : starts_) out.put(start);
  return out.take();
}

Result<Cuts> Cuts::decode(std::string_view bytes, const Region& region) {
  ByteReader in(bytes);
  NIXL_ASSIGN(const auto count, in.get<std::uint32_t>());
  if (in.left() != count * sizeof(std::uint64_t))
    return fail(Code::kMismatch, "Mooncake key of a region: %zu bytes for %u parts", bytes.size(), count);
  std::vector<std::uint64_t> starts(count);
  for (std::uint64_t& start : starts) {
    NIXL_ASSIGN(start, in.get<std::uint64_t>());
  }
  const bool ascending =
      std::adjacent_find(starts.begin(), starts.end(), [](auto a, auto b) { return a >= b; }) == starts.end();
  if (!ascending || (region.length > 0 && (starts.empty() || starts.front() > region.address)))
    return fail(Code::kMismatch, "Mooncake key of a region: its %u parts do not cover 0x%llx", count,
                static_cast<unsigned long long>(region.address));
  return Cuts(std::move(starts));
}

Result<Cuts> Parts::add(const Region& region) {
  const std::uint64_t end = region.address + region.length;
  const int gpu = region.kind == MemKind::kVram ? static_cast<int>(region.device) : -1;
  std::vector<std::uint64_t> used, fresh;
  const std::lock_guard lock(mutex_);
  auto next = parts_.upper_bound(region.address);
  if (next != parts_.begin() && std::prev(next)->second.end > region.address) --next;
  for (std::uint64_t at = region.address; at < end;) {
    if (next != parts_.end() && next->first <= at) {
      used.push_back(next->first);
      at = next->second.end;
      ++next;
      continue;
    }
    const std::uint64_t stop = next == parts_.end() ? end : std::min(end, next->first);
    if (auto done = engine_.register_memory(at, stop - at, gpu); !done) {
      for (const std::uint64_t start : fresh) drop_locked(start);
      return fail(std::move(done).error());
    }
    parts_[at] = {stop, 0};
    used.push_back(at);
    fresh.push_back(at);
    at = stop;
  }
  for (const std::uint64_t start : used) ++parts_[start].uses;
  return Cuts(std::move(used));
}

void Parts::remove(const Cuts& cuts) noexcept {
  const std::lock_guard lock(mutex_);
  for (const std::uint64_t start : cuts.starts())
    if (--parts_[start].uses == 0) drop_locked(start);
}

void Parts::drop_locked(std::uint64_t start) noexcept {
  engine_.unregister_memory(start);
  parts_.erase(start);
}

}  // namespace nixl::core::mooncake
