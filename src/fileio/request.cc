#include "fileio/request.h"

#include <algorithm>
#include <unordered_map>

namespace nixl::core::fileio {
namespace {

constexpr std::uint64_t kPage = 4096;

class Cutter {
 public:
  Cutter(const CutRules& rules, Request& out) : rules_(rules), out_(out) {}

  Result<void> add(const Piece& piece) {
    if (piece.bytes == 0) return {};
    if (piece.offset > INT64_MAX - piece.bytes)
      return fail(Code::kInvalidArgument, "%s: offset %llu is beyond any file", piece.file->name().c_str(),
                  static_cast<unsigned long long>(piece.offset));
    enter(piece.file);
    if (!piece.file->direct()) return emit(piece, piece.file->fd(), piece.copier ? 1 : rules_.buffered_lane);
    return split_direct(piece);
  }

 private:
  void enter(const File* file) {
    if (!out_.files.empty() && out_.files[file_] == file) return;
    const auto [at, is_new] = index_.try_emplace(file, static_cast<std::uint32_t>(out_.files.size()));
    file_ = at->second;
    if (is_new) out_.files.push_back(file);
  }

  // Whole pages go direct; a part of a page goes through the page cache. Never both into one page: the kernel keeps the
  // two apart only by whole pages.
  Result<void> split_direct(const Piece& piece) {
    const std::uint64_t align = std::max<std::uint64_t>(kPage, piece.file->offset_align());
    const std::uint64_t end = piece.offset + piece.bytes;
    const std::uint64_t first = (piece.offset + align - 1) / align * align, last = end / align * align;
    if (first >= last) return emit_buffered(piece, piece.offset, end);
    if (piece.offset < first) NIXL_TRY(emit_buffered(piece, piece.offset, first));
    Piece middle = sub(piece, first, last);
    const bool aligned = reinterpret_cast<std::uintptr_t>(middle.memory) % piece.file->memory_align() == 0;
    if (!middle.copier && !aligned) middle.copier = rules_.aligner;
    NIXL_TRY(emit(middle, piece.file->fd(), middle.copier ? 1 : 0));
    if (last < end) NIXL_TRY(emit_buffered(piece, last, end));
    return {};
  }
  static Piece sub(const Piece& piece, std::uint64_t begin, std::uint64_t end) {
    Piece part = piece;
    part.offset = begin;
    part.memory += begin - piece.offset;
    part.bytes = end - begin;
    return part;
  }
  Result<void> emit_buffered(const Piece& piece, std::uint64_t begin, std::uint64_t end) {
    NIXL_ASSIGN(const int fd, piece.file->buffered_fd());
    const Piece part = sub(piece, begin, end);
    return emit(part, fd, part.copier ? 1 : rules_.buffered_lane);
  }

  Result<void> emit(Piece piece, int fd, int lane) {
    auto& jobs = out_.lanes[lane].jobs;
    while (piece.bytes > 0) {
      Job* last = jobs.empty() ? nullptr : &jobs.back();
      if (!last || !joins(*last, piece, fd, lane)) {
        if (out_.iovs.size() >= UINT32_MAX) return fail(Code::kInvalidArgument, "more than 2^32 pieces in one request");
        jobs.push_back({piece.offset, static_cast<std::uint32_t>(out_.iovs.size()), 0, 0, file_, fd, piece.copier});
        last = &jobs.back();
      }
      const std::uint64_t bytes = std::min(piece.bytes, kMaxJobBytes - last->bytes);
      append(*last, piece.memory, bytes);
      piece.offset += bytes;
      piece.memory += bytes;
      piece.bytes -= bytes;
    }
    return {};
  }
  bool joins(const Job& job, const Piece& piece, int fd, int lane) const {
    if (job.fd != fd || job.file != file_ || job.copier != piece.copier) return false;
    if (job.offset + job.bytes != piece.offset || job.bytes >= kMaxJobBytes) return false;
    if (extends(job, piece.memory)) return true;
    // The iovecs of a job lie together, so only the job that owns the last of them can get another.
    return job.first_iov + job.num_iov == out_.iovs.size() && job.num_iov < rules_.max_iov[lane];
  }
  bool extends(const Job& job, const std::byte* memory) const {
    if (job.num_iov == 0) return false;
    const iovec& last = out_.iovs[job.first_iov + job.num_iov - 1];
    return static_cast<std::byte*>(last.iov_base) + last.iov_len == memory;
  }
  void append(Job& job, std::byte* memory, std::uint64_t bytes) {
    if (extends(job, memory)) {
      out_.iovs[job.first_iov + job.num_iov - 1].iov_len += bytes;
    } else {
      out_.iovs.push_back({memory, static_cast<std::size_t>(bytes)});
      ++job.num_iov;
    }
    job.bytes += static_cast<std::uint32_t>(bytes);
  }

  const CutRules& rules_;
  Request& out_;
  std::uint32_t file_ = 0;
  std::unordered_map<const File*, std::uint32_t> index_;
};

}  // namespace

Result<void> cut(std::span<const Piece> pieces, const CutRules& rules, Request& request) {
  request.write = rules.write;
  request.iovs.reserve(pieces.size());
  Cutter cutter(rules, request);
  std::uint64_t total = 0;
  bool waits = false;
  for (const Piece& piece : pieces) {
    NIXL_TRY(cutter.add(piece));
    total += piece.bytes;
    request.staged |= piece.copier != nullptr;
    waits |= rules.write && piece.file->waits_for_device();
  }
  const bool copies = std::any_of(request.lanes[1].jobs.begin(), request.lanes[1].jobs.end(),
                                  [](const Job& job) { return job.copier; });
  request.may_inline = request.lanes[0].jobs.empty() && !copies && !waits && total <= kInlineBytes;
  return {};
}

}  // namespace nixl::core::fileio
