#include "ep/cpu/memory.h"

#include <algorithm>
#include <new>

#include "base/bytes.h"

namespace nixl::core::ep {

namespace {

constexpr std::uint32_t kExportVersion = 1;
constexpr std::int64_t kPage = 4096;

// Bytes of the largest stage that a call of at most (elements = M * H, tokens = M) may need: rows of every expert, each
// padded to a cache line (8 times its elements' bytes at the smallest hidden size), and an index of 16 bytes a row.
std::int64_t slot_bytes_for(const Capacity& capacity) {
  const std::int64_t experts = std::int64_t{capacity.num_ranks} * capacity.experts_per_rank;
  const std::int64_t elements = max_elements(capacity.num_bytes, experts);
  const std::int64_t tokens = max_tokens_for(capacity.num_bytes, experts, 8);
  const std::int64_t rows = std::max<std::int64_t>(experts, kMaxTopk) * tokens;
  return align_up(experts * elements * 8 + rows * 16 + experts * 16 + 16 * kPage, kPage);
}

}  // namespace

Result<void> OwnMemory::open(int rank, std::uint32_t incarnation) {
  NIXL_ASSIGN(control_memory_, SharedMemory::create("nixl_ep_control", make_control_layout().total));
  control_ = Control(control_memory_.data());
  Hello& hello = *new (control_memory_.data()) Hello;  // the other words are zero, which is their initial state
  hello.rank = static_cast<std::uint32_t>(rank);
  hello.incarnation = incarnation;
  hello.magic = kControlMagic;
  return {};
}

Result<void> OwnMemory::reserve(const Capacity& capacity) {
  const std::int64_t needed = slot_bytes_for(capacity);
  if (!exposed_) {
    const std::int64_t experts = std::int64_t{capacity.num_ranks} * capacity.experts_per_rank;
    const std::int64_t in_flight = 4 * max_elements(capacity.num_bytes, experts);  // bf16 rows of two dispatches
    exposed_bytes_ = std::min(capacity.num_bytes, std::max<std::int64_t>(align_up<std::int64_t>(in_flight, 128), 128));
    if (exposed_bytes_ > 0) {
      NIXL_ASSIGN(exposed_, SharedMemory::create("nixl_ep_exposed", exposed_bytes_));
    }
  }
  if (needed <= slot_bytes_) return {};
  if (!data_) {
    NIXL_ASSIGN(data_, SharedMemory::create("nixl_ep_data", kSlots * needed));
  } else {
    // New slots go behind the old ones, which slower peers may still be reading.
    retired_.push_back(data_);
    first_slot_ += kSlots * slot_bytes_;
    NIXL_TRY(data_.grow(first_slot_ + kSlots * needed));
  }
  slot_bytes_ = needed;
  return {};
}

Result<Export> OwnMemory::export_memory() const {
  if (!data_) return fail(Code::kNotAllowed, "no memory to export yet: reserve it first");
  Export out;
  ByteWriter writer;
  writer.put(kExportVersion);
  out.description = writer.take();
  NIXL_ASSIGN(Fd control, control_memory_.export_descriptor());
  NIXL_ASSIGN(Fd data, data_.export_descriptor());
  out.descriptors.push_back(std::move(control));
  out.descriptors.push_back(std::move(data));
  return out;
}

View OwnMemory::exposed() const {
  View view;
  view.data = exposed_.data();
  view.shape[0] = exposed_bytes_;
  view.stride[0] = 1;
  return view;
}

void OwnMemory::begin_stage(int slot) const {
  // A full barrier: no byte of the new stage becomes visible before the odd number.
  control_.hello().generation[slot].fetch_add(1, std::memory_order_seq_cst);
}

std::uint64_t OwnMemory::end_stage(int slot) const {
  return control_.hello().generation[slot].fetch_add(1, std::memory_order_seq_cst) + 1;
}

Result<ImportedMemory> ImportedMemory::open(const PeerIdentity& peer, Export memory) {
  ByteReader reader(memory.description);
  NIXL_ASSIGN(const std::uint32_t version, reader.get<std::uint32_t>());
  if (version != kExportVersion || memory.descriptors.size() != 2)
    return fail(Code::kMismatch, "memory of rank %d: version %u with %zu descriptors, this build expects %u with 2",
                peer.rank, version, memory.descriptors.size(), kExportVersion);
  ImportedMemory out;
  NIXL_ASSIGN(out.control_memory_, SharedMemory::import(std::move(memory.descriptors[0])));
  NIXL_ASSIGN(out.data_, SharedMemory::import(std::move(memory.descriptors[1])));
  if (out.control_memory_.size() < make_control_layout().total)
    return fail(Code::kMismatch, "control memory of rank %d: %lld bytes, expected %lld", peer.rank,
                static_cast<long long>(out.control_memory_.size()),
                static_cast<long long>(make_control_layout().total));
  out.control_ = Control(out.control_memory_.data());
  const Hello& hello = out.control_.hello();
  if (hello.magic != kControlMagic || hello.rank != static_cast<std::uint32_t>(peer.rank) ||
      hello.incarnation != peer.incarnation)
    return fail(Code::kMismatch, "control memory says rank %u incarnation %08x, expected rank %d incarnation %08x",
                hello.rank, hello.incarnation, peer.rank, peer.incarnation);
  return out;
}

const std::byte* ImportedMemory::staged(std::int64_t offset, std::int64_t bytes) {
  const auto within = [&] { return bytes <= data_.size() && offset <= data_.size() - bytes; };
  if (offset < 0 || bytes < 0) return nullptr;
  if (!within() && (!data_.refresh() || !within())) return nullptr;
  return data_.data() + offset;
}

}  // namespace nixl::core::ep
