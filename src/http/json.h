// A reader for the JSON that servers answer with. Input comes from outside: depth and size are bounded, errors are
// results.
#pragma once
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"

namespace nixl::core::http {

class Json {
 public:
  static Result<Json> parse(std::string_view text);

  // Texts, and numbers, true and false as they were written; "" for anything else.
  const std::string& text() const noexcept { return text_; }
  const std::vector<Json>& items() const noexcept { return items_; }  // of an array
  // A member of an object; an empty value if there is none, so that look-ups can be chained.
  const Json& operator[](std::string_view name) const noexcept;
  bool has(std::string_view name) const noexcept { return members_.contains(name); }

 private:
  friend class JsonReader;
  std::string text_;
  std::vector<Json> items_;
  std::map<std::string, Json, std::less<>> members_;
};

}  // namespace nixl::core::http
