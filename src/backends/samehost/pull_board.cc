#include "backends/samehost/pull_board.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/bytes.h"

namespace nixl::core::samehost {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
constexpr std::size_t kMaxAddress = 8192;

Result<BoardHeader*> map_board(int fd) {
  void* const base = ::mmap(nullptr, sizeof(BoardHeader), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (base == MAP_FAILED) return fail(errno_error("map the board of pulled writes", errno));
  return static_cast<BoardHeader*>(base);
}

}  // namespace

Result<PullBoard> PullBoard::create() {
  PullBoard board;
  board.file_ = Fd(::memfd_create("nixl-pull", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!board.file_) return fail(errno_error("memfd_create for the board of pulled writes", errno));
  if (::ftruncate(board.fd(), sizeof(BoardHeader)) != 0 || ::fcntl(board.fd(), F_ADD_SEALS, kSeals) != 0)
    return fail(errno_error("size and seal the board of pulled writes", errno));
  NIXL_ASSIGN(board.header_, map_board(board.fd()));
  board->magic = kBoardMagic;  // but for these two all is zero, as it shall be
  if (::getrandom(&board->id, sizeof board->id, 0) != sizeof board->id) return fail(errno_error("getrandom", errno));
  return board;
}

Result<PullBoard> PullBoard::map(Fd file, std::uint64_t id) {
  struct stat info {};
  const int seals = ::fcntl(file.get(), F_GET_SEALS);
  if (::fstat(file.get(), &info) != 0 || info.st_size != static_cast<off_t>(sizeof(BoardHeader)) || seals < 0 ||
      (seals & kSeals) != kSeals)
    return fail(Code::kMismatch, "descriptor is no board of pulled writes (%lld bytes, seals %d; %zu, %d wanted)",
                static_cast<long long>(info.st_size), seals, sizeof(BoardHeader), kSeals);
  PullBoard board;
  NIXL_ASSIGN(board.header_, map_board(file.get()));
  if (board->magic != kBoardMagic || board->id != id)
    return fail(Code::kMismatch, "another board of pulled writes was announced (magic %llx, id %llx; %llx wanted)",
                static_cast<unsigned long long>(board->magic), static_cast<unsigned long long>(board->id),
                static_cast<unsigned long long>(id));
  return board;
}

PullBoard::PullBoard(PullBoard&& other) noexcept
    : file_(std::move(other.file_)), header_(std::exchange(other.header_, nullptr)) {}

PullBoard& PullBoard::operator=(PullBoard&& other) noexcept {
  std::swap(file_, other.file_);
  std::swap(header_, other.header_);
  return *this;
}

PullBoard::~PullBoard() {
  if (header_) ::munmap(header_, sizeof(BoardHeader));
}

std::uint32_t PullBoard::take(std::uint64_t offer, std::uint32_t count, unsigned state) const noexcept {
  while (header_->next.load(std::memory_order_relaxed) < count && header_->offer.load() == offer) {
    const std::uint32_t chunk = header_->next.fetch_add(1, std::memory_order_acq_rel);
    if (chunk < count && change(offer, chunk, kFree, state)) return chunk;
  }
  return count;
}

bool PullBoard::change(std::uint64_t offer, std::uint32_t chunk, unsigned from, unsigned to) const noexcept {
  std::uint64_t expected = chunk_word(offer, from);
  return header_->chunks[chunk].compare_exchange_strong(expected, chunk_word(offer, to), std::memory_order_seq_cst);
}

OfferedRows::OfferedRows(std::vector<OfferedRow> rows) : rows_(std::move(rows)) {
  std::uint32_t end = 0;
  for (const OfferedRow& row : rows_)
    ends_.push_back(end += static_cast<std::uint32_t>((row.bytes + kOfferedChunkBytes - 1) / kOfferedChunkBytes));
}

OfferedRow OfferedRows::chunk(std::uint32_t index) const noexcept {
  const auto row = static_cast<std::size_t>(std::upper_bound(ends_.begin(), ends_.end(), index) - ends_.begin());
  OfferedRow piece = rows_[row];
  const std::uint64_t offset = (index - (row == 0 ? 0 : ends_[row - 1])) * kOfferedChunkBytes;
  piece.source += offset;
  piece.target += offset;
  piece.bytes = std::min(piece.bytes - offset, kOfferedChunkBytes);
  return piece;
}

std::string Offer::encode() const {
  ByteWriter out;
  out.put_text(address);
  out.put_all(board_fd, board_id, number, static_cast<std::uint32_t>(rows.size()));
  for (const OfferedRow& row : rows) {
    out.put_all(row.source, row.target, row.bytes, row.slot, row.generation);
  }
  return out.take();
}

Result<Offer> Offer::decode(std::string_view bytes) {
  ByteReader in(bytes);
  Offer offer;
  NIXL_ASSIGN(offer.address, in.get_text(kMaxAddress));
  NIXL_TRY(in.get_all(offer.board_fd, offer.board_id, offer.number));
  NIXL_ASSIGN(const std::uint32_t count, in.get<std::uint32_t>());
  if (count > kMaxOfferedRows)
    return fail(Code::kMismatch, "an offer of %u rows; at most %zu are taken", count, kMaxOfferedRows);
  std::uint64_t chunks = 0;
  for (std::uint32_t i = 0; i < count; ++i) {
    OfferedRow row;
    NIXL_TRY(in.get_all(row.source, row.target, row.bytes, row.slot, row.generation));
    chunks += row.bytes / kOfferedChunkBytes + 1;
    if (row.bytes == 0 || row.bytes > kMaxOfferedChunks * kOfferedChunkBytes || chunks > kMaxOfferedChunks)
      return fail(Code::kMismatch, "row %u of an offer has %llu bytes; 1 to %llu, %u chunks in all, are taken", i,
                  static_cast<unsigned long long>(row.bytes),
                  static_cast<unsigned long long>(kMaxOfferedChunks * kOfferedChunkBytes), kMaxOfferedChunks);
    offer.rows.push_back(row);
  }
  return offer;
}

}  // namespace nixl::core::samehost
