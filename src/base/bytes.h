// Reader and writer of byte strings that cross a process border. Little endian on the wire whatever the machine; lengths
// are checked before anything is read, so that a truncated or hostile buffer yields an error and never a wild read.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>

#include "base/result.h"

namespace nixl::core {

class ByteWriter {
 public:
  template <typename T>
  requires std::is_integral_v<T>
  void put(T value) {
    static_assert(std::endian::native == std::endian::little, "add a byte swap for big-endian machines");
    char raw[sizeof(T)];
    std::memcpy(raw, &value, sizeof(T));
    out_.append(raw, sizeof(T));
  }
  // Integers one after the other.
  template <typename... T>
  void put_all(T... values) {
    (put(values), ...);
  }
  void put_text(std::string_view text) {  // u32 length, bytes
    put(static_cast<std::uint32_t>(text.size()));
    out_.append(text);
  }
  void put_raw(std::string_view bytes) { out_.append(bytes); }
  const std::string& bytes() const noexcept { return out_; }
  std::string take() noexcept { return std::move(out_); }

 private:
  std::string out_;
};

class ByteReader {
 public:
  explicit ByteReader(std::string_view in) noexcept : in_(in) {}

  template <typename T>
  requires std::is_integral_v<T> Result<T> get() {
    if (left() < sizeof(T))
      return fail(Code::kMismatch, "truncated: %zu bytes needed at offset %zu, %zu left", sizeof(T), at_, left());
    T value;
    std::memcpy(&value, in_.data() + at_, sizeof(T));
    at_ += sizeof(T);
    return value;
  }
  // Integers one after the other, up to the first that is missing.
  template <typename... T>
  Result<void> get_all(T&... out) {
    Result<void> result;
    const auto one = [&](auto& value) {
      auto got = get<std::remove_reference_t<decltype(value)>>();
      if (got)
        value = *got;
      else
        result = fail(got.error());
      return got.has_value();
    };
    (void)(one(out) && ...);
    return result;
  }
  // A text written by put_text; longer than `max_bytes` is refused before it is looked at.
  Result<std::string_view> get_text(std::size_t max_bytes) {
    NIXL_ASSIGN(const std::uint32_t size, get<std::uint32_t>());
    if (size > max_bytes)
      return fail(Code::kMismatch, "length %u at offset %zu is above the limit of %zu", size, at_ - 4, max_bytes);
    return get_raw(size);
  }
  Result<std::string_view> get_raw(std::size_t size) {
    if (left() < size)
      return fail(Code::kMismatch, "truncated: %zu bytes needed at offset %zu, %zu left", size, at_, left());
    const std::string_view view = in_.substr(at_, size);
    at_ += size;
    return view;
  }
  std::size_t left() const noexcept { return in_.size() - at_; }
  std::size_t offset() const noexcept { return at_; }

 private:
  std::string_view in_;
  std::size_t at_ = 0;
};

// Checksum of stored and exchanged bytes (CRC-32C, Castagnoli polynomial).
std::uint32_t crc32c(std::string_view bytes, std::uint32_t seed = 0) noexcept;

// Bytes followed by their checksum; unsealed() gives them back, or kMismatch with the name of the backend they come from.
std::string sealed(std::string bytes);
Result<std::string_view> unsealed(std::string_view bytes, const char* backend);

}  // namespace nixl::core
