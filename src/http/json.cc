#include "http/json.h"

namespace nixl::core::http {
namespace {

constexpr int kMaxDepth = 32;

void append_utf8(unsigned code, std::string& out) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | code >> 6);
    out += static_cast<char>(0x80 | (code & 63));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xE0 | code >> 12);
    out += static_cast<char>(0x80 | (code >> 6 & 63));
    out += static_cast<char>(0x80 | (code & 63));
  } else {
    out += static_cast<char>(0xF0 | code >> 18);
    out += static_cast<char>(0x80 | (code >> 12 & 63));
    out += static_cast<char>(0x80 | (code >> 6 & 63));
    out += static_cast<char>(0x80 | (code & 63));
  }
}

}  // namespace

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  Result<Json> whole() {
    NIXL_ASSIGN(Json value, read(0));
    skip_space();
    if (at_ != text_.size()) return bad("something after the value");
    return value;
  }

 private:
  tl::unexpected<Error> bad(const char* what) const {
    return fail(Code::kMismatch, "JSON of %zu bytes, at byte %zu: %s", text_.size(), at_, what);
  }
  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t'))
      ++at_;
  }
  bool take(char c) {
    skip_space();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  Result<Json> read(int depth) {
    if (depth > kMaxDepth) return bad("nested too deeply");
    Json value;
    if (take('{')) {
      if (take('}')) return value;
      do {
        if (!take('"')) return bad("a name was expected");
        NIXL_ASSIGN(std::string key, text());
        if (!take(':')) return bad("':' was expected");
        NIXL_ASSIGN(Json member, read(depth + 1));
        value.members_.insert_or_assign(std::move(key), std::move(member));
      } while (take(','));
      if (!take('}')) return bad("'}' was expected");
    } else if (take('[')) {
      if (take(']')) return value;
      do {
        NIXL_ASSIGN(Json item, read(depth + 1));
        value.items_.push_back(std::move(item));
      } while (take(','));
      if (!take(']')) return bad("']' was expected");
    } else if (take('"')) {
      NIXL_ASSIGN(value.text_, text());
    } else {
      const std::size_t begin = at_;
      while (at_ < text_.size() && (std::isalnum(static_cast<unsigned char>(text_[at_])) || text_[at_] == '-' ||
                                    text_[at_] == '+' || text_[at_] == '.'))
        ++at_;
      if (at_ == begin) return bad("a value was expected");
      value.text_ = text_.substr(begin, at_ - begin);
      if (value.text_ == "null") value.text_.clear();
    }
    return value;
  }

  Result<unsigned> unicode() {
    if (text_.size() - at_ < 4) return bad("\\u needs four digits");
    unsigned code = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = text_[at_++];
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) return bad("\\u needs four hexadecimal digits");
      code = code << 4 | static_cast<unsigned>(digit);
    }
    return code;
  }

  Result<std::string> text() {  // after the opening quote
    std::string out;
    while (at_ < text_.size()) {
      const char c = text_[at_++];
      if (c == '"') return out;
      if (c != '\\') {
        out += c;
        continue;
      }
      if (at_ >= text_.size()) break;
      const char escape = text_[at_++];
      constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
      if (const std::size_t i = kFrom.find(escape); i != std::string_view::npos) {
        out += kTo[i];
      } else if (escape == 'u') {
        NIXL_ASSIGN(unsigned code, unicode());
        if (code >= 0xD800 && code < 0xDC00 && text_.substr(at_, 2) == "\\u") {
          at_ += 2;
          NIXL_ASSIGN(const unsigned low, unicode());
          code = 0x10000 + ((code - 0xD800) << 10) + ((low - 0xDC00) & 0x3FF);
        }
        append_utf8(code, out);
      } else {
        return bad("unknown escape");
      }
    }
    return bad("text without end");
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

Result<Json> Json::parse(std::string_view text) {
  return JsonReader(text).whole();
}

const Json& Json::operator[](std::string_view name) const noexcept {
  static const Json kNone;
  const auto at = members_.find(name);
  return at == members_.end() ? kNone : at->second;
}

}  // namespace nixl::core::http
