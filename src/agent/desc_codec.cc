#include "agent/desc_codec.h"

#include <cstring>

#include "base/bytes.h"

namespace nixl::core {
namespace {

constexpr std::string_view kMagic = "NIXLDESC";
constexpr std::uint16_t kVersion = 1;
constexpr std::size_t kMaxText = 1 << 20;
enum Shape : std::uint8_t { kUniform = 0, kValues = 1, kAbsent = 2 };

void put(ByteWriter& out, const Column& column) {
  if (column.size() == 0) return out.put<std::uint8_t>(kAbsent);
  out.put<std::uint8_t>(column.uniform() ? kUniform : kValues);
  if (column.uniform()) return out.put(column[0]);
  static_assert(std::endian::native == std::endian::little);
  out.put_raw({reinterpret_cast<const char*>(column.data()), column.size() * 8});
}

Result<Column> get(ByteReader& in, std::size_t rows) {
  NIXL_ASSIGN(const auto shape, in.get<std::uint8_t>());
  if (shape == kAbsent) return Column();
  if (shape == kUniform) {
    NIXL_ASSIGN(const auto value, in.get<std::uint64_t>());
    return Column(rows, value);
  }
  if (shape != kValues) return fail(Code::kMismatch, "column of unknown shape %u", shape);
  if (rows > in.left() / 8) return fail(Code::kMismatch, "%zu rows announced, %zu bytes left", rows, in.left());
  NIXL_ASSIGN(const auto bytes, in.get_raw(rows * 8));
  Column::Values values(rows);
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return Column(std::move(values));
}

Result<Descs> decode(ByteReader& in, std::uint8_t& list_class) {
  NIXL_ASSIGN(const auto version, in.get<std::uint16_t>());
  if (version != kVersion) return fail(Code::kMismatch, "version %u; this library reads version %u", version, kVersion);
  NIXL_ASSIGN(list_class, in.get<std::uint8_t>());
  NIXL_ASSIGN(const auto type, in.get<std::uint8_t>());
  if (list_class > 2 || type > 4)
    return fail(Code::kMismatch, "class %u, memory kind %u are unknown", list_class, type);
  NIXL_ASSIGN(const auto rows, in.get<std::uint64_t>());
  constexpr std::uint64_t kMostRows = 1ull << 32;
  if (rows > kMostRows)
    return fail(Code::kMismatch, "%llu rows are above the limit", static_cast<unsigned long long>(rows));
  Descs descs(static_cast<MemType>(type));
  for (Column* column : {&descs.addr, &descs.len, &descs.dev, &descs.stride, &descs.count}) {
    NIXL_ASSIGN(*column, get(in, rows));
  }
  if (descs.addr.size() != rows || descs.len.size() != rows || descs.dev.size() != rows ||
      descs.stride.size() != descs.count.size())
    return fail(Code::kMismatch, "columns are missing");
  NIXL_ASSIGN(const auto texts, in.get<std::uint64_t>());
  if (texts != 0 && (texts != rows || texts > in.left() / 4))
    return fail(Code::kMismatch, "%llu texts for %llu rows", static_cast<unsigned long long>(texts),
                static_cast<unsigned long long>(rows));
  for (std::uint64_t i = 0; i < texts; ++i) {
    NIXL_ASSIGN(const auto text, in.get_text(kMaxText));
    descs.meta.emplace_back(text);
  }
  if (in.left()) return fail(Code::kMismatch, "%zu bytes follow the end", in.left());
  return descs;
}

}  // namespace

std::string encode_descs(const Descs& descs, std::uint8_t list_class) {
  ByteWriter out;
  out.put_raw(kMagic);
  out.put(kVersion);
  out.put(list_class);
  out.put(static_cast<std::uint8_t>(descs.type));
  out.put<std::uint64_t>(descs.rows());
  for (const Column* column : {&descs.addr, &descs.len, &descs.dev, &descs.stride, &descs.count}) put(out, *column);
  out.put<std::uint64_t>(descs.meta.size());
  for (const std::string& text : descs.meta) out.put_text(text);
  return out.take();
}

Result<Descs> decode_descs(std::string_view bytes, std::uint8_t& list_class) {
  if (bytes.substr(0, kMagic.size()) != kMagic)
    return fail(Code::kMismatch, "%zu bytes that are no descriptor list (no %s header)", bytes.size(), kMagic.data());
  ByteReader in(bytes.substr(kMagic.size()));
  auto descs = decode(in, list_class);
  if (!descs) return fail(within("descriptor list", descs.error()));
  return descs;
}

}  // namespace nixl::core
