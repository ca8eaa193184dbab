// Descriptor lists in columns. A column in which every row is equal stores one value, so that a million blocks of one size on
// one device cost eight bytes each; rows may be runs of blocks at a fixed distance.
// Plain values: no thread may write one while another uses it.
#pragma once
#include <nixl/export.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace nixl {

enum class MemType : int { DRAM = 0, VRAM = 1, BLOCK = 2, OBJECT = 3, FILE = 4, BLK = BLOCK, OBJ = OBJECT };

// Leaves the new elements of a vector uninitialised when it is resized: they are written right after.
template <typename T>
struct Uninitialised : std::allocator<T> {
  template <typename U>
  struct rebind {
    using other = Uninitialised<U>;
  };
  Uninitialised() = default;
  template <typename U>
  Uninitialised(const Uninitialised<U>&) noexcept {}
  template <typename U>
  void construct(U* at) noexcept(std::is_nothrow_default_constructible<U>::value) {
    ::new (static_cast<void*>(at)) U;
  }
  template <typename U, typename... Args>
  void construct(U* at, Args&&... args) {
    ::new (static_cast<void*>(at)) U(std::forward<Args>(args)...);
  }
};

// Copies share their values until one of them is changed.
class Column {
 public:
  using Values = std::vector<std::uint64_t, Uninitialised<std::uint64_t>>;

  Column() = default;
  Column(std::size_t size, std::uint64_t value) : size_(size), value_(value) {}
  explicit Column(Values values) : size_(values.size()), value_(size_ ? values[0] : 0) {
    for (const std::uint64_t value : values)
      if (value != value_) {
        values_ = std::make_shared<Values>(std::move(values));
        return;
      }
  }

  std::size_t size() const noexcept { return size_; }
  bool uniform() const noexcept { return !values_; }
  std::uint64_t operator[](std::size_t i) const noexcept { return values_ ? (*values_)[i] : value_; }
  const std::uint64_t* data() const noexcept { return values_ ? values_->data() : nullptr; }  // null when uniform

  void set(std::size_t i, std::uint64_t value) {
    if (uniform() && value == value_) return;
    spread()[i] = value;
  }
  void push_back(std::uint64_t value) {
    if (size_ == 0) clear(value);
    if (!uniform() || value != value_) spread().push_back(value);
    ++size_;
  }
  void erase(std::size_t i) {
    if (!uniform()) spread().erase(values_->begin() + static_cast<std::ptrdiff_t>(i));
    --size_;
  }
  void clear(std::uint64_t value = 0) {
    size_ = 0;
    value_ = value;
    values_.reset();
  }
  // Reads `size` values that lie `step` apart.
  void assign(const std::uint64_t* from, std::size_t size, std::size_t step) {
    clear(size ? from[0] : 0);
    size_ = size;
    std::size_t i = 0;
    while (i < size && from[i * step] == value_) ++i;
    if (i == size) return;
    Values values(size);
    for (std::size_t k = 0; k < i; ++k) values[k] = value_;
    for (; i < size; ++i) values[i] = from[i * step];
    values_ = std::make_shared<Values>(std::move(values));
  }
  bool operator==(const Column& other) const noexcept {
    if (size_ != other.size_) return false;
    if (uniform() && other.uniform()) return size_ == 0 || value_ == other.value_;
    for (std::size_t i = 0; i < size_; ++i)
      if ((*this)[i] != other[i]) return false;
    return true;
  }

 private:
  Values& spread() {
    if (!values_)
      values_ = std::make_shared<Values>(size_, value_);
    else if (values_.use_count() > 1)
      values_ = std::make_shared<Values>(*values_);
    return *values_;
  }
  std::size_t size_ = 0;
  std::uint64_t value_ = 0;
  std::shared_ptr<Values> values_;  // null: every row is value_
};

// Rows of (addr, len, dev). With runs, row i stands for count[i] blocks of len[i] bytes every stride[i] bytes.
struct Descs {
  MemType type = MemType::DRAM;
  Column addr, len, dev;
  Column stride, count;           // both empty: no runs
  std::vector<std::string> meta;  // empty, or one text a row (registration)

  Descs() = default;
  explicit Descs(MemType kind) : type(kind) {}
  std::size_t rows() const noexcept { return addr.size(); }
  bool has_runs() const noexcept { return count.size() != 0; }
  std::uint64_t blocks() const noexcept {
    if (!has_runs()) return rows();
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i < rows(); ++i) sum += count[i];
    return sum;
  }
  void add(std::uint64_t address, std::uint64_t length, std::uint64_t device) {
    addr.push_back(address);
    len.push_back(length);
    dev.push_back(device);
    if (!meta.empty()) meta.emplace_back();
    if (has_runs()) {
      stride.push_back(length);
      count.push_back(1);
    }
  }
  void add(std::uint64_t address, std::uint64_t length, std::uint64_t device, std::string text) {
    add(address, length, device);
    if (text.empty()) return;
    meta.resize(rows());
    meta.back() = std::move(text);
  }
  const std::string& text(std::size_t row) const noexcept {
    static const std::string kNone;
    return meta.empty() ? kNone : meta[row];
  }
  bool operator==(const Descs& other) const {
    if (type != other.type || !(addr == other.addr) || !(len == other.len) || !(dev == other.dev) ||
        !(stride == other.stride) || !(count == other.count))
      return false;
    for (std::size_t i = 0; i < rows(); ++i)
      if (text(i) != other.text(i)) return false;
    return true;
  }
};

// Lists as bytes (docs/wire.md). `list_class` is the caller's: 0 transfer, 1 registration, 2 remote. unpackDescs throws nixl::Error
// MISMATCH for anything that is not whole.
NIXL_EXPORT std::string packDescs(const Descs& descs, std::uint8_t list_class);
NIXL_EXPORT Descs unpackDescs(const char* bytes, std::size_t size, std::uint8_t& list_class);

}  // namespace nixl
