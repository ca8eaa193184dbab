// Checks for the C++ tests: a failed check prints the expression, both values where they print, and exits 1 at once.
//   TEST(name) { CHECK(x); CHECK_EQ(a, b); }   ...   int main(int argc, char** argv) { return run_tests(argc, argv); }
// An argument runs only the tests whose name contains it. SKIP("reason") ends the program with 77.
#pragma once
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*body)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
struct Register {
  Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};
template <typename T>
std::string show(const T& value) {
  if constexpr (requires(std::ostringstream & s) { s << value; }) {
    std::ostringstream s;
    s << value;
    return s.str();
  } else {
    return "?";
  }
}
[[noreturn]] inline void failed(const char* file, int line, const std::string& text) {
  std::fprintf(stderr, "%s:%d: %s\n", file, line, text.c_str());
  std::fflush(stderr);
  std::_Exit(1);
}
inline int run_tests(int argc, char** argv) {
  int count = 0;
  for (const Test& test : tests()) {
    if (argc > 1 && !std::strstr(test.name, argv[1])) continue;
    std::fprintf(stderr, "[ run ] %s\n", test.name);
    test.body();
    ++count;
  }
  std::fprintf(stderr, "%d passed\n", count);
  return count ? 0 : 1;
}

// Whether the text has this part; says so where it lacks it.
inline bool has(const std::string& text, const char* part) {
  if (text.find(part) != std::string::npos) return true;
  std::fprintf(stderr, "  \"%s\" lacks \"%s\"\n", text.c_str(), part);
  return false;
}

// Runs the body in a process of its own: for what a process does or reads but once.
template <typename F>
void in_child(F body) {
  const pid_t child = ::fork();
  if (child == 0) {
    body();
    ::_exit(0);
  }
  int status = 0;
  if (::waitpid(child, &status, 0) != child || status != 0)
    failed(__FILE__, __LINE__, "the child ended with status " + std::to_string(status));
}

}  // namespace check

#define TEST(name)                                             \
  static void test_##name();                                   \
  static check::Register register_##name(#name, &test_##name); \
  static void test_##name()
#define CHECK(x)                                                  \
  do {                                                            \
    if (!(x)) check::failed(__FILE__, __LINE__, "CHECK(" #x ")"); \
  } while (0)
#define CHECK_EQ(a, b)                                                                                    \
  do {                                                                                                    \
    const auto check_a = (a);                                                                             \
    const auto check_b = (b);                                                                             \
    if (!(check_a == check_b))                                                                            \
      check::failed(__FILE__, __LINE__,                                                                   \
                    "CHECK_EQ(" #a ", " #b "): " + check::show(check_a) + " != " + check::show(check_b)); \
  } while (0)
// A Result that must hold a value: prints the reason if not, yields the value.
#define CHECK_OK(expr)                                                                                 \
  [&] {                                                                                                \
    auto check_r = (expr);                                                                             \
    if (!check_r) check::failed(__FILE__, __LINE__, "CHECK_OK(" #expr "): " + check_r.error().reason); \
    return check_r;                                                                                    \
  }()
#define SKIP(reason)                            \
  do {                                          \
    std::fprintf(stderr, "SKIP: %s\n", reason); \
    std::exit(77);                              \
  } while (0)
