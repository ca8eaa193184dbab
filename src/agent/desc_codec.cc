#include "agent/desc_codec.h"

#include <cstring>

#include "base/bytes.h"

namespace nixl::core {
namespace {

constexpr std::string_view kMagic = "NIXLDESC";
constexpr std::uint8_t kVersion = 2;
constexpr std::size_t kMaxText = 1 << 20;
enum Shape : std::uint8_t { kUniform = 0, kValues = 1, kAbsent = 2 };

Shape shape_of(const Column& column) {
  return column.size() == 0 ? kAbsent : column.uniform() ? kUniform : kValues;
}

void put(ByteWriter& out, const Column& column) {
  static_assert(std::endian::native == std::endian::little);
  switch (shape_of(column)) {
    case kAbsent:
      break;
    case kUniform:
      out.put(column[0]);
      break;
    case kValues:
      out.put_raw({reinterpret_cast<const char*>(column.data()), column.size() * 8});
      break;
  }
}

Result<Column> get(ByteReader& in, std::size_t rows, unsigned shape) {
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
  NIXL_ASSIGN(const auto version, in.get<std::uint8_t>());
  if (version != kVersion) return fail(Code::kMismatch, "version %u; this library reads version %u", version, kVersion);
  NIXL_ASSIGN(const auto what, in.get<std::uint8_t>());
  list_class = what >> 4;
  const unsigned type = what & 15;
  if (list_class > 2 || type > 4)
    return fail(Code::kMismatch, "class %u, memory kind %u are unknown", list_class, type);
  NIXL_ASSIGN(const std::size_t rows, in.get<std::uint32_t>());
  NIXL_ASSIGN(const unsigned shapes, in.get<std::uint16_t>());
  NIXL_ASSIGN(const auto has_texts, in.get<std::uint8_t>());
  Descs descs(static_cast<MemType>(type));
  unsigned place = 0;
  for (Column* column : {&descs.addr, &descs.len, &descs.dev, &descs.stride, &descs.count}) {
    NIXL_ASSIGN(*column, get(in, rows, shapes >> place & 3));
    place += 2;
  }
  if (descs.addr.size() != rows || descs.len.size() != rows || descs.dev.size() != rows ||
      descs.stride.size() != descs.count.size())
    return fail(Code::kMismatch, "columns are missing");
  if (has_texts > 1 || (has_texts && rows > in.left() / 4))
    return fail(Code::kMismatch, "texts for %zu rows, %zu bytes left", rows, in.left());
  for (std::size_t i = 0; has_texts && i < rows; ++i) {
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
  out.put(static_cast<std::uint8_t>(list_class << 4 | static_cast<unsigned>(descs.type)));
  out.put(static_cast<std::uint32_t>(descs.rows()));
  const Column* columns[] = {&descs.addr, &descs.len, &descs.dev, &descs.stride, &descs.count};
  unsigned shapes = 0;
  for (unsigned i = 0; i < std::size(columns); ++i) shapes |= shape_of(*columns[i]) << 2 * i;
  out.put(static_cast<std::uint16_t>(shapes));
  out.put<std::uint8_t>(!descs.meta.empty());
  for (const Column* column : columns) put(out, *column);
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
