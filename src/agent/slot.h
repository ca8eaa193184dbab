// Slot: one backend that an agent created. Peer: one other agent (or ourselves), with a link for each backend in common.
#pragma once
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "agent/metadata.h"
#include "agent/region_index.h"
#include "contract/entry.h"

namespace nixl::core {

inline constexpr std::size_t kMaxSlots = 64;  // backends of one agent

struct Slot {
  std::uint32_t id = 0;  // position in creation order
  const BackendEntry* entry = nullptr;
  Params params;  // as opened
  std::unique_ptr<Backend> backend;
  Notifier* notifier = nullptr;
  std::string connection;     // exported bytes
  Slot* companion = nullptr;  // preferred where it reaches; see BackendEntry::stands_in_for
  bool is_companion = false;
  RegionIndex<LocalEntry> regions;
  std::atomic<bool> path_told{false};

  const std::string& name() const noexcept { return entry->name; }
  const Abilities& abilities() const noexcept { return backend->abilities(); }
  // Held around set-up calls of the backend, unless it does not need that.
  std::unique_lock<std::mutex> setup() {
    return abilities().concurrent_setup ? std::unique_lock(setup_, std::defer_lock) : std::unique_lock(setup_);
  }
  // Destroy what the backend gave. Call when `usage` says so; the entry itself may live on.
  void dispose(LocalEntry& entry_) {
    const auto lock = setup();
    entry_.object.reset();
  }
  void dispose(RemoteEntry& entry_) {
    {
      const auto lock = setup();
      entry_.object.reset();
    }
    if (const auto base = std::exchange(entry_.base, nullptr); base && base->usage.release()) dispose(*base);
  }
  template <typename Entry>
  void retire(Entry& entry_) {
    if (entry_.usage.retire()) dispose(entry_);
  }
  template <typename Entry>
  void release(Entry& entry_) {
    if (entry_.usage.release()) dispose(entry_);
  }

 private:
  std::mutex setup_;
};

struct PeerLink {
  Slot* slot = nullptr;
  std::string bytes;                       // the peer's connection, as loaded
  std::unique_ptr<Connection> connection;  // null: the peer cannot be reached by this backend
  std::string unreachable;                 // why
  RegionIndex<RemoteEntry> regions;
  std::uint64_t complete_revision = 0;  // of the newest complete metadata; guarded as RemoteEntry::revision
  Usage usage;

  void release() {
    if (usage.release()) dispose();
  }
  void retire() {
    for (const auto& entry : regions.all()) slot->retire(*entry);
    if (usage.retire()) dispose();
  }

 private:
  void dispose() {
    const auto lock = slot->setup();
    connection.reset();
  }
};

struct Peer {
  enum class State { kAlive, kRemoved, kLost };
  std::string name;
  std::uint64_t incarnation = 0;
  Home home;
  bool is_self = false;
  // By slot id; set once, by the one thread that loads or creates at a time, and kept as long as the peer object.
  std::array<std::atomic<PeerLink*>, kMaxSlots> links{};
  std::atomic<State> state{State::kAlive};
  std::string why;                // kLost: written before the state
  std::atomic<bool> told{false};  // the loss was reported to a caller
  std::atomic<bool> forgotten{false};

  Peer() = default;
  ~Peer() {
    for (auto& link : links) delete link.load();
  }
  // The first end counts: later ones keep its reason.
  void end(State how, const std::string& reason) {
    if (ended_.exchange(true)) return;
    why = reason;
    state.store(how, std::memory_order_release);
  }
  PeerLink* link(const Slot& slot) const noexcept { return links[slot.id].load(std::memory_order_acquire); }
  void adopt(std::unique_ptr<PeerLink> link) noexcept {
    const std::uint32_t id = link->slot->id;
    links[id].store(link.release(), std::memory_order_release);
  }
  // Drops what the backends hold for this peer, as soon as nothing under way uses it.
  void retire() {
    for (auto& link : links)
      if (PeerLink* held = link.load()) held->retire();
  }

 private:
  std::atomic<bool> ended_{false};
};

}  // namespace nixl::core
